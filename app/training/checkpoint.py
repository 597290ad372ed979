"""Checkpoints of a run: every rank's ZeRO shards and the log so far, reported to Ray Train as one directory.

Ray registers a checkpoint only when all ranks have delivered, so a half-written one is never resumed from. The data
position and the random state are functions of the step: nothing else is stored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray.train

LOG_NAME = "training_log.jsonl"
_TAG = "state"


def save(engine: Any, step: int, log: str, metrics: dict[str, float]) -> None:
    """Write this rank's part after `step` steps and report it; every rank must call it."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=_TAG, client_state={"step": step})
        if engine.global_rank == 0:
            (Path(folder) / LOG_NAME).write_text(log)
        ray.train.report({"step": step, **metrics}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def load(engine: Any) -> tuple[int, str]:
    """Restore the newest checkpoint of the run; (steps done, log so far), or (0, "") when there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, ""
    with checkpoint.as_directory() as folder:
        path, state = engine.load_checkpoint(folder, tag=_TAG)
        if path is None:
            raise ValueError(f"{checkpoint.path}: cannot be resumed from; delete it to start again")
        return int(state["step"]), (Path(folder) / LOG_NAME).read_text()
