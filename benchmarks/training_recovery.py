"""Seconds from the SIGKILL of a worker to the first new step, on the demo's model with two workers.

The breakdown is the run's own, from its events, where the clock starts at the last sign of life: the heartbeat before
the kill. Beside it stands the time by our clock, from the kill to the event of the first new step.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from competitors import demo_training

from app.cluster import LocalCluster
from app.training import checkpoint, goodput, journal
from app.training.config import TrainConfig

CHECKPOINT_STEPS, STEPS = 10, 40
PATIENCE_SECONDS = 300
AIM_SECONDS = 30
TOTAL = "kill to first new step"


def wait_for_step(run_uri: str, job: subprocess.Popen[str]) -> None:
    """Until a checkpoint is complete. Raises RuntimeError when none comes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not checkpoint.find_complete(run_uri):
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint in {run_uri}; see the log beside it")
        time.sleep(0.1)


def workers(running: LocalCluster) -> Iterator[psutil.Process]:
    """The processes that train on the cluster."""
    for process in psutil.Process(running.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::RayTrainWorker"]:
                yield process
        except psutil.Error:
            continue  # it has just ended


def recover(config: TrainConfig, running: LocalCluster, source: random.Random) -> dict[str, float]:
    """One run with one kill after its first checkpoint; the seconds of the restart."""
    run_uri = config.resolve(config.checkpoints_uri)
    job = demo_training.submit(config, running)
    wait_for_step(run_uri, job)
    time.sleep(source.uniform(0, 3))  # anywhere between two checkpoints
    victim = source.choice(list(workers(running)))
    killed = time.time()
    victim.send_signal(signal.SIGKILL)
    demo_training.finish(job, config)
    events = journal.read_events(run_uri)
    (restart,) = goodput.summarize(events, journal.read_log(run_uri)).restarts
    first = next(event["time"] for event in events if event["kind"] == "first_step" and event["time"] > killed)
    assert restart.seconds_to_recover is not None
    return restart.breakdown | {"by the journal": restart.seconds_to_recover, TOTAL: first - killed}


def main() -> None:
    given = demo_training.arguments(__doc__, "training-recovery")
    source = random.Random(0)
    changes = {"num_steps": STEPS, "checkpoint_interval_steps": CHECKPOINT_STEPS, "evaluation_interval_steps": 10**6}
    config = demo_training.settings_of(given.folder, given.folder / "output", num_workers=2, **changes)
    runs = []
    with demo_training.cluster(Path(given.folder) / "cluster") as running:
        for round_number in range(given.runs):
            runs.append(recover(config, running, source))
            print(f"  round {round_number + 1}: {runs[-1][TOTAL]:.1f} s", file=sys.stderr, flush=True)
    print(f"2 workers, one killed; seconds, medians of {given.runs}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        label = name.removesuffix("_seconds").replace("_", " ")
        aim = f"; aim: {AIM_SECONDS}" if name == TOTAL else ""
        print(f"{label:24} {statistics.median(values):7.1f}   ({min(values):.1f} to {max(values):.1f}{aim})")


if __name__ == "__main__":
    main()
