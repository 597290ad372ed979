"""The way of a request with a fake engine: the whole ASGI application, without Ray and without a network."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.access import OPEN_PATHS, Recorder, Routes
from app.serving.audit import AuditRecord
from app.serving.auth import ApiKeyMiddleware, Key, KeyStore, digest
from app.serving.bodies import Refused
from app.serving.config import DoorConfig, Limits
from app.serving.lexicon import Term
from app.serving.moderation import Moderator
from app.serving.pipeline import Pipeline
from app.serving.policy import Policy
from app.serving.protocol import openai_error
from app.serving.quota import Door, Ledger, Teller

FORBIDDEN = "乌有之辞"
CARD = "6222 0212 3456 7894"  # a valid bank card number of no one
POLICIES = {"default": Policy(), "open": Policy(categories=(), pii_mask=())}
QUESTION = [{"role": "user", "content": "孔明曰"}]
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
HEAD = {"id": "c1", "created": 1, "model": "m"}


class Engine:
    """Answers with the given pieces; remembers what it was asked and whether it was closed before its end."""

    def __init__(self, *pieces: str, batch: int = 1) -> None:
        self.pieces, self.batch = pieces, batch
        self.bodies: list[dict[str, Any]] = []
        self.num_abandoned = 0
        self.fails_at: int | None = None
        self.gate: asyncio.Event | None = None

    async def ask(self, operation: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        if operation == "detokenize":
            yield {"prompt": "".join(map(chr, body["tokens"]))}
            return
        self.bodies.append(body)
        ended = False
        try:
            if self.gate:
                await self.gate.wait()
            if self.fails_at == 0:
                raise Refused(openai_error(503, "gone"))
            if not body.get("stream"):
                yield self.whole(operation)
            else:
                events = self.events(operation)
                for start in range(0, len(events), self.batch):
                    if self.fails_at is not None and start >= self.fails_at:
                        raise Refused(openai_error(503, "gone"))
                    yield events[start : start + self.batch]
            ended = True
        finally:
            self.num_abandoned += not ended

    def whole(self, operation: str) -> dict[str, Any]:
        text = "".join(self.pieces)
        said = {"message": {"role": "assistant", "content": text}} if operation == "chat" else {"text": text}
        choice = {"index": 0, **said, "logprobs": {"content": [text]}, "finish_reason": "stop"}
        return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}

    def events(self, operation: str) -> list[str]:
        chat = operation == "chat"
        kind = {"object": "chat.completion.chunk" if chat else "text_completion"}
        choices = [{"delta": {"role": "assistant", "content": ""}}] if chat else []
        choices += [{"delta": {"content": piece}} if chat else {"text": piece} for piece in self.pieces]
        choices[-1]["finish_reason"] = "stop"
        values = [HEAD | kind | {"choices": [{"index": 0, "logprobs": None} | choice]} for choice in choices]
        values.append(HEAD | kind | {"choices": [], "usage": USAGE})
        return [f"data: {json.dumps(value)}\n\n" for value in values] + ["data: [DONE]\n\n"]


class Endpoint:
    """The whole application around an engine; one key for each of these names."""

    def __init__(
        self,
        engine: Engine,
        door: DoorConfig | None = None,
        is_ready: Callable[[], Awaitable[bool]] | None = None,
        **keys: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.records: list[AuditRecord] = []
        self.door = Door(door or DoorConfig())
        self.ledger = Ledger(clock=lambda: 0.0)
        self.ledger_is_there = True
        moderator = Moderator(POLICIES, [Term("invented", FORBIDDEN), Term("invented", "forbidden")])
        pipeline = Pipeline(
            ask=engine.ask,
            models=["m"],
            moderator=moderator,
            teller=Teller(self.apply),
            door=self.door,
            context_tokens=1000,
            with_text=True,
        )
        routes = Routes(pipeline, {"m": {"id": "m"}}, {"digest": "3f"}, **({"is_ready": is_ready} if is_ready else {}))
        store = KeyStore(
            fixed=[Key(name=name, digest=digest(name), **more) for name, more in ({"k": {}} | keys).items()]
        )
        self.app = Recorder(ApiKeyMiddleware(routes, store, 10_000, OPEN_PATHS), self.records.append, lambda name: "3f")

    async def apply(self, operations: Sequence[Any]) -> Any:
        if not self.ledger_is_there:
            raise ConnectionError("no ledger")
        return self.ledger.apply(operations)

    async def send(
        self, body: Any = None, path: str = "/v1/chat/completions", key: str | None = "k", **more: Any
    ) -> "Reply":
        """One request; `gone` of more is set when the client leaves."""
        method = more.get("method") or ("GET" if body is None else "POST")
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "root_path": ""}
        messages = [{"type": "http.request", "body": raw, "more_body": False}]
        gone: asyncio.Event = more.get("gone") or asyncio.Event()
        reply = Reply()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            reply.take(message)

        await self.app(scope, receive, send)
        return reply


class Reply:
    """What came back."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    def take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[Any]:
        events = self.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    @property
    def said(self) -> str:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join((choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices)

    @property
    def reasons(self) -> list[str]:
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": QUESTION, **more}


def run(endpoint: Endpoint, *args: Any, **more: Any) -> Reply:
    return asyncio.run(endpoint.send(*args, **more))


def test_an_answer_passes_as_it_is_and_is_recorded() -> None:
    endpoint = Endpoint(Engine("亮夜观", "天象"))
    reply = run(endpoint, chat())
    assert reply.status == 200
    assert reply.json == endpoint.engine.whole("chat")
    (record,) = endpoint.records
    assert (record.key_name, record.model, record.model_version, record.status) == ("k", "m", "3f", 200)
    assert (record.prompt_tokens, record.completion_tokens, record.finish_reason) == (5, 7, "stop")
    assert (record.prompt, record.answer) == ("孔明曰", "亮夜观天象")
    assert record.time_to_first_token_seconds is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_stream_passes_as_it_is(path: str, batch: int) -> None:
    engine = Engine("亮夜", "观", "天象。", batch=batch)
    body = {"model": "m", "prompt": "孔明", "messages": QUESTION, "stream": True}
    del body["prompt" if "chat" in path else "messages"]
    reply = run(endpoint := Endpoint(engine), body, path)
    sent = engine.events("chat" if "chat" in path else "completions")
    assert reply.body.decode() == "".join(sent[:-2] + sent[-1:])  # without the usage, which nobody asked for
    assert engine.bodies[0]["stream_options"] == {"include_usage": True}
    assert endpoint.records[0].completion_tokens == 7
    assert endpoint.records[0].is_stream
    assert endpoint.records[0].time_to_first_token_seconds is not None
    assert engine.num_abandoned == 0


def test_a_streams_text_ends_no_line() -> None:
    """Some clients end lines at these characters, too; vLLM writes them as they are."""
    text = "上\u2028中\u0085下\u2029"
    engine = Engine()
    raw = [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":"stop"}}]}}\n\n']
    engine.events = lambda operation: raw  # type: ignore[method-assign]
    reply = run(Endpoint(engine), chat(stream=True))
    lines = [line for line in reply.body.decode().splitlines() if line]
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == text


def test_usage_is_sent_to_who_asks_for_it() -> None:
    reply = run(Endpoint(Engine("好")), chat(stream=True, stream_options={"include_usage": True}))
    assert reply.chunks[-1]["usage"] == USAGE


@pytest.mark.parametrize("key", [None, "wrong"])
def test_no_key_no_answer(key: str | None) -> None:
    endpoint = Endpoint(Engine("好"))
    reply = run(endpoint, chat(), key=key)
    assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
    assert not endpoint.engine.bodies
    assert [(record.status, record.key_name) for record in endpoint.records] == [(401, None)]


def test_a_model_that_the_key_may_not_use_is_one_that_does_not_exist() -> None:
    endpoint = Endpoint(Engine("好"), other={"models": ["n"]})
    not_ours, not_there = run(endpoint, chat(), key="other"), run(endpoint, chat(model="x"))
    assert not_ours.status == not_there.status == 404
    assert not_ours.body.replace(b"'m'", b"'x'") == not_there.body
    assert run(endpoint, path="/v1/models", key="other").json["data"] == []
    assert run(endpoint, path="/v1/models/m", key="other").status == 404
    assert run(endpoint, path="/v1/models").json == {"object": "list", "data": [{"id": "m"}]}
    assert run(endpoint, path="/v1/models/m").json == {"id": "m"}


@pytest.mark.parametrize(("has_engines", "status"), [(True, 200), (False, 503)])
def test_readiness_is_told_without_a_key(has_engines: bool, status: int) -> None:
    async def is_ready() -> bool:
        return has_engines

    endpoint = Endpoint(Engine("好"), is_ready=is_ready)
    assert run(endpoint, path="/ready", key=None).status == status
    assert run(endpoint, path="/health", key=None).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "m", "prompt": "\xed\xa0\x80"}', 400),
        (b'{"model": "m", "prompt": "\\ud800"}', 400),
        (b'{"model": "m", "prompt": "\\ud83d\\ude00", "messages": []}', 200),
        (b"[" * 9000, 400),
        (b'{"model": "m", "temperature": NaN}', 400),
        (b'{"model": "m", "temperature": 1e999}', 400),
        (b'{"model": "m", "seed": 9223372036854775808}', 400),
        (b'{"model": "m", "messages": [], "seed": 9223372036854775807}', 200),
        (chat(model=3), 400),
        (chat(stream="yes"), 400),
        (chat(n=0), 400),
        (chat(n=129), 400),
        (chat(n=True), 400),
        (chat(messages=[{"author": {"role": "user"}, "content": []}]), 400),
        (chat(messages=[{"role": "user", "content": "x" * 9000}] * 10), 413),
        (chat(messages=[{"role": "user", "content": 3}, 3, None, {"role": "user", "content": [3, {"text": 3}]}]), 200),
        (chat(messages=3), 200),  # for the engine to say
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(body: Any, status: int) -> None:
    endpoint = Endpoint(Engine("好"))
    reply = run(endpoint, body)
    assert reply.status == status
    assert status == 200 or reply.json["error"]["message"]
    assert len(endpoint.records) == 1
    assert endpoint.door.num_running == 0


def test_a_prompt_far_beyond_the_context_goes_no_further() -> None:
    endpoint = Endpoint(Engine("好"))
    endpoint.app._app.max_body_bytes = 1 << 20  # type: ignore[attr-defined]
    reply = run(endpoint, {"model": "m", "prompt": "x" * 100_000}, "/v1/completions")
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
    assert not endpoint.engine.bodies


def test_requests_are_limited_and_headers_say_so() -> None:
    endpoint = Endpoint(Engine("好"), few={"limits": Limits(requests_per_minute=2)})
    replies = [run(endpoint, chat(max_tokens=1), key="few") for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
    assert replies[2].headers["retry-after"] == "30"
    assert [record.status for record in endpoint.records] == [200, 200, 429]


def test_tokens_are_reserved_then_settled_by_what_was_used() -> None:
    limits = Limits(tokens_per_minute=1000)
    endpoint = Endpoint(Engine("好"), few={"limits": limits})
    assert run(endpoint, chat(max_tokens=900), key="few").status == 200
    assert endpoint.ledger.standing("few", limits)["tokens"].remaining == 1000 - USAGE["total_tokens"]
    assert run(endpoint, chat(max_tokens=999), key="few").status == 429
    assert run(endpoint, chat(), key="few").status == 429  # a whole context is reserved, and is more than what is left


def test_a_request_that_the_engine_refuses_costs_no_tokens_a_failed_one_does() -> None:
    limits = Limits(tokens_per_minute=1000)
    endpoint = Endpoint(Engine("好"), few={"limits": limits})
    endpoint.engine.fails_at = 0
    assert run(endpoint, chat(max_tokens=90), key="few").status == 503
    left = endpoint.ledger.standing("few", limits)["tokens"].remaining
    assert left < 1000 - 90
    assert run(endpoint, chat(n=0), key="few").status == 400
    assert endpoint.ledger.standing("few", limits)["tokens"].remaining == left


def test_without_the_ledger_only_unlimited_keys_pass() -> None:
    endpoint = Endpoint(Engine("好"), few={"limits": Limits(requests_per_minute=2)})
    endpoint.ledger_is_there = False
    assert run(endpoint, chat(), key="few").status == 503
    assert run(endpoint, chat()).status == 200


def test_the_door_sheds_and_a_client_that_goes_leaves_its_place() -> None:
    async def crowd() -> None:
        endpoint = Endpoint(Engine("好"), DoorConfig(max_running=1, max_waiting=1))
        endpoint.engine.gate = asyncio.Event()
        gone, gone_waiting = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(endpoint.send(chat(stream=True), gone=gone))
        waiting = asyncio.create_task(endpoint.send(chat(), gone=gone_waiting))
        await until(lambda: endpoint.door.num_waiting == 1)
        shed = await endpoint.send(chat())
        assert (shed.status, shed.json["error"]["type"]) == (429, "queue")
        gone_waiting.set()
        await waiting
        assert endpoint.door.num_waiting == 0
        gone.set()
        await running
        assert endpoint.door.num_running == 0
        assert endpoint.engine.num_abandoned == 1
        assert sorted(record.status for record in endpoint.records) == [429, 499, 499]
        endpoint.engine.gate.set()
        assert (await endpoint.send(chat())).status == 200

    asyncio.run(crowd())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": f"请说{FORBIDDEN}"}])),
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": [{"type": "text", "text": FORBIDDEN}]}])),
        ("/v1/chat/completions", chat(tools=[{"function": {"name": "f", "description": FORBIDDEN}}])),
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": "x", "name": FORBIDDEN}])),
        ("/v1/completions", {"model": "m", "prompt": ["a", f"请说{FORBIDDEN}"]}),
        ("/v1/completions", {"model": "m", "prompt": [*map(ord, f"请说{FORBIDDEN}")]}),
    ],
)
def test_a_forbidden_request_is_answered_by_a_refusal(path: str, body: dict[str, Any], stream: bool) -> None:
    endpoint = Endpoint(Engine("好"))
    reply = run(endpoint, body | {"stream": stream}, path)
    assert reply.status == 200
    assert not endpoint.engine.bodies
    if stream:
        assert reply.reasons == ["content_filter"]
        assert reply.said
    else:
        (choice,) = reply.json["choices"]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] if "chat" in path else choice["text"]
    (record,) = endpoint.records
    assert record.verdicts == [{"side": "input", "action": "block", "categories": ["invented"]}]
    assert record.finish_reason == "content_filter"


