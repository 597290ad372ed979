"""What a run says of itself: a JSON line a step, a W&B run, and a progress line every few seconds.

One rank speaks. The log is part of the checkpoints, so that after a restart each step still has exactly one line.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from app import storage
from app.training.config import TrainConfig

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0
STARTS = "starts"  # holds one empty file for each time the run was started or resumed


class Telemetry:
    """Collects the steps of a run; `log` holds the lines of those that a checkpoint has already."""

    def __init__(self, config: TrainConfig, run_uri: str, log: str, speaks: bool) -> None:
        self.lines = log.splitlines()
        self.speaks = speaks
        self._config = config
        self._said = 0.0
        if speaks:
            storage.write_atomic(f"{run_uri}/{STARTS}/{time.time_ns()}", b"")
        self._wandb = _WandbRun(config, run_uri) if speaks and config.wandb_mode != "disabled" else None

    @property
    def log(self) -> str:
        """All lines so far, as jsonl."""
        return "".join(f"{line}\n" for line in self.lines)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Note a finished step with its values."""
        if not self.speaks:
            return
        self.lines.append(json.dumps({"step": step, **values}))
        if self._wandb:
            self._wandb.run.log(values, step=step)
        now = time.monotonic()
        if now - self._said > PROGRESS_SECONDS or step + 1 == self._config.num_steps:
            self._said = now
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d/%d  %s", step + 1, self._config.num_steps, shown)

    def finish(self) -> None:
        """Close the W&B run and bring its files to the run's storage."""
        if self._wandb:
            self._wandb.finish()


class _WandbRun:
    """A W&B run whose files lie in the run's storage: written there directly when it is local."""

    def __init__(self, config: TrainConfig, run_uri: str) -> None:
        import wandb

        self._uri = f"{run_uri}/wandb"
        self._temporary = tempfile.TemporaryDirectory() if "://" in run_uri else None
        folder = Path(self._temporary.name if self._temporary else run_uri)
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project="zero-to-one",
            mode=config.wandb_mode,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def finish(self) -> None:
        self.run.finish()
        if self._temporary:
            storage.upload(Path(self._temporary.name) / "wandb", self._uri)
            self._temporary.cleanup()
