"""The demo's corpus as tokens, and models of different kinds trained on it: same tokens, same order, their seeds alike.

It says nothing about which is better; the benchmarks that compare two kinds do.
"""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml
from competitors import demo_training

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import journal
from app.training.config import TrainConfig

ROOT = demo_training.ROOT
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % point by the number of pairs


def prepare(folder: Path, running: LocalCluster, block_tokens: int) -> None:
    """The demo's corpus, tokenizer and tokens, of blocks that long, in the folder; complete ones are skipped."""
    raw = ROOT / "runs/demo/raw"
    if not raw.exists():
        raise SystemExit(f"{raw} is missing: .venv/bin/python jobs/fetch_demo_corpus.py --storage_uri {raw.parent}")
    shutil.copytree(raw, folder / "raw", dirs_exist_ok=True, copy_function=shutil.copy2)
    for script, options in (
        ("prepare_corpus", {}),
        ("train_tokenizer", {}),
        ("pack_tokens", {"block_tokens": block_tokens}),
    ):
        given = {"config": demo_training.DEMO / f"{script}.yaml", "storage_uri": folder}
        demo_training.job(script, given | options, running)


def vocab_size(folder: Path) -> int:
    """Of the tokens in the folder."""
    return int(str(read_manifest(f"{folder}/tokens", "tokens").figures["vocab_size"]))


def settings(folder: Path, name: str, num_steps: int, **changes: Any) -> TrainConfig:
    """The demo's training settings with changes; scored after the last step. It writes into output/`name` alone."""
    given = yaml.safe_load((demo_training.DEMO / "train_model.yaml").read_text(encoding="utf-8"))
    uris = {"tokens_uri": f"{folder}/tokens", "tokenizer_uri": f"{folder}/tokenizer", "cache_dir": f"{folder}/cache"}
    fixed = {"num_steps": num_steps, "storage_uri": str(folder / "output" / name), "export": "last"}
    intervals = {"checkpoint_interval_steps": num_steps, "evaluation_interval_steps": num_steps}
    return TrainConfig.model_validate(given | uris | fixed | intervals | {"wandb_mode": "disabled"} | changes)


def train(config: TrainConfig, running: LocalCluster) -> dict[str, float]:
    """One job; its figures, and of a mixture of experts how even the load was at the end."""
    demo_training.finish(demo_training.submit(config, running), config)
    figures: dict[str, Any] = dict(read_manifest(config.resolve(config.output_uri), "model").figures)
    last = journal.read_log(config.resolve(config.checkpoints_uri))[-1]
    loads = {key: last[key] for key in ("expert_load_max", "expert_load_entropy") if key in last}
    return {key: float(figures[key]) for key in ("held_out_bits_per_byte", "tokens_per_second", "tokens")} | loads


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); one difference has none."""
    if len(differences) < 2:
        return differences[0], math.nan
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), STUDENT[len(differences)] * spread