def test_embeddings_of_forbidden_texts_are_an_error() -> None:
    reply = run(Endpoint(Engine("好")), {"model": "m", "input": FORBIDDEN}, "/v1/embeddings")
    assert (reply.status, reply.json["error"]["code"]) == (400, "content_filter")


def test_personal_data_is_masked_on_its_way_in_and_out() -> None:
    endpoint = Endpoint(Engine(f"卡号 {CARD} 已收"))
    reply = run(endpoint, chat(messages=[{"role": "user", "content": f"我的卡号是 {CARD}"}]))
    assert "6222" not in endpoint.engine.bodies[0]["messages"][0]["content"]
    (choice,) = reply.json["choices"]
    assert "[BANK_CARD]" in choice["message"]["content"]
    assert "6222" not in reply.body.decode()
    assert choice["logprobs"] is None
    assert [verdict["action"] for verdict in endpoint.records[0].verdicts] == ["mask", "mask"]
    assert "6222" not in (endpoint.records[0].prompt or "") + (endpoint.records[0].answer or "")


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.integers(0, len(text)), max_size=12).map(
        lambda places: [text[a:b] for a, b in zip([0, *sorted(places)], [*sorted(places), len(text)], strict=True)]
    )


@settings(deadline=None)
@given(pieces=cuts(f"亮曰：「{FORBIDDEN}」不可言也。"), batch=st.integers(1, 5))
def test_a_forbidden_phrase_never_leaves_however_it_is_cut(pieces: list[str], batch: int) -> None:
    endpoint = Endpoint(Engine(*pieces, batch=batch))
    reply = run(endpoint, chat(stream=True))
    assert reply.said == "亮曰：「"
    assert reply.reasons == ["content_filter"]
    assert not set(FORBIDDEN) & set(json.dumps(reply.chunks, ensure_ascii=False))
    assert endpoint.records[0].verdicts == [{"side": "output", "action": "block", "categories": ["invented"]}]
    assert endpoint.door.num_running == 0


