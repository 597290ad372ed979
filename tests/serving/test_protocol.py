import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving import protocol
from app.serving.quota import Balance, Refusal

CONTEXT = 2048


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 429, 500, 503, 504])
def test_an_error_has_openais_form(status: int) -> None:
    answer = protocol.openai_error(status, "说明", code="why", param="messages")
    assert answer.status == status
    assert dict(answer.headers)[b"content-length"] == b"%d" % len(answer.body)
    error = json.loads(answer.body)["error"]
    assert error == {"message": "说明", "type": protocol.KINDS[status], "param": "messages", "code": "why"}


def test_the_official_client_understands_the_errors() -> None:
    import httpx
    import openai

    refusal = Refusal(1.5, "tokens", {"tokens": Balance(100, 7, 55.8)})
    answers = [protocol.openai_error(404, "no such model", code="model_not_found"), protocol.too_many_requests(refusal)]
    caught = []
    for answer in answers:
        respond = httpx.MockTransport(lambda _, a=answer: httpx.Response(a.status, headers=a.headers, content=a.body))
        client = openai.OpenAI(
            api_key="k", base_url="http://x/v1", http_client=httpx.Client(transport=respond), max_retries=0
        )
        with pytest.raises(openai.APIStatusError) as raised:
            client.models.list()
        caught.append(raised.value)
    assert isinstance(caught[0], openai.NotFoundError)
    assert caught[0].code == "model_not_found"
    assert isinstance(caught[1], openai.RateLimitError)
    assert (caught[1].code, caught[1].type) == ("rate_limit_exceeded", "tokens")
    assert dict(caught[1].response.headers) | {
        "retry-after": "2",
        "retry-after-ms": "1500",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "55.8s",
    } == dict(caught[1].response.headers)


def test_a_request_above_the_limit_is_not_to_be_tried_again() -> None:
    headers = dict(protocol.too_many_requests(Refusal(math.inf, "tokens")).headers)
    assert b"retry-after" not in headers
    assert headers[b"x-should-retry"] == b"false"


@pytest.mark.parametrize("which", ["requests", "tokens", "concurrent_requests", "queue", "deadline"])
def test_retry_after_is_whole_seconds_and_never_none(which: Any) -> None:
    headers = dict(protocol.too_many_requests(Refusal(0.02, which)).headers)
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (b"1", b"20")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0195, "20ms"),
        (0.0001, "1ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9991, "1m0s"),
        (360, "6m0s"),
        (72.5, "1m12.5s"),
        (3600, "1h0m0s"),
        (86399.999, "23h59m59.999s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert protocol.format_duration(seconds) == text


@given(st.floats(0, 1e6))
def test_no_duration_is_shorter_than_meant(seconds: float) -> None:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    text = protocol.format_duration(seconds).replace("ms", "~")
    total, number = 0.0, ""
    for character in text:
        if character in "hms~":
            total += float(number) * units["ms" if character == "~" else character]
            number = ""
        else:
            number += character
    assert number == ""
    assert seconds - 1e-5 <= total <= seconds + 0.0011


def test_a_stream_ends_as_the_client_expects() -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletionChunk

    like = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [1, 2]}
    chunk = ChatCompletionChunk.model_validate(event(protocol.final_chunk("content_filter", like, index=1)))
    assert (chunk.id, chunk.model, chunk.choices[0].index) == ("chatcmpl-1", "m", 1)
    assert chunk.choices[0].finish_reason == "content_filter"
    assert chunk.choices[0].delta.content is None
    like = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m"}
    completion = Completion.model_validate(event(protocol.final_chunk("content_filter", like)))
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("", "content_filter")


@given(st.text(st.characters(codec="utf-8", exclude_categories=()) | st.sampled_from("\u0085\u2028\u2029\\\n")))
def test_an_event_is_one_line_by_any_count(text: str) -> None:
    written = protocol.event({"text": text})
    assert len(written.decode().splitlines()) == 2
    assert event(written) == {"text": text}


def test_a_stream_error_raises_in_the_client() -> None:
    import httpx
    import openai

    content = protocol.stream_error("the replica died", code="engine_lost") + protocol.DONE
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    )
    client = openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=httpx.Client(transport=transport))
    stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
    with pytest.raises(openai.APIError, match="the replica died"):
        list(stream)


def event(chunk: bytes) -> dict[str, Any]:
    """The JSON of a server-sent event."""
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    found: dict[str, Any] = json.loads(chunk[6:])
    return found


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [], "max_tokens": 100}, 100),
        ({"messages": [], "max_tokens": 100, "max_completion_tokens": 50, "n": 3}, 150),
        ({"messages": []}, CONTEXT),
        ({"messages": [], "max_tokens": 10**9, "n": 2}, 2 * CONTEXT),
        ({"messages": [], "max_tokens": 0}, 0),
        ({"messages": [], "max_tokens": "many", "n": None}, CONTEXT),
        ({"messages": [], "max_tokens": -1, "n": True}, CONTEXT),
        ({"prompt": "x"}, 16),
        ({"prompt": "x", "max_tokens": 5, "n": 2, "best_of": 4}, 20),
        ({"prompt": ["x", "y"], "max_tokens": 5}, 10),
        ({"prompt": [[1, 2], [3]], "max_tokens": 5}, 10),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ({"prompt": [], "max_tokens": 5}, 5),
        ({"prompt": None, "max_tokens": 5}, 5),
        ({"input": ["x", "y"]}, 0),
    ],
)
def test_requested_tokens(body: dict[str, Any], tokens: int) -> None:
    assert protocol.count_requested_tokens(body, CONTEXT) == tokens
