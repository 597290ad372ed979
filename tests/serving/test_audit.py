import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.serving import audit
from app.serving.audit import AuditLog, AuditRecord
from app.serving.config import AuditConfig

ROOT = Path(__file__).resolve().parents[2]


def record(number: int = 0, **fields: Any) -> AuditRecord:
    known = {"key_name": "alice", "path": "/v1/chat/completions", "status": 200, "latency_seconds": 0.25}
    return AuditRecord(request_id=f"r{number}", **known | fields)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_each_request_is_one_line(tmp_path: Path) -> None:
    log = AuditLog(AuditConfig(path=str(tmp_path)))
    log.write(
        record(1, model="m", model_version="3f", prompt_tokens=5, verdicts=[{"rule": "词\n", "at": 3}], answer="x")
    )
    log.write(record(2, key_name=None, status=401, time="2026-01-01T00:00:00.000+00:00"))
    log.close()
    first, second = lines(log.path)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "request_id": "r1",
        "key_name": "alice",
        "path": "/v1/chat/completions",
        "status": 200,
        "latency_seconds": 0.25,
        "model": "m",
        "model_version": "3f",
        "prompt_tokens": 5,
        "completion_tokens": None,
        "time_to_first_token_seconds": None,
        "finish_reason": None,
        "is_stream": False,
        "verdicts": [{"rule": "词\n", "at": 3}],
    }
    assert second["time"] == "2026-01-01T00:00:00.000+00:00"
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_text_is_logged_only_if_asked(tmp_path: Path) -> None:
    for with_text in (False, True):
        log = AuditLog(AuditConfig(path=str(tmp_path), with_text=with_text))
        log.write(record(prompt="问", answer="答"))
        log.close()
    silent, telling = lines(log.path)
    assert not {"prompt", "answer"} & set(silent)
    assert (telling["prompt"], telling["answer"]) == ("问", "答")


def test_rotation_loses_nothing_but_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(audit.os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or sync(file))
    log = AuditLog(AuditConfig(path=str(tmp_path), max_bytes=1024, num_files=3))
    for number in range(20):
        log.write(record(number))
    log.close()
    files = [log.path.with_name(f"{log.path.name}.{number}") for number in (3, 2, 1)] + [log.path]
    assert {path.name for path in tmp_path.glob("*.jsonl*")} == {path.name for path in files}
    assert all(file.stat().st_size <= 1024 for file in files)
    assert synced[-4:] == [file.stat().st_size for file in files]
    kept = [line["request_id"] for file in files for line in lines(file)]
    assert kept == [f"r{number}" for number in range(20 - len(kept), 20)]
    assert 4 < len(kept) < 20


def test_living_processes_write_to_different_files_and_a_successor_goes_on(tmp_path: Path) -> None:
    config = AuditConfig(path=str(tmp_path))
    logs = [AuditLog(config), AuditLog(config)]
    assert [log.path.name for log in logs] == ["audit-0.jsonl", "audit-1.jsonl"]
    for log in logs:
        log.write(record())
        log.close()
    successor = AuditLog(config)
    successor.write(record(7))
    successor.close()
    assert [line["request_id"] for line in lines(tmp_path / "audit-0.jsonl")] == ["r0", "r7"]


def test_a_full_queue_drops_counts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(AuditConfig(path=str(tmp_path), queue_records=5))
    disk, asked = threading.Event(), threading.Event()
    append = log._file.append
    monkeypatch.setattr(log._file, "append", lambda line: asked.set() or (disk.wait(10) and append(line)))
    log.write(record(0))
    assert asked.wait(10)  # the thread hangs on the disk with the first
    for number in range(1, 9):
        log.write(record(number))
    assert log.num_lost == 3
    disk.set()
    log.close()
    found = lines(log.path)
    assert [line["request_id"] for line in found if "request_id" in line] == [f"r{number}" for number in range(6)]
    assert [line["num_records"] for line in found if line.get("event") == "records_lost"] == [3]
    assert len(caplog.records) == 1
    log.write(record())
    assert log.num_lost == 4


def test_a_full_disk_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "audit-0.jsonl").symlink_to("/dev/full")
    log = AuditLog(AuditConfig(path=str(tmp_path)))
    for number in range(3):
        log.write(record(number))
    wait_for(lambda: log.num_lost == 3)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]  # once a minute
    assert "No space left on device" in caplog.text
    log.path.unlink()  # there is space again
    log.write(record(3))
    log.close()
    told, written = lines(log.path)
    assert (told["event"], told["num_records"]) == ("records_lost", 3)
    assert written["request_id"] == "r3"


@pytest.mark.slow
def test_a_line_that_no_longer_fits_leaves_no_half(tmp_path: Path) -> None:
    """The kernel takes a part of a line, as at the end of a disk: here at the end of what a process may write."""
    script = f"""
import resource
from app.serving.audit import AuditLog
from app.serving.config import AuditConfig
from tests.serving.test_audit import record
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log = AuditLog(AuditConfig(path={str(tmp_path)!r}))
for number in range(5):
    log.write(record(number))
log.close()
raise SystemExit(log.num_lost)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lost = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True)
    found = lines(tmp_path / "audit-0.jsonl")
    assert 0 < lost.returncode < 5, lost.stderr
    written = [line["request_id"] for line in found if "request_id" in line]  # the line that tells of losses may fit
    assert written == [f"r{number}" for number in range(5 - lost.returncode)]


def test_closing_twice_is_fine_and_a_folder_that_cannot_be_is_told_at_the_start(tmp_path: Path) -> None:
    log = AuditLog(AuditConfig(path=str(tmp_path)))
    log.close()
    log.close()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        AuditLog(AuditConfig(path=str(tmp_path / "file")))
