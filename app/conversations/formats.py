"""Conversations from jsonl records, in the layouts that data sets come in: OpenAI, ShareGPT, Alpaca, preference pairs.

Each becomes messages as OpenAI's chat API has them, in the form that the endpoint hands to the chat template: content
is text, arguments of tool calls are objects, tools carry all their fields. A record that cannot be read is an error.
It does not render; rendering.py does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function_call": "function_call",
}  # fmt: skip
_MARKS = {"preference": "chosen", "openai": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
_PASSED_ON = ("name", "tool_call_id")  # what templates read beside role and content
_REASONING = ("reasoning", "reasoning_content")  # one field by two names; the endpoint gives templates both


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools that they may call; `unscored` are the indices of answers that must not be learned."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unscored: frozenset[int] = frozenset()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the first answer."""
        roles = [message["role"] for message in self.messages]
        return self.messages[: roles.index("assistant")] if "assistant" in roles else self.messages


@dataclass(frozen=True)
class Preference:
    """Two answers to the same messages: the chosen one is the better."""

    chosen: Conversation
    rejected: Conversation


def detect(record: Mapping[str, Any]) -> str:
    """The name of the record's layout. Raises ValueError when it is none that is known."""
    for name, mark in _MARKS.items():
        if mark in record:
            return name
    known = ", ".join(f"{mark} ({name})" for name, mark in _MARKS.items())
    raise ValueError(f"keys {', '.join(map(repr, list(record)[:8])) or 'none'}; one of these is needed: {known}")


def read(record: Any, layout: str = "auto") -> Conversation | Preference:
    """The conversation, or the pair, of a record. Raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not a JSON object")
    layout = detect(record) if layout == "auto" else layout
    if _MARKS[layout] not in record:
        raise ValueError(f"no {_MARKS[layout]!r}, which the layout {layout} has")
    readers: dict[str, Callable[[Mapping[str, Any]], Conversation | Preference]] = {
        "openai": _openai, "sharegpt": _sharegpt, "alpaca": _alpaca, "preference": _preference,
    }  # fmt: skip
    return readers[layout](record)


def _openai(record: Mapping[str, Any]) -> Conversation:
    return _conversation(record["messages"], record.get("tools"))


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = _list(record["conversations"], "conversations")
    messages = [_turn(turn) for turn in turns]
    system = record.get("system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(messages, record.get("tools"))


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError("conversations: a turn needs 'from' and 'value'")
    role = ROLES.get(str(turn["from"]), "")
    if role != "function_call":
        return {**turn, "role": role or turn["from"], "content": turn["value"]}
    calls = _parsed(turn["value"], "conversations: a function_call")
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    answer = record.get("output")
    if not isinstance(answer, str):
        raise ValueError("output: an Alpaca record needs one, as text")
    given = record.get("input")
    question = f"{record['instruction']}\n\n{given}" if given else record["instruction"]
    messages: list[Message] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in _list(record.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("history: a list of [question, answer] pairs is needed")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(messages, None)


def _preference(record: Mapping[str, Any]) -> Preference:
    prompt: Any = record.get("messages", record.get("prompt", []))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = _list(prompt, "prompt")
    sides = []
    for name in ("chosen", "rejected"):
        answer = record.get(name)
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        elif isinstance(answer, dict):
            answer = [answer]
        answer = _list(answer, name)
        whole = answer if not turns or answer[: len(turns)] == turns else turns + answer
        sides.append(_last_answer_only(_conversation(whole, record.get("tools")), name))
    chosen, rejected = sides
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise ValueError("chosen and rejected: they must differ in the last answer alone")
    if chosen.messages == rejected.messages:
        raise ValueError("chosen and rejected: they are the same")
    return Preference(chosen, rejected)


def _last_answer_only(conversation: Conversation, name: str) -> Conversation:
    last = len(conversation.messages) - 1
    if conversation.messages[last]["role"] != "assistant":
        raise ValueError(f"{name}: it must end with an answer of the assistant")
    return Conversation(conversation.messages, conversation.tools, frozenset(range(last)))


def _conversation(messages: Any, tools: Any) -> Conversation:
    given = _list(messages, "messages")
    read_messages = tuple(_message(message, index) for index, message in enumerate(given))
    if not any(message["role"] == "assistant" for message in read_messages):
        raise ValueError("messages: there is no answer of the assistant")
    unscored = frozenset(index for index, message in enumerate(given) if message.get("weight") in (0, 0.0))
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else []
    return Conversation(read_messages, tuple(_tool(tool) for tool in _list(tools or [], "tools")), unscored)


def _message(given: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a {type(given).__name__}, not an object")
    role = ROLES.get(str(given.get("role")))
    if role is None or role == "function_call":
        raise ValueError(f"{where}.role: {given.get('role')!r} is not one of {', '.join(sorted(ROLES))}")
    message: Message = {"role": role, "content": _content(given.get("content"), where)}
    message |= {name: given[name] for name in _PASSED_ON if isinstance(given.get(name), str)}
    thoughts = next((given[name] for name in _REASONING if isinstance(given.get(name), str)), None)
    if role == "assistant" and thoughts is not None:
        message |= dict.fromkeys(_REASONING, thoughts)
    if role == "assistant" and given.get("tool_calls"):
        message["tool_calls"] = [_call(call, where) for call in _list(given["tool_calls"], f"{where}.tool_calls")]
    if not message["content"] and "tool_calls" not in message and role == "assistant":
        raise ValueError(f"{where}: an empty answer")
    return message


def _content(content: Any, where: str) -> str:
    """Text; parts of text are joined as the endpoint joins them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    given = _list(content, f"{where}.content")
    parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in given]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}.content: only text can be learned")
    return "\n".join(parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}.tool_calls: a call needs function.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}.tool_calls: arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.tool_calls: arguments of {function['name']} are no JSON object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(tool: Any) -> dict[str, Any]:
    """With the fields that the endpoint's schema fills in, in its order: templates print the whole object."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("tools: a tool needs function.name")
    fields = {name: function.get(name) for name in ("name", "description", "parameters")}
    strict = {"strict": function["strict"]} if isinstance(function.get("strict"), bool) else {}
    return {"type": "function", "function": {**fields, **strict}}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: a {type(value).__name__}, not a list")
    return value


def _parsed(text: Any, name: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{name}: not valid JSON") from None
