"""The audit log: one JSON line per request, written by a thread so that the event loop never waits for a disk.

`AuditLog.write` puts a record into a bounded queue; the thread appends lines, rotates by size and syncs what it closes.
What a full queue or a full disk costs is counted, logged and told by a line of its own in the file: it never takes the
endpoint down. Each process writes a file of its own, which its successor continues. The API key is never in a record,
texts only if configured.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.serving.config import AuditConfig

logger = logging.getLogger(__name__)

COMPLAINT_SECONDS = 60.0  # between two log lines about lost records
CLOSE_SECONDS = 10.0  # how long `close` waits for a disk that hangs
TEXTS = ("prompt", "answer")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class AuditRecord:
    """What is known of a request when it ended. Times are seconds; None is what it did not come to."""

    request_id: str
    key_name: str | None
    path: str
    status: int
    latency_seconds: float
    model: str | None = None
    model_version: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    time_to_first_token_seconds: float | None = None  # of streams
    finish_reason: str | None = None
    is_stream: bool = False
    verdicts: Sequence[Any] = ()  # of the content filter, as JSON takes them
    prompt: str | None = None
    answer: str | None = None
    time: str = field(default_factory=_now)


class AuditLog:
    """The log of one process: `audit-0.jsonl` in the folder, or the first number that no living process writes."""

    def __init__(self, config: AuditConfig) -> None:
        """Raises OSError when the folder cannot be written."""
        self._config = config
        self.path, self._lock = _claim(Path(config.path))
        self._queue: queue.Queue[AuditRecord | None] = queue.Queue(config.queue_records)
        self._file = _LogFile(self.path, config.max_bytes, config.num_files)
        self._counting = threading.Lock()
        self._num_lost = 0
        self._num_untold = 0  # lost, and not yet told in the file
        self._complained_at = -COMPLAINT_SECONDS
        self._is_closed = False
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    @property
    def num_lost(self) -> int:
        """Records that came too fast for the queue, or that the disk did not take."""
        return self._num_lost

    def write(self, record: AuditRecord) -> None:
        """Hand over a record; returns at once."""
        if self._is_closed:
            self._lose("the log is closed")
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lose("its queue is full")

    def close(self) -> None:
        """Write what is in the queue, sync and close the file; waits at most CLOSE_SECONDS."""
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.error("audit: %s: the disk hangs, %d records are lost", self.path, self._queue.qsize())

    def _write_all(self) -> None:
        for record in iter(self._queue.get, None):
            try:
                self._tell_of_losses()
                self._file.append(_line(self._fields(record)))
            except OSError as error:
                self._lose(str(error))
        try:
            self._tell_of_losses()
            self._file.close()
        except OSError as error:
            logger.error("audit: %s: %s", self.path, error)
        os.close(self._lock)

    def _tell_of_losses(self) -> None:
        num_records = self._num_untold
        if num_records:
            self._file.append(_line({"time": _now(), "event": "records_lost", "num_records": num_records}))
            with self._counting:
                self._num_untold -= num_records

    def _fields(self, record: AuditRecord) -> dict[str, Any]:
        fields = dict(vars(record))
        left_out = () if self._config.with_text else TEXTS
        return {"time": fields.pop("time")} | {name: value for name, value in fields.items() if name not in left_out}

    def _lose(self, why: str) -> None:
        with self._counting:
            self._num_lost += 1
            self._num_untold += 1
            now = time.monotonic()
            is_due = now - self._complained_at >= COMPLAINT_SECONDS
            if is_due:
                self._complained_at = now
        if is_due:
            logger.error("audit: %s: %s; %d records lost so far", self.path, why, self._num_lost)


class _LogFile:
    """Lines appended to a file that is rotated before it would exceed `max_bytes`; opened again after an error."""

    def __init__(self, path: Path, max_bytes: int, num_files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._num_files = num_files
        self._file: int | None = self._open()

    def append(self, line: bytes) -> None:
        """Append the whole line or nothing. Raises OSError."""
        if self._file is None:
            self._file = self._open()
        try:
            size = os.fstat(self._file).st_size
            if size and size + len(line) > self._max_bytes:
                self._rotate()
                size = 0
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            raise

    def close(self) -> None:
        """Sync and close. Raises OSError."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _rotate(self) -> None:
        self.close()
        for number in range(self._num_files, 0, -1):
            newer = self._numbered(number - 1) if number > 1 else self._path
            if newer.exists():
                newer.replace(self._numbered(number))
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _claim(folder: Path) -> tuple[Path, int]:
    """A log file that is ours as long as the returned lock is open, if only by dying."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        path = folder / f"audit-{number}.jsonl"
        lock = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return path, lock
    raise AssertionError("unreachable")


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace") + b"\n"
