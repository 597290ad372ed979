"""What a run writes down in its folder: a line for each step, and events (started, failed, rewound, stopped …).

Lines are kept in segments that end where checkpoints are made, so that going back to a checkpoint leaves exactly one
line for each step before it. Events are facts that nothing takes back: a small file each. One process writes.
It does not interpret either; goodput.py and ledger.py do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from app import storage
from app.training.ledger import Rewind

Line = dict[str, Any]
HEARTBEAT = "alive.json"  # the last finished step and when


class Journal:
    """The lines of a run from its first step; `begin` is the step that the unwritten lines start at."""

    def __init__(self, run_uri: str, step: int) -> None:
        """Continue after `step` steps: what was written for later ones is dropped."""
        self._folder = f"{run_uri}/log"
        self._unwritten: list[Line] = []
        self.begin = step
        self.rewind(step)

    def append(self, line: Line) -> None:
        """Add the line of the next step; it is on storage after the next `flush`."""
        self._unwritten.append(line)

    def flush(self) -> None:
        """Write the lines since the last flush as one segment; call it where a checkpoint is made."""
        if self._unwritten:
            end = self.begin + len(self._unwritten)
            content = to_jsonl(self._unwritten).encode()
            storage.write_atomic(f"{self._folder}/{self.begin:08d}-{end:08d}.jsonl", content)
            self._unwritten, self.begin = [], end

    def rewind(self, step: int) -> None:
        """Forget the lines of that step and later ones; it must be one where a checkpoint was made.

        Raises ValueError when lines before it are missing.
        """
        for uri, _, end in _segments(self._folder):
            if end > step:
                storage.delete(uri)
        self._unwritten, self.begin = [], step
        written = sum(end - begin for _, begin, end in _segments(self._folder))
        if written != step:
            raise ValueError(f"{self._folder}: holds {written} steps, the checkpoint {step}; delete the run's folder")

    def lines(self) -> list[Line]:
        """All lines so far, one for each step from 0; read from storage, so that a long run holds no memory."""
        return read_lines(self._folder) + self._unwritten


def read_log(run_uri: str) -> list[Line]:
    """The lines of a run that has ended."""
    return read_lines(f"{run_uri}/log")


def read_lines(folder: str) -> list[Line]:
    """The lines of all segments in order, as far as they follow each other without a gap."""
    lines: list[Line] = []
    for uri, begin, _ in _segments(folder):
        if begin == len(lines):
            with storage.open_file(uri, "r", encoding="utf-8") as file:
                lines += [json.loads(line) for line in file]
    return lines


def to_jsonl(lines: Iterable[Line]) -> str:
    """One JSON object a line."""
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def add_event(run_uri: str, kind: str, **fields: Any) -> None:
    """Note that something happened now; `fields` must be JSON."""
    event = {"kind": kind, "time": time.time(), **fields}
    storage.write_atomic(f"{run_uri}/events/{time.time_ns()}-{kind}.json", json.dumps(event).encode())


def read_events(run_uri: str, kind: str = "") -> list[dict[str, Any]]:
    """All events of a run, or those of one kind, in order of time."""
    events = []
    for uri in storage.list_files(f"{run_uri}/events", f"{kind}.json"):
        with storage.open_file(uri) as file:
            events.append(json.load(file))
    return sorted(events, key=lambda event: event["time"])


def read_rewinds(run_uri: str) -> list[Rewind]:
    """The rewinds of the run, in the order in which they happened."""
    events = read_events(run_uri, "rewound")
    return [Rewind(event["to_step"], event["at_step"], event["reason"]) for event in events]


def _segments(folder: str) -> list[tuple[str, int, int]]:
    found = []
    for uri in storage.list_files(folder, ".jsonl"):
        begin, end = uri.rsplit("/", 1)[-1].removesuffix(".jsonl").split("-")
        found.append((uri, int(begin), int(end)))
    return sorted(found, key=lambda segment: segment[1:])
