"""OpenAI's forms: errors, rate-limit headers, the pieces that end a stream, how many tokens a request asks for.

`openai_error` gives status, headers and body; `send_answer` sends them over ASGI. Headers are pairs of bytes.
The schema of requests and answers is the engine's; nothing here checks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from app.serving.quota import Refusal, Standing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LINE_ENDS = "\u0085\u2028\u2029"  # beside those that JSON escapes
DONE = b"data: [DONE]\n\n"
COMPLETION_TOKENS = 16  # what /v1/completions generates when max_tokens is not given
KINDS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


def openai_error(
    status: int, message: str, kind: str = "", code: str | None = None, param: str | None = None
) -> Answer:
    """An error as OpenAI writes it; without `kind` the usual type of that status. `status` must be one of KINDS."""
    error = {"message": message, "type": kind or KINDS[status], "param": param, "code": code}
    body = _json({"error": error})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return Answer(status, headers, body)


def too_many_requests(refusal: Refusal) -> Answer:
    """429 with the reason, when to come again, and where the key stands.

    A request that alone is above the limit has no such time: clients are told not to try it again.
    """
    seconds = refusal.retry_after_seconds
    if math.isinf(seconds):
        message = f"Request too large: it alone is above this key's limit of {refusal.which} per minute."
        headers: Headers = [(b"x-should-retry", b"false")]
    else:
        message = f"{_REASONS[refusal.which]} Try again in {format_duration(seconds)}."
        headers = [
            (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
            (b"retry-after-ms", b"%d" % max(1, math.ceil(1000 * seconds))),
        ]
    answer = openai_error(429, message, refusal.which, "rate_limit_exceeded")
    return answer._replace(headers=answer.headers + headers + rate_limit_headers(refusal.standing))


_REASONS = {
    "requests": "Rate limit reached: requests per minute.",
    "tokens": "Rate limit reached: tokens per minute.",
    "concurrent_requests": "Rate limit reached: concurrent requests.",
    "queue": "The model is busy and its queue is full.",
    "deadline": "The model is busy; the request waited too long for its turn.",
}


def rate_limit_headers(standing: Standing | None) -> Headers:
    """`x-ratelimit-limit-requests` and so on, for what the key is limited in."""
    headers: Headers = []
    for what, balance in standing.items() if standing else ():
        headers += [
            (f"x-ratelimit-limit-{what}".encode(), b"%d" % balance.limit),
            (f"x-ratelimit-remaining-{what}".encode(), b"%d" % balance.remaining),
            (f"x-ratelimit-reset-{what}".encode(), format_duration(balance.reset_seconds).encode()),
        ]
    return headers


def format_duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `1s`, `8.64s`, `6m0s`, `1h0m0s`; rounded up to milliseconds."""
    milliseconds = math.ceil(round(1000 * seconds, 3))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    ahead = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{ahead}{rest / 1000:g}s"


def stream_error(message: str, kind: str = "server_error", code: str | None = None) -> bytes:
    """The event that tells a client within a stream, whose status was sent long ago, that it failed."""
    return event({"error": {"message": message, "type": kind, "param": None, "code": code}})


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + in_one_line(_json(value)) + b"\n\n"


def in_one_line(events: bytes) -> bytes:
    """The same JSON without the characters that end a line for some clients, httpx's iter_lines for one."""
    for character in LINE_ENDS:
        events = events.replace(character.encode(), b"\\u%04x" % ord(character))
    return events


def final_chunk(finish_reason: str, like: Mapping[str, Any], index: int = 0) -> bytes:
    """The event that ends choice `index` of a stream; `like` is any chunk of that stream, chat's or completions'."""
    names = ("id", "object", "created", "model", "system_fingerprint")
    is_chat = like.get("object") != "text_completion"
    nothing: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    choice = {"index": index, **nothing, "logprobs": None, "finish_reason": finish_reason}
    chunk = {name: like[name] for name in names if name in like} | {"choices": [choice]}
    return event(chunk)


def count_requested_tokens(body: Mapping[str, Any], context_tokens: int) -> int:
    """The most tokens that may be generated for the request, over all its choices; none for embeddings.

    An absent, absurd or too long max_tokens counts as what the engine would allow at most, `context_tokens` a choice:
    whether it is an error is the engine's to say.
    """
    is_chat = "messages" in body
    if not is_chat and "prompt" not in body:
        return 0
    given = _count(body.get("max_completion_tokens")) if is_chat else None
    given = _count(body.get("max_tokens")) if given is None else given
    default = context_tokens if is_chat else COMPLETION_TOKENS
    each = min(default if given is None else given, context_tokens)
    num_choices = max(_count(body.get("n")) or 1, 0 if is_chat else _count(body.get("best_of")) or 1)
    return each * num_choices * (1 if is_chat else _num_prompts(body["prompt"]))


def whole(value: Any) -> Answer:
    """A successful answer in JSON."""
    body = _json(value)
    return Answer(200, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))], body)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send a whole response over ASGI."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _num_prompts(prompt: Any) -> int:
    """A list of texts or of token lists is a batch; a text or a list of tokens is one prompt."""
    is_batch = isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and not _is_token(prompt[0])
    return len(prompt) if is_batch else 1


def _is_token(value: Any) -> bool:
    return isinstance(value, int)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
