"""The gateway's way to the engine, with a fake handle: retries, cuts, errors, cancellation. Ray LLM imports slowly."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from app.serving.bodies import Refused

pytestmark = pytest.mark.slow
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}


class Responses:
    """A stream of responses; an exception among them is raised in its place."""

    def __init__(self, items: list[Any]) -> None:
        self.items = iter(items)
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            return item
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.fixture(name="asked")
def asked_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`asked(first try's responses, second's, ...)`: what the gateway yields, and the tries that it made."""
    from app.serving import gateway as module
    from app.serving.gateway import Gateway

    monkeypatch.setattr(module, "TRY_AGAIN_SECONDS", 0.0)

    def asked(*tries: list[Any], operation: str = "chat", body: Any = None) -> tuple[list[Any], list[Responses]]:
        made: list[Responses] = []

        def remote(request: Any, info: Any) -> Responses:
            assert not info.headers  # the key stays here
            made.append(Responses(tries[len(made)]))
            return made[-1]

        gateway = Gateway.__new__(Gateway)
        method = SimpleNamespace(remote=remote)
        gateway._get_configured_serve_handle = lambda model: SimpleNamespace(**{operation: method})

        async def collect() -> list[Any]:
            return [item async for item in gateway.ask(operation, body or BODY)]

        return asyncio.run(collect()), made

    return asked


def gone() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_a_replica_that_dies_before_it_answers_is_replaced(asked: Callable[..., Any]) -> None:
    items, tries = asked([gone()], [gone()], [["a"], ["b"]])
    assert items == [["a"], ["b"]]
    assert len(tries) == 3
    assert all(one.is_cancelled for one in tries)


def test_a_replica_whose_engine_is_dead_is_replaced_as_well(asked: Callable[..., Any]) -> None:
    from ray.exceptions import RayTaskError
    from vllm.v1.engine.exceptions import EngineDeadError

    dead = RayTaskError("chat", "traceback", EngineDeadError()).as_instanceof_cause()  # as Ray raises it here
    assert asked([dead], [["a"]])[0] == [["a"]]


@pytest.mark.parametrize("tries", [([["a"], "GONE"],), (["GONE"], ["GONE"], ["GONE"])])
def test_within_a_stream_or_too_often_it_is_not(asked: Callable[..., Any], tries: tuple[list[Any], ...]) -> None:
    with pytest.raises(Refused) as raised:
        asked(*([gone() if item == "GONE" else item for item in items] for items in tries))
    assert raised.value.answer.status == 503


def test_the_engines_errors_keep_their_status(asked: Callable[..., Any]) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

    for code, status in ((400, 400), (404, 404), (418, 400), (500, 500), (501, 500)):
        error = ErrorResponse(error=ErrorInfo(message="so", type="t", code=code))
        for response in (error, [error]):
            with pytest.raises(Refused) as raised:
                asked([response])
            assert raised.value.answer.status == status


@pytest.mark.parametrize(
    "body",
    [
        {**BODY, "nothing": 1},
        {**BODY, "temperature": "hot"},
        {**BODY, "messages": 3},
        {**BODY, "structured_outputs": []},
        {**BODY, "messages": [{"role": "user", "content": 3}]},
    ],
)
def test_a_wrong_field_never_reaches_the_engine(asked: Callable[..., Any], body: dict[str, Any]) -> None:
    with pytest.raises(Refused) as raised:
        asked(body=body)
    assert raised.value.answer.status == 400


def test_fields_that_openai_has_and_vllm_has_not_pass(asked: Callable[..., Any]) -> None:
    body = {**BODY, "store": False, "metadata": {}, "user": "u", "service_tier": "auto"}
    assert asked([["a"]], body=body)[0] == [["a"]]
