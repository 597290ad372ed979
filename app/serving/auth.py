"""API keys: a file of their digests, and the door that lets pass only requests that carry a key and a bounded body.

`KeyStore` reads the file, reads it again when it changes, and finds the key of a bearer token in constant time;
`ApiKeyMiddleware` is pure ASGI and leaves the key in `scope["state"]["key"]`. Keys are 256 random bits, which nobody
can guess, so plain SHA-256 keeps them: a slow hash only helps against guesses, and would cost at every request.
What a key may use and take is recorded here and enforced elsewhere: models by the gateway, limits by quota.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import AwareDatetime, Field

from app import storage
from app.config import Config, validate
from app.serving.config import Limits
from app.serving.protocol import Answer, AsgiApp, Message, Receive, Send, openai_error, send_answer

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between two looks at the file
TOKEN_BYTES = 32
PREFIX = "sk-"


class Key(Config):
    """One key, by its digest."""

    name: str = Field(min_length=1, description="whom it is for; the quota is counted and the audit log kept by it")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key")
    models: tuple[str, ...] = Field(("*",), description="models that it may use; * for all")
    limits: Limits = Field(default_factory=Limits, description="what it may take")
    policy: str = Field("default", description="content filter's policy for it")
    expires_at: AwareDatetime | None = Field(None, description="date with zone; absent for never")

    def may_use(self, model: str) -> bool:
        """Whether the model is on its list."""
        return "*" in self.models or model in self.models

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is up."""
        return self.expires_at is not None and self.expires_at <= now


class _KeyFile(Config):
    keys: tuple[Key, ...] = ()


def digest(token: str) -> str:
    """SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def keys_of_environment(variable: str) -> list[Key]:
    """The comma-separated keys in an environment variable: all named "default", without limits; maybe none."""
    tokens = [token.strip() for token in os.environ.get(variable, "").split(",") if token.strip()]
    return [Key(name="default", digest=digest(token)) for token in tokens]


def open_keys(path: str, variable: str) -> KeyStore:
    """The keys of the file, if a path is given, and of the environment. Raises ValueError when there can be none."""
    fixed = keys_of_environment(variable)
    if not path and not fixed:
        raise ValueError(
            f"no API key: set {variable} in the environment of the cluster's processes before `ray start`, or keys_file"
        )
    return KeyStore(path, fixed)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, YAML or JSON: `keys:`, a list of `Key`. Raises ValueError for anything wrong with it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"keys_file: {path}: {error.strerror}; make it with jobs/manage_keys.py") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ValueError(f"keys_file: {path} has mode {mode:o}, open to other users: chmod 600, or 440 if mounted")
    try:
        values = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"keys_file: {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"keys_file: {path} must hold `keys:` and a list, not {type(values).__name__}")
    try:
        keys = validate(_KeyFile, values).keys
    except ValueError as error:
        raise ValueError(f"keys_file: {path}: {error}") from None
    for what in ("name", "digest"):
        counts = Counter(getattr(key, what) for key in keys)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise ValueError(f"keys_file: {path}: {what} {', '.join(twice)} is there twice")
    return keys


class KeyStore:
    """The keys of a file, kept up to date, and fixed ones beside them.

    A changed file counts within CHECK_SECONDS; a broken or missing one leaves the keys as they were and is logged.
    Pickled, it is its path and the fixed keys: the other process reads the file there.
    """

    def __init__(self, path: str = "", fixed: Sequence[Key] = ()) -> None:
        """Raises ValueError when the file is wrong."""
        self._path = Path(path) if path else None
        self._fixed = tuple(fixed)
        self._stamp: tuple[int, ...] = ()
        self._checked_at = time.monotonic()
        self._keys = self._fixed
        if self._path:
            self._stamp = _stamp(self._path)
            self._keys += read_keys(self._path)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeyStore, (str(self._path or ""), self._fixed)

    def find(self, token: str) -> Key | None:
        """The key, expired or not; takes as long for a wrong token as for a right one."""
        self._reload_if_changed()
        given = digest(token)
        found = None
        for key in self._keys:  # all of them are compared
            if hmac.compare_digest(given, key.digest):
                found = key
        return found

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._fixed + read_keys(self._path)
        except ValueError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.info("%s: %d keys read", self._path, len(self._keys) - len(self._fixed))


def create_key(path: Path, name: str, settings: Mapping[str, Any]) -> str:
    """Add a key to the file and return it: it is kept nowhere. Raises ValueError if the name is taken."""
    with _locked(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise ValueError(f"name: {path} already has a key named {name}; revoke it first")
        token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        _write_keys(path, [*keys, Key(name=name, digest=digest(token), **settings)])
    return token


def revoke_key(path: Path, name: str) -> None:
    """Remove a key from the file. Raises ValueError if it is not there."""
    with _locked(path):
        keys = read_keys(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ValueError(f"name: {path} has no key named {name}; it has {known}")
        _write_keys(path, left)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def _write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Whole or not at all; mode and owner stay as they were."""
    path = path.resolve()  # the file that a link leads to
    values = {"keys": [key.model_dump(mode="json", exclude_defaults=True) for key in keys]}
    before = path.stat() if path.exists() else None
    with storage.open_atomic(str(path)) as target:
        os.fchmod(target.fileno(), stat.S_IMODE(before.st_mode) if before else 0o600)
        if before:
            os.fchown(target.fileno(), before.st_uid, before.st_gid)
        target.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_WRONG = "Incorrect or missing API key. Send it as 'Authorization: Bearer <key>'."
