"""Tokens per second of the demo's model: ours on Ray Train beside the bare loop and transformers' Trainer.

All do the same steps on the same DeepSpeed config, which their losses show; ours runs with and without checkpoints.
The clock runs from the end of the warm-up to the end of the last step. Ray is up for our runs, and for one more of the
bare loop beside an idle cluster: that tells what Ray's own processes take of so few cores from what our loop takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from competitors import demo_training

from app.artifacts import read_manifest
from app.training import journal
from app.training.config import TrainConfig

WARM_UP, STEPS, CHECKPOINT_STEPS = 10, 60, 20
OURS, CHECKPOINTS, BARE, TRAINER = "zero-to-one", "with checkpoints", "torchrun + DeepSpeed", "Trainer + DeepSpeed"
BESIDE_RAY = "torchrun beside idle Ray"
SCRIPTS = {BARE: "torchrun_deepspeed.py", BESIDE_RAY: "torchrun_deepspeed.py", TRAINER: "hf_trainer.py"}
TOOLS = (OURS, BARE, BESIDE_RAY, CHECKPOINTS, TRAINER)  # in this order
AIM_BARE, AIM_LOST = 0.98, 0.02
SETTLE_SECONDS = 10  # for the start of Ray's workers
CONSTANT_RATE = {"learning_rate": 3e-4, "warmup_steps": 0, "final_learning_rate_ratio": 1.0, "weight_decay": 0.0}


def settings(given: argparse.Namespace, name: str, checkpoint_steps: int) -> TrainConfig:
    """The demo's settings, changed so that all tools can do the same; evaluation comes after the last step."""
    output = given.folder / "output" / name.replace(" ", "-")
    return demo_training.settings_of(
        given.folder, output, optimizer=CONSTANT_RATE, num_workers=given.ranks, zero_stage=3,
        num_steps=WARM_UP + STEPS, checkpoint_interval_steps=checkpoint_steps, evaluation_interval_steps=10**6,
    )  # fmt: skip


def run_ours(given: argparse.Namespace, name: str, checkpoint_steps: int) -> dict[str, float]:
    """A job on a Ray cluster of its own; its figures from the journal. `lost` is the share of data and checkpoints."""
    config = settings(given, name, checkpoint_steps)
    with demo_training.cluster(given.folder / "cluster") as running:
        demo_training.finish(demo_training.submit(config, running), config)
    lines = journal.read_log(config.resolve(config.checkpoints_uri))
    measured = lines[WARM_UP:]
    assert len(measured) == STEPS
    seconds = sum(line["step_seconds"] for line in measured)
    lost = sum(line["data_seconds"] + line["checkpoint_seconds"] for line in measured) / seconds
    return {"seconds": seconds, "loss": statistics.fmean(line["loss"] for line in lines), "lost": lost}


def run_other(given: argparse.Namespace, name: str) -> dict[str, float]:
    """A competitor under torchrun; the slower rank's seconds."""
    config = settings(given, name, WARM_UP + STEPS)
    path = given.folder / "settings.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    script = demo_training.SCRIPTS / SCRIPTS[name]
    ranks = demo_training.torchrun(script, Path(config.storage_uri), config.num_workers, str(path), str(WARM_UP))
    seconds = max(rank["seconds"] for rank in ranks)
    return {"seconds": seconds, "loss": statistics.fmean(rank["loss"] for rank in ranks)}


def run_beside_ray(given: argparse.Namespace, name: str) -> dict[str, float]:
    """`run_other` while a cluster like ours has nothing to do."""
    with demo_training.cluster(given.folder / "cluster"):
        time.sleep(SETTLE_SECONDS)
        return run_other(given, name)


def measure(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every tool `--runs` times, in turn."""
    tools: dict[str, Callable[[], dict[str, float]]] = {
        OURS: lambda: run_ours(given, OURS, 10**6),
        BARE: lambda: run_other(given, BARE),
        BESIDE_RAY: lambda: run_beside_ray(given, BESIDE_RAY),
        CHECKPOINTS: lambda: run_ours(given, CHECKPOINTS, CHECKPOINT_STEPS),
        TRAINER: lambda: run_other(given, TRAINER),
    }
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for round_number in range(given.runs):
        for name in given.only:
            found[name].append(tools[name]())
            print(f"  round {round_number + 1}: {name} {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    given = demo_training.arguments(__doc__, "training-throughput", tools=TOOLS)
    config = settings(given, OURS, 10**6)
    block_tokens = read_manifest(config.tokens_uri, "tokens").config["block_tokens"]
    tokens = STEPS * config.global_batch_sequences * block_tokens
    found = measure(given)
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    work = f"{STEPS} steps of {config.global_batch_sequences} blocks of {block_tokens} tokens"
    print(f"{work}, {config.num_workers} ranks, {os.cpu_count()} cores, medians of {given.runs}")
    print(f"{'':24} {'seconds':>9} {'tokens/s':>9} {'mean loss':>10}")
    for name, figures in median.items():
        print(f"{name:24} {figures['seconds']:9.1f} {tokens / figures['seconds']:9.0f} {figures['loss']:10.4f}")
    if CHECKPOINTS in median:
        lost = f"{median[CHECKPOINTS]['lost']:.2%} (aim: below {AIM_LOST:.0%})"
        print(f"waiting for data and in checkpoints, one every {CHECKPOINT_STEPS} steps: {lost} of the steps' time")
    for name in (CHECKPOINTS, TRAINER, BESIDE_RAY, BARE):
        if {name, OURS} <= median.keys():
            aim = f" (aim {AIM_BARE})" if name == BARE else ""
            print(f"{OURS} / {name}: {median[name]['seconds'] / median[OURS]['seconds']:.3f}{aim}")


if __name__ == "__main__":
    main()
