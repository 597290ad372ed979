"""Request bodies: read them strictly, see how large they are, find and replace the texts that a model would read.

Whether fields and values are right is the engine's schema's to say; here is refused what must not come so far:
what is no JSON object, numbers that JSON does not have, more answers than one request may ask for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.serving.moderation import texts_of
from app.serving.protocol import Answer, openai_error

MAX_SEQUENCES = 128  # answers that one request may ask for, over all its prompts; OpenAI's limit


_TEMPLATE = ("tools", "documents", "chat_template_kwargs", "suffix")  # fields that a model may come to read
_PLAIN = ("role", "content")  # of a message


_MANY_DIGITS = re.compile(rb"\d{19}")


class Refused(Exception):  # noqa: N818  # an answer, not a fault
    """The request is answered with this instead."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)  # pickled, it is made again of this
        self.answer = answer

    def __str__(self) -> str:
        return f"status {self.answer.status}"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """400."""
    return Refused(openai_error(400, message, code=code, param=param))


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object. Raises Refused."""
    try:
        parse_int = _int64 if _MANY_DIGITS.search(raw) else None  # a prompt may be a million small ones
        body = json.loads(raw.decode(), parse_constant=_no_number, parse_float=_finite, parse_int=parse_int)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise bad_request(f"The body must be a JSON object, not {type(body).__name__}.")
    if not isinstance(body.get("stream"), bool | None):
        raise bad_request("stream must be true or false.", "stream")
    return body


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _int64(digits: str) -> int:
    if not -(1 << 63) <= (number := int(digits)) < 1 << 63:
        raise ValueError(f"{digits[:20]} does not fit 64 bits")  # the engine's messages hold no more
    return number


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return number


def num_choices(body: Mapping[str, Any]) -> int:
    """Answers that the request asks for. Raises Refused when they are too many, or not a number."""
    each = 1
    for name in ("n", "best_of"):
        given = body.get(name)
        if given is None:
            continue
        if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MAX_SEQUENCES:
            raise bad_request(f"{name} must be an integer from 1 to {MAX_SEQUENCES}.", name)
        each = max(each, given) if name == "best_of" else given
    total = each * max(1, len(_prompts(body)))
    if total > MAX_SEQUENCES:
        raise bad_request(f"{total} answers in one request; at most {MAX_SEQUENCES} are possible.", "prompt")
    return total


def size_tokens(body: Mapping[str, Any], bytes_per_token: int) -> int:
    """Tokens that the body's prompts may have: ids count one each, texts by their bytes."""
    prompts = [*_prompts(body), *(m.get("content") for m in _list(body, "messages") if isinstance(m, Mapping))]
    return sum(_size(prompt, bytes_per_token) for prompt in prompts)


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the model reads, as messages; a prompt of token ids is none."""
    if "messages" in body:
        return [message for message in _list(body, "messages") if isinstance(message, dict)]
    return [{"content": prompt} for prompt in _prompts(body) if isinstance(prompt, str)]


def refuse_without_role(body: Mapping[str, Any]) -> None:
    """Raises Refused for a message of nobody; the engine's schema takes some, of another format, and fails on them."""
    for index, message in enumerate(_list(body, "messages")):
        if isinstance(message, Mapping) and not isinstance(message.get("role"), str):
            raise bad_request(f"messages[{index}].role must be a string.", "messages")


def more_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What else a chat template may read, as messages in JSON: tools, documents, names, earlier tool calls."""
    rests = [{name: value for name, value in m.items() if name not in _PLAIN} for m in messages_of(body)]
    found = [*(body[name] for name in _TEMPLATE if body.get(name)), *filter(None, rests)]
    return [{"content": json.dumps(value, ensure_ascii=False)} for value in found]


def with_messages(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body with these in the place of all its `messages_of`, or of its prompts of token ids."""
    if "messages" in body:
        return {**body, "messages": list(messages)}
    texts = [message["content"] for message in messages]
    name = "input" if "input" in body else "prompt"
    return {**body, name: texts[0] if len(texts) == 1 else texts}


def token_prompts(body: Mapping[str, Any]) -> list[list[int]]:
    """The prompts that are given as token ids."""
    return [prompt for prompt in _prompts(body) if isinstance(prompt, list)]


def text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Their texts, a line each."""
    return "\n".join(text for message in messages for text in texts_of(message))


def ask_for_usage(body: dict[str, Any]) -> bool:
    """Have a stream end with its usage; whether the client asked for it as well."""
    given = body.get("stream_options")
    if not body.get("stream") or not isinstance(given, dict | None):
        return False  # the engine refuses the latter
    body["stream_options"] = {**(given or {}), "include_usage": True}
    return bool(given and given.get("include_usage"))


def _prompts(body: Mapping[str, Any]) -> list[Any]:
    """Each prompt or input: a text, or a list of token ids."""
    given = body.get("prompt", body.get("input"))
    if isinstance(given, list):
        return given if given and not isinstance(given[0], int) else [given]
    return [] if given is None else [given]


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    given = body.get(name)
    return given if isinstance(given, list) else []


def _size(content: Any, bytes_per_token: int) -> int:
    if isinstance(content, str):
        return len(content.encode("utf-8", "replace")) // bytes_per_token + 1
    if not isinstance(content, list):
        return 0
    if content and isinstance(content[0], int):
        return len(content)
    return sum(_size(part.get("text"), bytes_per_token) for part in content if isinstance(part, Mapping))
