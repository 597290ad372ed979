"""A streamed answer's events on their way from the engine to the client, through the content filter.

The engine sends server-sent events in batches. Each is parsed once for its text and passed on as it came, in whole, as
soon as the filter has let all of its text pass; only masked text, and the end before a forbidden phrase, is written
anew. Log probabilities and token ids go with their text, or not at all. It knows neither the engine nor HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from app.serving.moderation import Moderator, Verdict
from app.serving.policy import Policy
from app.serving.protocol import event, final_chunk, in_one_line
from app.serving.streaming import HeldBack

PREFIX = "data: "
END = "[DONE]"
SAID = ("reasoning_content", "reasoning", "refusal")  # texts of a message beside its content, as clients show them


class _Chunk(NamedTuple):
    raw: str
    value: dict[str, Any]  # with one choice
    text: str

    @property
    def choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self.value["choices"][0]
        return choice


@dataclass
class _Choice:
    """One of the answers in a stream."""

    filter: HeldBack
    waiting: list[_Chunk] = field(default_factory=list)  # received, not sent
    released: str = ""  # passed the filter; of the first that wait, not sent as one is sent in whole
    is_exact: bool = True  # what waits and what passes are the same text: nothing in it was masked
    is_done: bool = False
    is_cut: bool = False


class EventFilter:
    """One streamed answer: push what the engine sends, send what push returns, stop when it `is_done`."""

    def __init__(self, moderator: Moderator, policy: Policy, wants_usage: bool = False, num_choices: int = 1) -> None:
        self.usage: Mapping[str, Any] | None = None
        self.error: Mapping[str, Any] | None = None  # the engine's own, in the midst of the stream
        self.num_chunks = 0  # with text; an engine puts one token or more into each
        self.finish_reason: str | None = None
        self.verdicts: list[Verdict] = []
        self.sent: list[str] = []  # texts
        self._moderator, self._policy = moderator, policy
        self._wants_usage, self._num_choices = wants_usage, num_choices
        self._choices: dict[int, _Choice] = {}

    @property
    def is_done(self) -> bool:
        """Whether nothing more can be sent, as every choice was cut."""
        return sum(choice.is_cut for choice in self._choices.values()) >= self._num_choices

    def push(self, events: Sequence[str]) -> bytes:
        """What may be sent now that these have come in."""
        out: list[bytes] = []
        new: dict[int, list[_Chunk]] = {}
        for raw in events:
            payload = raw.removeprefix(PREFIX).strip()
            if payload == END or not payload:
                continue
            value = json.loads(payload)
            if value.get("choices"):
                for chunk in _chunks(raw, value):
                    self.num_chunks += bool(chunk.text)
                    new.setdefault(chunk.choice["index"], []).append(chunk)
            elif "error" in value:
                self.error = value["error"]
                out += [self._pass(index, chunks) for index, chunks in new.items()]
                new.clear()
                out.append(raw.encode())
            else:
                self.usage = value.get("usage")
                out += [self._pass(index, chunks) for index, chunks in new.items()]
                new.clear()
                out += [raw.encode()] if self._wants_usage else []
        out += [self._pass(index, chunks) for index, chunks in new.items()]
        return in_one_line(b"".join(out))

    def _pass(self, index: int, chunks: list[_Chunk]) -> bytes:
        """What may be sent of one choice."""
        choice = self._choices.setdefault(index, _Choice(HeldBack(self._moderator, self._policy)))
        if choice.is_done:
            return b""
        choice.waiting += chunks
        reason = chunks[-1].choice.get("finish_reason")
        choice.released += choice.filter.push("".join(chunk.text for chunk in chunks))
        if reason:
            choice.released += choice.filter.finish()
        whole = "".join(chunk.text for chunk in choice.waiting)
        choice.is_exact = choice.is_exact and whole.startswith(choice.released)
        if choice.filter.blocked:
            return self._cut(choice, index)
        choice.is_done, self.finish_reason = bool(reason), reason or self.finish_reason
        if choice.is_exact:
            return self._send_whole(choice)
        if any(_says_more(chunk.choice) for chunk in choice.waiting):  # no place to write a masked text to
            return self._cut(choice, index)
        return self._send_anew(choice)

    def _send_whole(self, choice: _Choice) -> bytes:
        count, length = 0, 0
        for chunk in choice.waiting:
            if length + len(chunk.text) > len(choice.released):
                break
            count, length = count + 1, length + len(chunk.text)
        sent, choice.waiting = choice.waiting[:count], choice.waiting[count:]
        if length:
            self.sent.append(choice.released[:length])
        choice.released = choice.released[length:]
        return "".join(chunk.raw for chunk in sent).encode("utf-8", "replace")

    def _send_anew(self, choice: _Choice) -> bytes:
        last, text = choice.waiting[-1], choice.released
        choice.waiting, choice.released = [], ""
        choice.is_exact = not choice.filter.held
        if not self.verdicts:
            self.verdicts.append(Verdict("mask", ("personal_data",)))
        if not text and not last.choice.get("finish_reason"):
            return b""
        self.sent.append(text)
        return event(_with_text(last.value, text))

    def _cut(self, choice: _Choice, index: int) -> bytes:
        """The last that may be sent, and the end."""
        choice.is_done = choice.is_cut = True
        self.finish_reason = "content_filter"
        self.verdicts.append(choice.filter.blocked or Verdict("block", ("masked_beside_content",)))
        sent = self._send_whole(choice) if choice.is_exact else b""
        template, text = choice.waiting[0] if choice.waiting else None, choice.released
        if template is None:
            return sent
        if text and not _says_more(template.choice):
            self.sent.append(text)
            sent += event(_with_text(template.value, text, is_last=False))
        choice.waiting = []
        return sent + final_chunk("content_filter", template.value, index)


def _chunks(raw: str, value: dict[str, Any]) -> list[_Chunk]:
    """One for each choice; there is hardly ever more than one."""
    choices = value["choices"]
    if len(choices) == 1:
        return [_Chunk(raw, value, said(choices[0]))]
    parts = [value | {"choices": [choice]} for choice in choices]
    return [_Chunk(event(part).decode(), part, said(part["choices"][0])) for part in parts]


def said(choice: Mapping[str, Any]) -> str:
    """All text that a choice, of a stream or not, brings to the client."""
    message = choice.get("delta") or choice.get("message")
    if message is None:
        return choice.get("text") or ""
    content: str = message.get("content") or ""
    if content and len(message) == 1:
        return content
    more = [message[name] for name in SAID if message.get(name)]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        more += [function[name] for name in ("name", "arguments") if function.get(name)]
    return "".join([*more, content])


def _says_more(choice: Mapping[str, Any]) -> bool:
    message = choice.get("delta") or choice.get("message") or {}
    return bool(message.get("tool_calls")) or any(message.get(name) for name in SAID)


def with_content(choice: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """A whole answer's choice with another text, without what would tell the old one; None if there is no place."""
    if _says_more(choice):
        return None
    return _replaced(choice, text)


def _with_text(value: Mapping[str, Any], text: str, is_last: bool = True) -> dict[str, Any]:
    (choice,) = value["choices"]
    changed = _replaced(choice, text)
    return {**value, "choices": [changed if is_last else {**changed, "finish_reason": None}]}


def _replaced(choice: Mapping[str, Any], text: str) -> dict[str, Any]:
    changed = {**choice, "logprobs": None}
    for name in ("token_ids", "prompt_token_ids", "routed_experts"):
        changed.pop(name, None)
    for name in ("delta", "message"):
        if isinstance(choice.get(name), Mapping):
            return {**changed, name: {**choice[name], "content": text}}
    return {**changed, "text": text}