@settings(deadline=None)
@given(pieces=cuts(f"卡号 {CARD}，forbid him 不可言也。a"), batch=st.integers(1, 5))
def test_masked_streams_say_all_but_the_number(pieces: list[str], batch: int) -> None:
    reply = run(Endpoint(Engine(*pieces, batch=batch)), chat(stream=True))
    assert reply.said == "卡号 [BANK_CARD]，forbid him 不可言也。a"
    assert reply.reasons == ["stop"]


@settings(deadline=None)
@given(pieces=cuts("卡号 622，forbi 12 乌有之 不可言也。乌有之"), batch=st.integers(1, 5))
def test_what_only_looks_forbidden_arrives_as_it_was_sent(pieces: list[str], batch: int) -> None:
    engine = Engine(*pieces, batch=batch)
    sent = engine.events("chat")
    assert run(Endpoint(engine), chat(stream=True)).body.decode() == "".join(sent[:-2] + sent[-1:])


def test_an_engine_that_dies_within_a_stream_is_told() -> None:
    engine = Engine("亮", "夜", "观")
    engine.fails_at = 2
    endpoint = Endpoint(engine)
    reply = run(endpoint, chat(stream=True))
    assert reply.chunks[-1]["error"]["message"] == "gone"
    assert endpoint.records[0].finish_reason == "error"
    assert endpoint.door.num_running == 0


