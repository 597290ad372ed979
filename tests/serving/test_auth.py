import asyncio
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving import auth
from app.serving.auth import ApiKeyMiddleware, Key, KeyStore, create_key, digest, open_keys, read_keys, revoke_key
from app.serving.config import ServeConfig
from app.serving.protocol import Message, Receive, Send

ROOT = Path(__file__).resolve().parents[2]
MAX_BODY_BYTES = 10
CHUNK = {"type": "http.request", "body": b"", "more_body": False}


async def inner(scope: Message, receive: Receive, send: Send) -> None:
    """Answers with what it received and whose request it is."""
    parts = []
    while scope["type"] == "http":
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    key = scope.get("state", {}).get("key")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"".join(parts), "key": key and key.name})


def call(scope: dict[str, Any], chunks: Sequence[Message] = (CHUNK,), **options: Any) -> list[Message]:
    sent: list[Message] = []
    left = list(chunks)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    fixed = [
        Key(name="one", digest=digest("right")),
        Key(name="two", digest=digest("also right")),
        Key(name="old", digest=digest("expired"), expires_at="2020-01-01T00:00:00+08:00"),
    ]
    app = ApiKeyMiddleware(inner, KeyStore(fixed=fixed), MAX_BODY_BYTES, **options)
    asyncio.run(app({"type": "http", "method": "GET", "path": "/v1/models", "headers": [], **scope}, receive, send))
    return sent


def bearer(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {token}".encode())]


@pytest.mark.parametrize(
    ("header", "name"), [(b"Bearer right", "one"), (b"bearer also right", "two"), (b"Bearer  right ", "one")]
)
def test_a_right_key_passes_and_is_known_behind_the_door(header: bytes, name: str) -> None:
    start, body = call({"headers": [(b"authorization", header)]})
    assert start["status"] == 200
    assert body["key"] == name


@pytest.mark.parametrize(
    "header", [b"Bearer wrong", b"Bearer righ", b"Bearer ", b"right", b"Basic right", b"\xff\xfe", b""]
)
def test_any_other_is_refused_in_openais_form(header: bytes) -> None:
    start, body = call({"headers": [(b"authorization", header)]})
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["code"] == "invalid_api_key"


def test_an_expired_key_is_told_so() -> None:
    start, body = call({"headers": bearer("expired")})
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["code"] == "expired_api_key"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/v1/chat/completions"])
def test_no_path_is_open(path: str) -> None:
    assert call({"path": path})[0]["status"] == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("HEAD", "/", 200), ("POST", "/", 401), ("GET", "/v1", 401), ("GET", "//", 401)],
)
def test_only_getting_the_named_paths_is_open(method: str, path: str, status: int) -> None:
    assert call({"method": method, "path": path}, open_paths=["/"])[0]["status"] == status


def test_an_open_path_is_found_behind_a_route_prefix() -> None:
    assert call({"path": "/a/health", "root_path": "/a"}, open_paths=["/health"])[0]["status"] == 200
    assert call({"path": "/a/health", "root_path": "/a", "headers": bearer("right")})[1]["key"] == "one"


def test_a_websocket_without_a_key_is_closed_and_lifespan_passes() -> None:
    assert call({"type": "websocket"}) == [{"type": "websocket.close", "code": 1008}]
    assert call({"type": "websocket", "headers": bearer("right")})[0]["status"] == 200
    assert call({"type": "lifespan"})[0]["status"] == 200


def chunks_of(*parts: bytes) -> list[Message]:
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=6))
def test_a_body_passes_whole_or_not_at_all(parts: list[bytes]) -> None:
    start, body = call({"method": "POST", "headers": bearer("right")}, chunks_of(*parts))
    if sum(map(len, parts)) <= MAX_BODY_BYTES:
        assert (start["status"], body["body"]) == (200, b"".join(parts))
    else:
        assert start["status"] == 413
        assert json.loads(body["body"])["error"]["code"] == "request_too_large"


