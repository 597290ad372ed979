"""API keys at the door: a pure ASGI middleware that answers 401 in OpenAI's form to a request without a valid key.

Keys are compared as SHA-256 digests in constant time; the keys themselves are kept nowhere. Responses pass untouched,
so streaming costs nothing. It does not meter or limit.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


def read_key_digests(variable: str) -> list[bytes]:
    """Digests of the comma-separated keys in an environment variable. Raises ValueError when there is none."""
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ValueError(f"no API key: set {variable} in the environment of the cluster's processes before `ray start`")
    return [digest(key) for key in keys]


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def is_known(key: str, digests: Sequence[bytes]) -> bool:
    """Whether it is one of the keys; takes as long for a wrong key as for a right one."""
    given = digest(key)
    matches = [hmac.compare_digest(given, known) for known in digests]  # all of them are compared
    return any(matches)


class ApiKeyMiddleware:
    """Lets a request pass that carries `Authorization: Bearer <key>`; refuses any other."""

    def __init__(self, app: AsgiApp, digests: Sequence[bytes]) -> None:
        self.app = app
        self.digests = digests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may_pass(self, scope: Message) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        kind, _, key = header.partition(" ")
        return kind.lower() == "bearer" and is_known(key.strip(), self.digests)


async def _refuse(send: Send) -> None:
    error = {
        "message": "Incorrect or missing API key. Send it as 'Authorization: Bearer <key>'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
