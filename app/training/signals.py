"""Wishes from outside a step: stop after a checkpoint, or look whether a node is about to be taken away.

The job that is told to end (SIGTERM) leaves a stop file in the run's folder; a thread of rank 0 looks for it, so that
no step waits for storage. Ray Train knows of nodes that are drained; talking to it is collective, so rank 0 says when.
"""

from __future__ import annotations

import threading
import time

from app import storage

STOP = "stop"
LOOK_SECONDS = 0.5
TALK_SECONDS = 5.0  # between reports to Ray Train: its controller takes one every 2 s, and a second one waits for it


class Signals:
    """What this rank wishes; only rank 0 wishes anything. Close it."""

    def __init__(self, run_uri: str, rank: int) -> None:
        self._uri = f"{run_uri}/{STOP}"
        self._stop, self._closed = threading.Event(), threading.Event()
        self._talked = time.monotonic()
        self._speaks = rank == 0
        if self._speaks:
            threading.Thread(target=self._look, name="signals", daemon=True).start()

    @property
    def wants_stop(self) -> bool:
        """Whether the run is to end after a checkpoint."""
        return self._stop.is_set()

    def wants_to_talk(self) -> bool:
        """Whether it is time to talk to Ray Train; true once each TALK_SECONDS."""
        due = self._speaks and time.monotonic() - self._talked > TALK_SECONDS
        if due:
            self._talked = time.monotonic()
        return due

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            if storage.exists(self._uri):
                self._stop.set()
                return


def ask_to_stop(run_uri: str) -> None:
    """Make the workers of a run leave after a checkpoint."""
    storage.write_atomic(f"{run_uri}/{STOP}", b"")


def forget_stop(run_uri: str) -> None:
    """Take back an earlier wish: the run is to go on."""
    storage.delete(f"{run_uri}/{STOP}")
