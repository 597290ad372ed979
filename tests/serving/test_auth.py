import asyncio
import json
from typing import Any

import pytest

from app.serving.auth import ApiKeyMiddleware, Message, Receive, Send, digest, is_known, read_key_digests


async def inner(scope: Message, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def call(scope: dict[str, Any]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    app = ApiKeyMiddleware(inner, [digest("right"), digest("also right")])
    asyncio.run(app({"type": "http", "path": "/v1/models", "headers": [], **scope}, receive, send))
    return sent


@pytest.mark.parametrize("header", [b"Bearer right", b"bearer also right", b"Bearer  right "])
def test_a_right_key_passes(header: bytes) -> None:
    assert call({"headers": [(b"authorization", header)]})[0]["status"] == 200


@pytest.mark.parametrize(
    "header", [b"Bearer wrong", b"Bearer righ", b"Bearer ", b"right", b"Basic right", b"\xff\xfe", b""]
)
def test_any_other_is_refused_in_openais_form(header: bytes) -> None:
    start, body = call({"headers": [(b"authorization", header)]})
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/chat/completions"])
def test_no_path_is_open(path: str) -> None:
    assert call({"path": path})[0]["status"] == 401


def test_a_websocket_is_closed_and_lifespan_passes() -> None:
    assert call({"type": "websocket"}) == [{"type": "websocket.close", "code": 1008}]
    assert call({"type": "lifespan"})[0]["status"] == 200


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", " one, two ,,")
    digests = read_key_digests("SOME_KEYS")
    assert is_known("one", digests)
    assert is_known("two", digests)
    assert not is_known("", digests)
    monkeypatch.setenv("SOME_KEYS", " , ")
    with pytest.raises(ValueError, match="set SOME_KEYS in the environment"):
        read_key_digests("SOME_KEYS")
