"""Sweeps over a model that trains within seconds, as settings and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from app.cluster import LocalCluster
from app.tuning.trial import Trial
from tests.training.tiny import config_of

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-5, 5e-2]},
    "optimizer.schedule": {"choice": ["cosine", "warmup_stable_decay"]},
}


def settings(inputs: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A sweep in `root` on the inputs of another folder: 40 steps a trial, measured each 10, from a poor start."""
    train = config_of(inputs, root, num_steps=40, evaluation_interval_steps=10, num_workers=1)
    train["optimizer"] = {"learning_rate": 1e-4, "warmup_steps": 2}
    del train["storage_uri"]
    return {"storage_uri": str(root), "train": train, "space": SPACE, **changes}


def start(root: Path, cluster: LocalCluster, config: dict[str, Any]) -> subprocess.Popen[str]:
    """The sweep as a process of its own."""
    file = root / "tune.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "jobs/tune_model.py", "--config", str(file)]
    environment = os.environ | cluster.environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(job: subprocess.Popen[str]) -> str:
    """What a sweep that must succeed says on stderr."""
    _, said = job.communicate(timeout=2400)
    assert job.returncode == 0, said[-3000:]
    return said


def trial_of(root: Path, number: int) -> Trial | None:
    """A trial of the sweep in `root`."""
    return Trial.open(f"{root}/trials/{number:04d}", number)


def until(job: subprocess.Popen[str], has_come: Callable[[], bool]) -> None:
    """Wait for a moment of a sweep that runs."""
    deadline = time.monotonic() + 2400
    while not has_come():
        assert job.poll() is None, "the sweep ended before"
        assert time.monotonic() < deadline
        time.sleep(0.05)