def test_a_body_that_is_announced_too_long_is_not_read() -> None:
    scope = {"method": "POST", "headers": [*bearer("right"), (b"content-length", b"11")]}
    assert call(scope, chunks=[])[0]["status"] == 413
    scope = {"method": "POST", "headers": [(b"content-length", b"11")]}
    assert call(scope, chunks=[])[0]["status"] == 401  # who has no key learns nothing else


def test_a_client_that_leaves_while_it_sends_is_passed_on_as_gone() -> None:
    seen: list[Message] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError("nobody is there")

    messages: list[Message] = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
    door = ApiKeyMiddleware(app, KeyStore(fixed=[Key(name="one", digest=digest("right"))]))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": bearer("right")}
    asyncio.run(door(scope, receive, send))
    assert seen == [{"type": "http.disconnect"}]


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", " one, two ,,")
    keys = open_keys("", "SOME_KEYS")
    for token in ("one", "two"):
        key = keys.find(token)
        assert key is not None
        assert (key.name, key.limits.is_unlimited, key.may_use("any")) == ("default", True, True)
    assert keys.find("") is None
    monkeypatch.setenv("SOME_KEYS", " , ")
    with pytest.raises(ValueError, match="set SOME_KEYS in the environment"):
        open_keys("", "SOME_KEYS")


@pytest.fixture(name="path")
def path_fixture(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_created_key_is_found_and_kept_nowhere(path: Path) -> None:
    settings = {"models": ["a"], "limits": {"requests_per_minute": 5}, "expires_at": "2099-01-01T00:00:00+08:00"}
    token = create_key(path, "alice", settings)
    other = create_key(path, "bob", {})
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = KeyStore(str(path))
    alice, bob = keys.find(token), keys.find(other)
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.limits.requests_per_minute) == ("alice", 5)
    assert alice.may_use("a")
    assert not alice.may_use("b")
    assert (bob.name, bob.limits.is_unlimited, bob.expires_at) == ("bob", True, None)
    assert keys.find(token[:-1]) is None
    with pytest.raises(ValueError, match="already has a key named alice"):
        create_key(path, "alice", {})
    revoke_key(path, "alice")
    with pytest.raises(ValueError, match="no key named alice; it has bob"):
        revoke_key(path, "alice")
    assert [key.name for key in read_keys(path)] == ["bob"]


def test_writers_wait_for_each_other(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda number: create_key(path, f"key{number}", {}), range(24)))
    keys = KeyStore(str(path))
    assert [getattr(keys.find(token), "name", None) for token in tokens] == [f"key{number}" for number in range(24)]


def test_mode_and_link_of_the_file_stay(path: Path) -> None:
    create_key(path, "alice", {})
    path.chmod(0o440)
    link = path.with_name("link.yaml")
    link.symlink_to(path)
    create_key(link, "bob", {})
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o440
    assert len(read_keys(path)) == 2


def test_json_is_read_too(path: Path) -> None:
    key = {"name": "a", "digest": digest("t"), "expires_at": "2030-01-01T00:00:00Z"}
    write(path, json.dumps({"keys": [key]}))
    assert KeyStore(str(path)).find("t") == Key(**key)


def write(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o600)