def test_tool_calls_are_judged_as_well() -> None:
    engine = Engine("x")
    parts = ({"name": "f", "arguments": '{"a": "乌有'}, {"arguments": '之辞"}'})
    calls = [{"index": 0, "function": part} for part in parts]
    chunks = [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None} for call in calls]
    raw = [f"data: {json.dumps(HEAD | {'object': 'chat.completion.chunk', 'choices': [c]})}\n\n" for c in chunks]
    engine.events = lambda operation: raw  # type: ignore[method-assign]
    reply = run(Endpoint(engine), chat(stream=True))
    assert reply.reasons == ["content_filter"]
    assert "乌有" not in json.dumps(reply.chunks, ensure_ascii=False)


def test_a_policy_that_filters_nothing_filters_nothing() -> None:
    endpoint = Endpoint(Engine(FORBIDDEN), free={"policy": "open"}, lost={"policy": "undeployed"})
    assert run(endpoint, chat(), key="free").json["choices"][0]["message"]["content"] == FORBIDDEN
    assert run(endpoint, chat(), key="lost").status == 403


def test_pages_and_paths() -> None:
    endpoint = Endpoint(Engine("好"))
    page = run(endpoint, path="/", key=None)
    assert (page.status, page.headers["content-security-policy"]) == (200, "frame-ancestors 'none'")
    assert run(endpoint, path="/health", key=None).json == {"status": "ok"}
    assert not endpoint.records
    assert run(endpoint, path="/v1/lineage").json == {"digest": "3f"}
    assert run(endpoint, path="/nothing").status == 404
    assert run(endpoint, path="/v1/completions").status == 405
    assert run(endpoint, chat(), path="/v1/models").status == 405


def test_what_nobody_foresaw_is_a_500_of_our_own() -> None:
    engine = Engine("好")
    engine.whole = lambda operation: {"choices": [None]}  # type: ignore[method-assign]
    endpoint = Endpoint(engine)
    reply = run(endpoint, chat())
    assert (reply.status, reply.json["error"]["type"]) == (500, "server_error")
    assert endpoint.records[0].status == 500
    assert endpoint.door.num_running == 0


def test_the_lifespan_closes_what_was_opened(tmp_path: Path) -> None:
    closed = []
    routes = Routes(Endpoint(Engine()).app._app.app.pipeline, {}, {}, lambda: closed.append(1))  # type: ignore[attr-defined]
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(routes({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert closed == [1]
