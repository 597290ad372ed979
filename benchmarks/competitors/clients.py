"""Clients of an OpenAI endpoint in one event loop: what each request came to, exactly as it came.

`closed` keeps so many clients busy, each with one request at a time; `open_loop` sends at a rate, whatever comes back.
A request that fails is sent again up to RETRIES times, as the official client does by default; both are told.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

RETRIES = 2
PATIENCE_SECONDS = 120
PROMPT = "却说曹操引兵南下，刘备问计于孔明。"


@dataclass
class Outcome:
    """One request. `ending` of a stream: whole; told: error event and [DONE]; short: neither; broken: connection."""

    is_stream: bool
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int = 0  # of the first try; 0: the connection broke
    last_status: int = 0
    ending: str = "whole"
    retry_after: str = ""
    message: str = ""  # of the first failure

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def is_answered(self) -> bool:
        return self.last_status == 200 and self.ending == "whole"


@dataclass
class Clients:
    """All requests ask the same of the same model."""

    base_url: str
    key: str
    model: str
    max_tokens: int
    outcomes: list[Outcome] = field(default_factory=list)

    @asynccontextmanager
    async def closed(self, num_clients: int, num_streaming: int) -> AsyncIterator[None]:
        """So many clients while the block runs; the last requests are waited for."""
        stop = asyncio.Event()

        async def one(number: int) -> None:
            while not stop.is_set():
                await self._ask(session, number < num_streaming, RETRIES)

        async with self._session() as session:
            tasks = [asyncio.create_task(one(number)) for number in range(num_clients)]
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def open_loop(self, rate: float, seconds: float) -> None:
        """So many requests a second, none of them streamed, each once."""
        began = time.monotonic()
        tasks: list[asyncio.Task[None]] = []
        async with self._session() as session:
            while (due := len(tasks) / rate) < seconds:
                await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                tasks.append(asyncio.create_task(self._ask(session, False, 0)))
            await asyncio.gather(*tasks)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers={"authorization": f"Bearer {self.key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE_SECONDS),
        )

    async def _ask(self, session: aiohttp.ClientSession, is_stream: bool, retries: int) -> None:
        outcome = Outcome(is_stream)
        for attempt in range(retries + 1):
            await asyncio.sleep(2 ** (attempt - 2) if attempt else 0)
            outcome.last_status, outcome.ending = 0, "whole"
            try:
                await self._try(session, outcome)
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome.ending = "broken"
                outcome.message = outcome.message or f"{type(error).__name__}: {error}"
            if attempt == 0:
                outcome.status = outcome.last_status
            if 0 < outcome.last_status < 500:
                break
        outcome.ended = time.monotonic()
        self.outcomes.append(outcome)

    async def _try(self, session: aiohttp.ClientSession, outcome: Outcome) -> None:
        body: dict[str, Any] = {"model": self.model, "prompt": PROMPT, "max_tokens": self.max_tokens}
        body |= {"stream": outcome.is_stream, "ignore_eos": True}
        async with session.post(f"{self.base_url}/completions", json=body) as response:
            outcome.last_status = response.status
            outcome.retry_after = response.headers.get("retry-after", "")
            if response.status != 200 or not outcome.is_stream:
                content = await response.read()
                if response.status != 200:
                    outcome.message = outcome.message or content.decode(errors="replace")[:300]
                return
            outcome.ending = await _ending(response)


async def _ending(response: aiohttp.ClientResponse) -> str:
    has_error = False
    async for line in response.content:
        if line == b"data: [DONE]\n":
            return "told" if has_error else "whole"
        if line.startswith(b"data: "):
            has_error = has_error or "error" in json.loads(line[6:])
    return "short"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many percent lie; 0 for none."""
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def longest_gap(outcomes: Sequence[Outcome], began: float, ended: float) -> float:
    """Seconds in which no request was answered."""
    times = sorted([began, ended, *(one.ended for one in outcomes if one.is_answered and began < one.ended < ended)])
    return max(after - before for before, after in pairwise(times))
