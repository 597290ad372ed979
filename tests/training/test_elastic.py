"""Two workers, one, two again, as a node leaves and comes back: the same data in the same order, the same loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster, LocalClusterConfig, start_local, stop_local
from app.training import checkpoint, journal
from tests.training.runs import ROOT, finish, start
from tests.training.tiny import log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHANGES = {
    "num_steps": 500,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "min_workers": 1,
    "resize_check_seconds": 2,
    "checkpoint_interval_steps": 10,
    "evaluation_interval_steps": 200,
}


NOTICES_SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}  # that a node is dead


@pytest.fixture
def small_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster of its own, whose head has room for one worker; this process is not connected to it."""
    folder = tmp_path / "cluster"
    for name, value in NOTICES_SOON.items():
        monkeypatch.setenv(name, value)
    yield start_local(LocalClusterConfig(folder=str(folder), num_cpus=1))
    stop_local(folder)


def add_node(cluster: LocalCluster) -> subprocess.Popen[bytes]:
    """A second raylet with room for one worker."""
    command = [sys.executable, "-m", "tests.training.second_node", cluster.address]
    with (cluster.folder / "node.log").open("ab") as log:
        environment = os.environ | cluster.environment
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)


def remove_node(node: subprocess.Popen[bytes]) -> None:
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def wait_for_steps(job: subprocess.Popen[str], run: str, sizes: list[int]) -> None:
    """Until the attempts so far had these numbers of workers, and the last one has completed a checkpoint."""
    deadline = time.monotonic() + 240
    while True:
        started = journal.read_events(run, "started")
        if [event["world_size"] for event in started] == sizes:
            complete = checkpoint.find_complete(run)
            if any((one.attempt, one.world_size) == (len(sizes), sizes[-1]) for one in complete):
                return
        assert job.poll() is None, job.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_workers_one_two(small_cluster: LocalCluster, tmp_path: Path) -> None:
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    write_inputs(calm)
    wild.mkdir()
    node = add_node(small_cluster)
    try:
        finish(start(calm, calm, small_cluster, **CHANGES | {"min_workers": 2}))
        job, run = start(wild, calm, small_cluster, **CHANGES), str(wild / "checkpoints")
        wait_for_steps(job, run, [2])
        remove_node(node)
        wait_for_steps(job, run, [2, 1])
        node = add_node(small_cluster)
        wait_for_steps(job, run, [2, 1, 2])
        finish(job)
    finally:
        remove_node(node)
    before, after = log_of(calm), log_of(wild)
    assert {line["world_size"] for line in before} == {2.0}
    assert {line["world_size"] for line in after} == {1.0, 2.0}
    assert [line["rows"] for line in after] == [line["rows"] for line in before]
    assert [line["learning_rate"] for line in after] == [line["learning_rate"] for line in before]
    assert [line["loss"] for line in after] == pytest.approx([line["loss"] for line in before], abs=1e-4)
    assert read_manifest(f"{wild}/model", "model").figures["skipped_sequences"] == 0