ENTRY = f"name: a, digest: {'a0' * 32}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("keys: [", "not valid YAML"),
        ("- a", "must hold `keys:`"),
        ("keys: [{name: a, digest: plain-key}]", r"keys.0.digest: .*pattern"),
        (f"keys: [{{{ENTRY}, expires_at: 2030-01-01}}]", "keys.0.expires_at: .*timezone"),
        (f"keys: [{{{ENTRY}, limit: 3}}]", "keys.0.limit: unknown key"),
        (f"keys: [{{{ENTRY}, limits: {{requests_per_minute: -1}}}}]", "requests_per_minute"),
        (f"keys: [{{{ENTRY}}}, {{{ENTRY.replace('0', '1')}}}]", "name a is there twice"),
        (f"keys: [{{{ENTRY}}}, {{{ENTRY.replace('name: a', 'name: b')}}}]", "digest (a0)+ is there twice"),
    ],
)
def test_a_wrong_file_is_refused(path: Path, content: str, message: str) -> None:
    write(path, content)
    with pytest.raises(ValueError, match=rf"keys_file: .*keys.yaml.*{message}"):
        KeyStore(str(path))


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o606, 0o620, 0o601])
def test_a_file_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    create_key(path, "alice", {})
    path.chmod(mode)
    with pytest.raises(ValueError, match=rf"has mode {mode:o}, open to other users"):
        KeyStore(str(path))


def test_an_absent_file_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        KeyStore(str(path))


def test_a_changed_file_counts_at_once_and_a_broken_one_does_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "CHECK_SECONDS", 0)
    first = create_key(path, "alice", {})
    keys = KeyStore(str(path), [Key(name="default", digest=digest("fixed"))])
    second = create_key(path, "bob", {})
    assert keys.find(second) is not None
    revoke_key(path, "alice")
    assert keys.find(first) is None
    for breaking in (lambda: write(path, "keys: ["), lambda: path.chmod(0o644), path.unlink):
        caplog.clear()
        breaking()
        for _ in range(3):
            assert keys.find(second) is not None
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not at every request
    create_key(path, "alice", {})
    assert keys.find(second) is None
    assert keys.find("fixed") is not None


def test_the_file_is_looked_at_once_in_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: now[0])
    create_key(path, "alice", {})
    keys = KeyStore(str(path))
    token = create_key(path, "bob", {})
    now[0] += auth.CHECK_SECONDS / 2
    assert keys.find(token) is None
    now[0] += auth.CHECK_SECONDS / 2
    assert keys.find(token) is not None


def test_another_process_reads_the_file_there(path: Path) -> None:
    create_key(path, "alice", {})
    keys = KeyStore(str(path), [Key(name="default", digest=digest("fixed"))])
    pickled = pickle.dumps(keys)
    token = create_key(path, "bob", {})
    copy = pickle.loads(pickled)  # noqa: S301
    assert copy.find(token) is not None
    assert copy.find("fixed") is not None


def test_every_key_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    compare = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    fixed = [Key(name=str(number), digest=digest(str(number))) for number in range(5)]
    keys = KeyStore(fixed=fixed)
    for token in ("0", "4", "wrong"):
        compared.clear()
        keys.find(token)
        assert compared == [key.digest for key in fixed]


def test_paths_of_the_endpoint_are_absolute() -> None:
    for fields in ({"keys_file": "keys.yaml"}, {"audit": {"path": "audit"}}):
        with pytest.raises(ValueError, match=r"(keys_file|audit.path): .* must be absolute"):
            ServeConfig(model_uri="/m", **fields)


def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/manage_keys.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_the_job_creates_lists_and_revokes(path: Path) -> None:
    file = ["--keys_file", str(path)]
    limits = ["--limits.requests_per_minute", "7", "--models", "[a, b]", "--expires_at", "2099-01-01T00:00:00+08:00"]
    created = manage("--action", "create", "--name", "alice", *limits, *file)
    assert created.returncode == 0, created.stderr
    key = KeyStore(str(path)).find(created.stdout.strip())
    assert key is not None
    assert (key.name, key.models, key.limits.requests_per_minute) == ("alice", ("a", "b"), 7)
    listed = manage(*file)
    assert "alice" in listed.stdout
    assert key.digest not in listed.stdout
    assert manage("--action", "revoke", "--name", "alice", *file).returncode == 0
    again = manage("--action", "revoke", "--name", "alice", *file)
    assert again.returncode == 2
    assert "no key named alice; it has none" in again.stderr
    assert "name: create which key?" in manage("--action", "create", *file).stderr
