"""Training jobs as processes of their own, and what two runs must have in common."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from app.cluster import LocalCluster
from app.training import checkpoint
from tests.training.tiny import config_of, trajectory
from tests.warm_workers import family

ROOT = Path(__file__).resolve().parents[2]


def start(root: Path, inputs: Path, cluster: LocalCluster, **changes: Any) -> subprocess.Popen[str]:
    """The training job as a process of its own."""
    settings = root / "train.yaml"
    settings.write_text(yaml.safe_dump(config_of(inputs, root, **changes)))
    command = [sys.executable, "jobs/train_model.py", "--config", str(settings)]
    environment = os.environ | cluster.environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for_checkpoint(root: Path, job: subprocess.Popen[str], step: int) -> None:
    """Until a checkpoint of that step or a later one is complete."""
    deadline = time.monotonic() + 240
    while not any(manifest.step >= step for manifest in checkpoint.find_complete(f"{root}/checkpoints")):
        assert job.poll() is None, "the job ended before"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(job: subprocess.Popen[str]) -> str:
    """What a job that must succeed says on stderr."""
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said[-3000:]
    return said


def kill_and_submit_again(root: Path, inputs: Path, cluster: LocalCluster, **changes: Any) -> None:
    """SIGKILL for the job after a checkpoint of step 10 or later, then the same job until it ends."""
    first = start(root, inputs, cluster, **changes)
    wait_for_checkpoint(root, first, 10)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (root / "model" / "manifest.json").exists()
    assert "resuming after step" in finish(start(root, inputs, cluster, **changes))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert trajectory(one) == trajectory(other)
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


def find_workers(cluster: LocalCluster) -> list[psutil.Process]:
    """The processes that train on the cluster now."""
    found = []
    for process in family(cluster):
        try:
            if process.cmdline()[:1] == ["ray::RayTrainWorker"]:
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def kill_a_worker(run_uri: str, cluster: LocalCluster, step: int) -> None:
    """SIGKILL, when a checkpoint of that step or a later one is complete."""
    deadline = time.monotonic() + 120
    while not any(manifest.step >= step for manifest in checkpoint.find_complete(run_uri)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    find_workers(cluster)[-1].send_signal(signal.SIGKILL)
