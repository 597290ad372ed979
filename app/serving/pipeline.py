"""The way of one request: model, size, quota, content filter, door, engine, content filter, settlement.

`Pipeline` is given a caller's key and a raw body and sends the answer over ASGI; the engine is a function that yields
one whole answer or batches of server-sent events. Whatever happens, the door is left and the quota settled once.
It knows neither Ray nor routes; who may call at all is auth.py's part, what is written down of it access.py's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from app.serving import bodies
from app.serving.auth import Key
from app.serving.bodies import Refused
from app.serving.events import EventFilter, said, with_content
from app.serving.moderation import Moderator, Verdict
from app.serving.policy import Policy
from app.serving.protocol import (
    DONE,
    Answer,
    Headers,
    Send,
    count_requested_tokens,
    event,
    final_chunk,
    openai_error,
    rate_limit_headers,
    send_answer,
    stream_error,
    too_many_requests,
    whole,
)
from app.serving.quota import Door, Grant, Refusal, Teller

logger = logging.getLogger(__name__)

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
}
GENERATES = ("chat", "completions")
BYTES_PER_TOKEN = 3  # of a prompt, as a guess before the engine counts
MAX_BYTES_PER_TOKEN = 64  # a prompt with more of them cannot fit, whatever the tokenizer
LONG_TEXT_TOKENS = 1500  # are judged in a thread, so that other requests go on
STREAM_HEADERS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

Ask = Callable[[str, dict[str, Any]], AsyncGenerator[Any, None]]  # operation, body -> one mapping, or lists of events
Result = TypeVar("Result")


@dataclass
class Note:
    """What becomes known of a request on its way, for the audit log and the metrics."""

    began_at: float = field(default_factory=time.monotonic)
    key_name: str | None = None
    model: str | None = None  # that was asked for
    served: str | None = None  # the one that answers
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_at: float | None = None  # of streams
    finish_reason: str | None = None
    is_stream: bool = False
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | None = None
    answer: str | None = None

    def add(self, side: str, verdict: Verdict) -> None:
        """Note a verdict, not its text."""
        if verdict.action != "allow":
            self.verdicts.append({"side": side, "action": verdict.action, "categories": list(verdict.categories)})


@dataclass
class _Call:
    operation: str
    key: Key
    body: dict[str, Any]
    policy: Policy
    note: Note
    prompt_tokens: int  # estimated
    num_choices: int
    used_tokens: int | None = 0  # None while it is not known, as when the engine failed

    @property
    def is_long(self) -> bool:
        return self.prompt_tokens > LONG_TEXT_TOKENS or self.policy.semantics


@dataclass(frozen=True)
class Pipeline:
    """One per ingress replica."""

    ask: Ask
    models: Collection[str]
    moderator: Moderator
    teller: Teller
    door: Door
    context_tokens: int
    with_text: bool = False
    choose: Callable[[str], str] = str  # which model answers for a name

    async def answer(self, operation: str, key: Key, raw: bytes, note: Note, send: Send) -> None:
        """Answer a request. Cancelled, it frees what it holds."""
        try:
            if refusal := self.door.refuse_at_once():  # with more than can be answered, refusing is most of the work
                raise Refused(too_many_requests(refusal))
            call = self._read(operation, key, raw, note)
            grant = await self._reserve(call)
            try:
                await self._run(call, rate_limit_headers(grant.standing), send)
            finally:
                self.teller.settle(grant, grant.tokens if call.used_tokens is None else call.used_tokens)
        except Refused as refused:
            await send_answer(send, refused.answer)

    def _read(self, operation: str, key: Key, raw: bytes, note: Note) -> _Call:
        body = bodies.read_body(raw)
        bodies.refuse_without_role(body)
        note.model = self._model(body, key)
        note.served = body["model"] = self.choose(note.model)
        try:
            policy = self.moderator.policy(key.policy)
        except ValueError as error:
            logger.error("key %s: %s", key.name, error)
            raise Refused(openai_error(403, "This key's policy is not deployed; tell who gave it to you.")) from None
        if bodies.size_tokens(body, MAX_BYTES_PER_TOKEN) > self.context_tokens + bodies.MAX_SEQUENCES:
            message = f"This model's context is {self.context_tokens} tokens; the prompt is far longer."
            raise bodies.bad_request(message, code="context_length_exceeded")
        num_choices = bodies.num_choices(body) if operation in GENERATES else 0
        return _Call(operation, key, body, policy, note, bodies.size_tokens(body, BYTES_PER_TOKEN), num_choices)

    def _model(self, body: Mapping[str, Any], key: Key) -> str:
        model = body.get("model")
        if model is None and len(self.models) == 1:
            model = next(iter(self.models))
        if not isinstance(model, str):
            raise bodies.bad_request("model must be a string.", "model")
        if model not in self.models or not key.may_use(model):
            raise Refused(model_not_found(model))
        return model

    async def _reserve(self, call: _Call) -> Grant:
        limits = call.key.limits
        wanted = call.prompt_tokens + count_requested_tokens(call.body, self.context_tokens)
        is_asked = any(call.body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        if not is_asked and call.prompt_tokens <= limits.tokens_per_minute:
            wanted = min(wanted, limits.tokens_per_minute)  # nobody asked for a whole context
        try:
            result = await self.teller.reserve(call.key.name, limits, 1, wanted)
        except Exception:  # the teller has logged it
            raise Refused(openai_error(503, "The quota cannot be checked at the moment. Try again.")) from None
        if isinstance(result, Refusal):
            raise Refused(too_many_requests(result))
        return result

    async def _run(self, call: _Call, headers: Headers, send: Send) -> None:
        if await self._is_forbidden(call):
            await _send_refusal(call, headers, send)
            return
        refusal = await self.door.enter(time.monotonic() - call.note.began_at)
        if refusal:
            raise Refused(too_many_requests(refusal))
        try:
            call.used_tokens = None
            await self._forward(call, headers, send)
        finally:
            self.door.leave()

    async def _is_forbidden(self, call: _Call) -> bool:
        """Judge what was asked, and mask in the body what is to be masked."""
        if call.operation in ("tokenize", "detokenize"):
            return False
        messages = bodies.messages_of(call.body) or await self._texts_of_tokens(call)
        verdict = await _now_or_in_thread(call.is_long, partial(self.moderator.check_input, messages, call.policy))
        more = bodies.more_of(call.body) if verdict.action != "block" else []
        if more and (worse := self.moderator.check_input(more, call.policy)).action == "block":
            verdict = worse
        call.note.add("input", verdict)
        if verdict.action == "mask":
            messages = self.moderator.mask_messages(messages, call.policy)
            call.body = bodies.with_messages(call.body, messages)
        if self.with_text:
            call.note.prompt = bodies.text_of(messages)
        return verdict.action == "block"

    async def _texts_of_tokens(self, call: _Call) -> list[dict[str, Any]]:
        """Prompts of token ids as the engine reads them."""
        texts = []
        for tokens in bodies.token_prompts(call.body):
            async with aclosing(self.ask("detokenize", {"model": call.body["model"], "tokens": tokens})) as answers:
                texts += [{"content": answer["prompt"]} async for answer in answers]
        return texts

    async def _forward(self, call: _Call, headers: Headers, send: Send) -> None:
        wants_usage = bodies.ask_for_usage(call.body)
        async with aclosing(self.ask(call.operation, call.body)) as answers:
            try:
                first = await anext(answers)
            except Refused as refused:
                call.used_tokens = 0 if refused.answer.status < 500 else None
                raise
            if isinstance(first, Mapping):
                await send_answer(send, await self._check_whole(call, dict(first), headers))
                return
            call.note.is_stream, call.note.first_token_at = True, time.monotonic()
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS + headers})
            events = EventFilter(self.moderator, call.policy, wants_usage, call.num_choices)
            try:
                await _send_stream(events, first, answers, send)
            finally:
                self._account(call, events)

    async def _check_whole(self, call: _Call, answer: dict[str, Any], headers: Headers) -> Answer:
        note, usage = call.note, answer.get("usage") or {}
        note.prompt_tokens, note.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        call.used_tokens = usage.get("total_tokens", call.prompt_tokens)
        if call.operation in GENERATES:
            is_long = call.is_long or (note.completion_tokens or 0) > LONG_TEXT_TOKENS
            answer["choices"] = await _now_or_in_thread(
                is_long, lambda: [self._check_choice(call, choice) for choice in answer["choices"]]
            )
            reasons = [choice.get("finish_reason") for choice in answer["choices"]]
            note.finish_reason = "content_filter" if "content_filter" in reasons else next(iter(reasons), None)
            if self.with_text:
                note.answer = "\n".join(map(said, answer["choices"]))
        done = whole(answer)
        return done._replace(headers=done.headers + headers)

    def _check_choice(self, call: _Call, choice: dict[str, Any]) -> dict[str, Any]:
        verdict = self.moderator.check_output(said(choice), call.policy)
        call.note.add("output", verdict)
        if verdict.action == "allow":
            return choice
        changed = with_content(choice, verdict.text) if verdict.action == "mask" else None
        if changed:
            return changed
        refusal = call.policy.refusal(bodies.text_of(bodies.messages_of(call.body)))
        message = {"message": {"role": "assistant"}} if "message" in choice else {}
        blocked = with_content({**choice, **message}, refusal)
        assert blocked
        return {**blocked, "finish_reason": "content_filter"}

    def _account(self, call: _Call, events: EventFilter) -> None:
        """Note what a stream said and used; where the engine did not come to tell, its chunks are counted."""
        note, usage = call.note, events.usage or {}
        note.prompt_tokens = usage.get("prompt_tokens", call.prompt_tokens)
        note.completion_tokens = usage.get("completion_tokens", events.num_chunks)
        call.used_tokens = usage.get("total_tokens", call.prompt_tokens + events.num_chunks)
        note.finish_reason = "error" if events.error else events.finish_reason
        for verdict in events.verdicts:
            note.add("output", verdict)
        if self.with_text:
            note.answer = "".join(events.sent)


def model_not_found(model: str) -> Answer:
    """404, the same for a model that is not there and for one that the key may not use."""
    return openai_error(404, f"The model {model[:200]!r} does not exist.", code="model_not_found", param="model")


async def _send_stream(events: EventFilter, first: Any, rest: AsyncGenerator[Any, None], send: Send) -> None:
    """The events that pass, and the end; an engine that dies on the way is told before it."""
    end = DONE
    batch = first
    try:
        while batch is not None and not events.is_done and not events.error:
            if ready := events.push(batch):
                await send({"type": "http.response.body", "body": ready, "more_body": True})
            batch = None if events.is_done or events.error else await anext(rest, None)
    except Refused as refused:
        events.error = json.loads(refused.answer.body)["error"]
        end = stream_error(events.error["message"], events.error["type"], events.error["code"]) + DONE
    await send({"type": "http.response.body", "body": end, "more_body": False})


async def _send_refusal(call: _Call, headers: Headers, send: Send) -> None:
    """A completion that says no; embeddings have no place for words and get an error."""
    call.note.finish_reason = "content_filter"
    if call.operation not in GENERATES:
        raise bodies.bad_request("The input holds content that is not allowed here.", code="content_filter")
    is_chat, is_stream = call.operation == "chat", bool(call.body.get("stream"))
    refusal = call.policy.refusal(bodies.text_of(bodies.messages_of(call.body)))
    kind = ("chat.completion.chunk" if is_stream else "chat.completion") if is_chat else "text_completion"
    head: dict[str, Any] = {
        "id": f"refusal-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": call.note.model,
    }
    said_so: dict[str, Any] = {"role": "assistant", "content": refusal}
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": None if is_stream else "content_filter"}
    choice |= {"delta" if is_stream else "message": said_so} if is_chat else {"text": refusal}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    if not is_stream:
        done = whole({**head, "choices": [choice], "usage": usage})
        await send_answer(send, done._replace(headers=done.headers + headers))
        return
    tail = event({**head, "choices": [], "usage": usage}) if bodies.ask_for_usage(call.body) else b""
    body = event({**head, "choices": [choice]}) + final_chunk("content_filter", head) + tail + DONE
    await send_answer(send, Answer(200, STREAM_HEADERS + headers, body))


async def _now_or_in_thread(is_long: bool, work: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(work) if is_long else work()
