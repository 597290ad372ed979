"""Thousands of generated requests through the whole ASGI application and the engine's own schemas: none ends in 5xx.

The engine behind them is a fake one; test_resilience.py sends a smaller share to a real endpoint, and
benchmarks/endpoint_resilience.py all 10,000.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.generated import OPERATIONS, Request, requests
from tests.serving.test_pipeline import Endpoint, Engine

pytestmark = pytest.mark.slow  # Ray LLM and vLLM, whose schemas these are, import slowly
NUM_REQUESTS = 9_000
NUM_WARM = 2_000  # of them, after which no memory may be taken for good
MAX_GROWTH_BYTES = 16 << 20
KEYS = {"right": "k", "wrong": "wrong", "": None}


class CheckedEngine(Engine):
    """The fake engine behind the gateway's own check of the schema; counts who comes through."""

    def __init__(self) -> None:
        super().__init__("却说", "曹操")
        self.num_passed: Counter[str] = Counter()

    async def ask(self, operation: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        from app.serving.gateway import _checked

        _checked(operation, body)
        self.num_passed[operation] += 1
        if operation == "detokenize":  # any number, also what is no token
            yield {"prompt": "却说"}
            return
        async for answer in super().ask(operation, body):
            yield answer


def schemas() -> dict[str, Any]:
    """The JSON schema of each operation."""
    from app.serving.gateway import _schema

    return {operation: _schema(operation, {}).model_json_schema() for operation, _ in OPERATIONS.values()}


def generate(strategy: st.SearchStrategy[Request], count: int) -> list[Request]:
    """At least so many requests, always the same."""
    made: list[Request] = []

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
        phases=[Phase.generate],
    )
    @given(strategy)
    def collect(request: Request) -> None:
        made.append(request)

    collect()
    return made


def test_no_generated_request_ends_in_5xx_and_memory_stays_flat() -> None:
    made = generate(requests(schemas(), "m"), NUM_REQUESTS)
    engine = CheckedEngine()
    endpoint = Endpoint(engine)
    statuses: Counter[int] = Counter()

    async def send_all(requests: Sequence[Request]) -> int:
        """Bytes that this process then takes."""
        for one in requests:
            reply = await endpoint.send(one.body, path=one.path, key=KEYS[one.key], method=one.method)
            assert 0 < reply.status < 500, (one, reply.body)
            assert reply.status < 400 or reply.json["error"]["message"]
            statuses[reply.status] += 1
            endpoint.records.clear()
            engine.bodies.clear()
        gc.collect()
        return psutil.Process().memory_info().rss

    warm = asyncio.run(send_all(made[:NUM_WARM]))
    assert asyncio.run(send_all(made[NUM_WARM:])) - warm < MAX_GROWTH_BYTES
    assert statuses.total() == len(made) >= NUM_REQUESTS
    assert {200, 400, 401, 404, 405, 413} <= set(statuses)
    assert statuses[200] > NUM_REQUESTS / 10, "hardly any was right"
    assert set(engine.num_passed) == {operation for operation, _ in OPERATIONS.values()}
    assert endpoint.door.num_running == endpoint.door.num_waiting == 0
