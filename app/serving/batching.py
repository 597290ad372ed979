"""Batches of a stream's chunks: the first goes at once, later ones as they are ready, not more often than an interval.

A message between processes costs about as much as a token of a small model; the pause costs the first token nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any


async def in_batches(chunks: AsyncGenerator[Any, None], interval_seconds: float) -> AsyncGenerator[list[Any], None]:
    """Lists of what has come in, never empty, in order. Closing it closes `chunks`."""
    ready: list[Any] = []
    has_more = asyncio.Event()

    async def read() -> None:
        try:
            async for chunk in chunks:
                ready.append(chunk)
                has_more.set()
        finally:
            has_more.set()

    reading = asyncio.create_task(read())
    try:
        while not reading.done() or ready:
            await has_more.wait()
            has_more.clear()
            if ready:
                batch, ready[:] = ready[:], []
                yield batch
            if reading.done():
                has_more.set()  # what came with the end, or nothing
                if not ready:
                    break
            else:
                await asyncio.wait({reading}, timeout=interval_seconds)
        await reading  # its error, if it ended with one
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await chunks.aclose()
