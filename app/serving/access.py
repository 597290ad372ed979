"""The endpoint as an ASGI application: what answers each path, and what is written down of each request.

`Recorder` is outermost: it makes one audit record of every request but the open pages, and answers 500 for what nobody
foresaw. `Routes` is innermost: the chat page, health, models and lineage itself, all else through the pipeline, which
ends when the client has gone. Between the two stands ApiKeyMiddleware.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from app.serving.audit import AuditRecord
from app.serving.auth import Key
from app.serving.pipeline import OPERATIONS, Note, Pipeline, model_not_found
from app.serving.protocol import Answer, AsgiApp, Message, Receive, Send, openai_error, send_answer, whole

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/health", "/ready")
CLIENT_GONE = 499  # as nginx writes it: no status was sent
MODELS = "/v1/models"
PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
]
_PAGE = Path(__file__).parent / "chat.html"


class Recorder:
    """Records each request when it has ended."""

    def __init__(self, app: AsgiApp, record: Callable[[AuditRecord], None], version_of: Callable[[str], str]) -> None:
        """`version_of` tells the digest behind a model's name."""
        self._app = app
        self._record = record
        self._version_of = version_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note, status = Note(), CLIENT_GONE

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = {**scope.get("state", {}), "note": note}
        try:
            await self._app({**scope, "state": state}, receive, watch)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if status != CLIENT_GONE:
                raise  # too late for another answer
            await send_answer(watch, openai_error(500, "The server failed to answer; its log says why."))
        finally:
            if path_of(scope) not in OPEN_PATHS:
                self._record(self._of(scope, note, status))

    def _of(self, scope: Message, note: Note, status: int) -> AuditRecord:
        headers = dict(scope["headers"])
        first = note.first_token_at
        return AuditRecord(
            request_id=headers.get(b"x-request-id", b"").decode("latin-1"),
            key_name=note.key_name,
            path=path_of(scope),
            status=status,
            latency_seconds=round(time.monotonic() - note.began_at, 6),
            model=note.model,
            model_version=self._version_of(note.served) if note.served else None,
            prompt_tokens=note.prompt_tokens,
            completion_tokens=note.completion_tokens,
            time_to_first_token_seconds=None if first is None else round(first - note.began_at, 6),
            finish_reason=note.finish_reason,
            is_stream=note.is_stream,
            verdicts=note.verdicts,
            prompt=note.prompt,
            answer=note.answer,
        )


async def _always_ready() -> bool:
    return True


@dataclass(frozen=True)
class Routes:
    """What each path answers. `models` is OpenAI's card of each, by id."""

    pipeline: Pipeline
    models: Mapping[str, Mapping[str, Any]]
    lineage: Mapping[str, Any]
    close: Callable[[], None] = lambda: None
    is_ready: Callable[[], Awaitable[bool]] = _always_ready

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        path, key, note = path_of(scope), scope["state"]["key"], scope["state"]["note"]
        note.key_name = key.name if key else None
        if scope["method"] == "POST" and path in OPERATIONS:
            assert key is not None
            message = await receive()
            if message["type"] == "http.request":
                answer = self.pipeline.answer(OPERATIONS[path], key, message.get("body", b""), note, send)
                await _until_disconnect(answer, receive)
            return
        await send_answer(send, await self._look_up(scope["method"], path, key))

    async def _look_up(self, method: str, path: str, key: Key | None) -> Answer:
        is_known = path in OPERATIONS or path in (*OPEN_PATHS, MODELS, "/v1/lineage") or path.startswith(f"{MODELS}/")
        if not is_known:
            return openai_error(404, f"There is nothing at {path[:200]}.", code="not_found")
        if method not in ("GET", "HEAD") or path in OPERATIONS:
            return openai_error(405, f"{method[:20]} is not possible here.", code="method_not_allowed")
        if path == "/":
            return Answer(200, PAGE_HEADERS, _PAGE.read_bytes())
        if path == "/health":  # of this process
            return whole({"status": "ok"})
        if path == "/ready":  # of the engines
            return whole({"status": "ready"}) if await self.is_ready() else openai_error(503, "No engine is up yet.")
        if path == "/v1/lineage":
            return whole(self.lineage)
        assert key is not None
        usable = {name: card for name, card in self.models.items() if key.may_use(name)}
        if path == MODELS:
            return whole({"object": "list", "data": list(usable.values())})
        name = unquote(path.removeprefix(f"{MODELS}/"))
        return whole(usable[name]) if name in usable else model_not_found(name)

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: nothing to start, files to close."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.pipeline.teller.drain()
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


def path_of(scope: Message) -> str:
    """The path below the application's own."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _until_disconnect(work: Any, receive: Receive) -> None:
    """Do the work; cancel it when the client goes."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
