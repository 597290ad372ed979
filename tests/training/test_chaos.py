"""A run that is killed again and again, at any moment, ends with the weights and the ledger of the undisturbed one.

Five kills with all tests, twenty with the long ones.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from tests.training.runs import assert_equal_runs, find_workers, finish, start
from tests.training.tiny import config_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHANGES = {"checkpoint_interval_steps": 5, "evaluation_interval_steps": 100, "max_failures": -1}
PLAN = ["anywhere", "writing", "restoring", "writing", "driver"]
SECONDS = 60  # to wait for a moment to come


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is begun and not complete."""
    complete = {manifest.name for manifest in checkpoint.find_complete(str(run))}
    folder = run / "checkpoints"
    return folder.exists() and bool({path.name for path in folder.iterdir()} - complete)


def is_stepping(run: Path) -> bool:
    """Whether the newest attempt has done a step."""
    kinds = [
        event["kind"] for event in journal.read_events(str(run)) if event["kind"] in ("started", "first_step", "failed")
    ]
    return kinds[-1:] == ["first_step"]


def has_progressed(run: Path) -> bool:
    """Whether the newest attempt has completed a checkpoint of its own."""
    started = journal.read_events(str(run), "started")
    complete = checkpoint.find_complete(str(run))
    return bool(started and complete) and complete[0].step > started[-1]["step"]


class Killer:
    """Kills workers and jobs of one run; counts what they were doing."""

    def __init__(self, root: Path, inputs: Path, cluster: LocalCluster, num_steps: int) -> None:
        self.root, self.inputs, self.cluster, self.num_steps = root, inputs, cluster, num_steps
        self.run = root / "checkpoints"
        self.random = random.Random(4)
        self.kills: Counter[str] = Counter()
        self.job = self.submit()

    def submit(self) -> subprocess.Popen[str]:
        return start(self.root, self.inputs, self.cluster, **CHANGES, num_steps=self.num_steps)

    def wait(self, moment: str) -> list[psutil.Process]:
        """The workers, when the moment has come."""
        old = {process.pid for process in find_workers(self.cluster)} if moment == "restoring" else set()
        self.until(lambda: any(worker.pid not in old for worker in find_workers(self.cluster)))
        if moment == "restoring":
            time.sleep(self.random.uniform(3, 9))  # imports, set-up, load
        elif moment == "anywhere":
            time.sleep(self.random.uniform(0, 15))
        else:
            self.until(lambda: is_stepping(self.run) and has_progressed(self.run))
        workers = find_workers(self.cluster)  # that takes longer than to write a checkpoint
        if moment == "writing":
            self.until(lambda: is_writing(self.run))
        return workers

    def until(self, has_come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not has_come():
            assert time.monotonic() < deadline
            assert self.job.poll() is None
            time.sleep(0.005)

    def kill(self, moment: str) -> None:
        workers = self.wait(moment)
        try:
            victim = psutil.Process(self.job.pid) if moment == "driver" else self.random.choice(workers)
            victim.suspend()  # what it is doing is what it is killed at
            doing = "writing" if is_writing(self.run) else "stepping" if is_stepping(self.run) else "starting"
            if moment == "writing" and doing != "writing":  # the checkpoint was complete before
                victim.resume()
                return self.kill(moment)  # the next one; the moment after this waits for what a kill brings
            victim.kill()
        except (psutil.NoSuchProcess, IndexError):
            return  # they went with the group of the kill before
        self.kills[doing] += 1
        if moment == "driver":
            self.job.wait()
            self.kills["driver"] += 1
            self.job = self.submit()


@pytest.mark.parametrize(("rounds", "num_steps"), [(1, 300), pytest.param(4, 500, marks=pytest.mark.long)])
def test_kills_change_nothing(cluster: LocalCluster, tmp_path: Path, rounds: int, num_steps: int) -> None:
    calm, wild, num_kills = tmp_path / "calm", tmp_path / "wild", rounds * len(PLAN)
    write_inputs(calm)
    wild.mkdir()
    stage.run(TrainConfig.model_validate(config_of(calm, calm, **CHANGES, num_steps=num_steps)))
    killer = Killer(wild, calm, cluster, num_steps)
    for moment in PLAN * rounds:
        killer.kill(moment)
    while killer.kills["writing"] < num_kills // 4:
        killer.kill("writing")
    while killer.kills.total() - killer.kills["driver"] < num_kills:
        killer.kill("anywhere")
    finish(killer.job)
    assert killer.kills["starting"] >= rounds // 2
    assert killer.kills["driver"] == rounds
    assert_equal_runs(wild, calm)
    figures = read_manifest(f"{wild}/model", "model").figures
    assert figures["skipped_sequences"] == 0
    resumed = [event["step"] for event in journal.read_events(str(killer.run), "started")[1:]]
    assert figures["restarts"] == len(resumed)  # kills before an attempt's first step are not among them
    assert len([step for step in resumed if step > 0]) >= num_kills // 4