_EXPIRED = "This API key has expired. Ask for a new one."


class ApiKeyMiddleware:
    """Passes a request with a valid key and a body of at most `max_body_bytes`, read whole; refuses any other.

    GET of a path in `open_paths` needs no key.
    """

    def __init__(
        self, app: AsgiApp, keys: KeyStore, max_body_bytes: int = 4 << 20, open_paths: Sequence[str] = ()
    ) -> None:
        self.app = app
        self.keys = keys
        self.max_body_bytes = max_body_bytes
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        key = self._key_of(scope)
        if isinstance(key, Key) or self._is_open(scope):
            state = {**scope.get("state", {}), "key": key if isinstance(key, Key) else None}
            await self._pass({**scope, "state": state}, receive, send)
        elif scope["type"] == "http":
            await send_answer(send, key)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _key_of(self, scope: Message) -> Key | Answer:
        """The key, or the answer to a request without a valid one."""
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        kind, _, token = header.partition(" ")
        key = self.keys.find(token.strip())
        if key is None or kind.lower() != "bearer":
            return openai_error(401, _WRONG, code="invalid_api_key")
        if key.is_expired(datetime.now(UTC)):
            return openai_error(401, _EXPIRED, code="expired_api_key")
        return key

    def _is_open(self, scope: Message) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope.get("method") in ("GET", "HEAD") and path in self.open_paths

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        body = None
        if _declared_length(scope) <= self.max_body_bytes:
            body = await _read_body(receive, self.max_body_bytes)
        if body is None:
            message = f"The request body is longer than {self.max_body_bytes} bytes."
            await send_answer(send, openai_error(413, message, code="request_too_large"))
            return
        await self.app(scope, _Replay(body, receive), send)


class _Replay:
    """`receive` of a request whose body was read already."""

    def __init__(self, first: Message, receive: Receive) -> None:
        self._first: Message | None = first
        self._receive = receive

    async def __call__(self) -> Message:
        first, self._first = self._first, None
        return await self._receive() if first is None else first


def _declared_length(scope: Message) -> int:
    given = dict(scope["headers"]).get(b"content-length", b"")
    return int(given) if given.isdigit() else 0


async def _read_body(receive: Receive, max_bytes: int) -> Message | None:
    """The body in one message, or a disconnect; None if it is too long."""
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > max_bytes:
            return None
        if not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}
