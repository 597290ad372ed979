"""A stream's chunks in batches: all of them, in order, the first alone."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.batching import in_batches


async def chunks(count: int, pauses: frozenset[int] = frozenset(), fails: bool = False) -> AsyncGenerator[int, None]:
    for number in range(count):
        await asyncio.sleep(0.001 if number in pauses else 0)
        yield number
    if fails:
        raise ConnectionError("gone")


@settings(deadline=None, max_examples=50)
@given(count=st.integers(0, 20), pauses=st.frozensets(st.integers(0, 20)), interval=st.sampled_from([0.0, 0.002]))
def test_nothing_is_lost(count: int, pauses: frozenset[int], interval: float) -> None:
    async def collect() -> list[list[int]]:
        return [batch async for batch in in_batches(chunks(count, pauses), interval)]

    batches = asyncio.run(collect())
    assert [number for batch in batches for number in batch] == list(range(count))
    assert all(batches)


def test_the_first_does_not_wait_and_the_rest_comes_together() -> None:
    async def collect() -> list[list[int]]:
        return [batch async for batch in in_batches(chunks(9), 60)]

    assert asyncio.run(collect()) == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]  # the end cuts the pause short


def test_its_error_comes_after_what_came_before() -> None:
    seen: list[int] = []

    async def collect() -> None:
        async for batch in in_batches(chunks(3, fails=True), 0):
            seen.extend(batch)

    with pytest.raises(ConnectionError):
        asyncio.run(collect())
    assert seen == [0, 1, 2]


def test_closed_early_it_closes_its_source() -> None:
    source = chunks(1000, frozenset(range(1000)))

    async def begin() -> None:
        batches = in_batches(source, 0)
        await anext(batches)
        await batches.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(source)

    asyncio.run(begin())
