"""Held-out bits per byte of a mixture of experts beside a dense model of as many active parameters, on the demo text.

Both are Qwen3 and see the same tokens in the same order; two of eight experts of half the dense width work on a token,
so that a token is multiplied with as many parameters (and the router's). For each seed the two differ by nothing else.
It makes the corpus once; `--runs` seeds, of which it prints the mean difference and its 95 % interval (Student's t).
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from competitors import demo_training

from app.artifacts import read_manifest
from app.cluster import PRIVATE, LocalCluster
from app.training import journal
from app.training.config import TrainConfig
from app.training.sizes import count_parameters

ROOT = demo_training.ROOT
STEPS = 200
SIZES = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_key_value_heads": 4, "tie_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SIZES | {"architecture": "qwen3", "intermediate_size": 768},
    "8 experts, 2 active": SIZES
    | {
        "architecture": "qwen3_moe",
        "num_experts": 8,
        "experts_per_token": 2,
        "moe_intermediate_size": 384,
        "router_aux_loss_coefficient": 0.01,
    },
}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % point by the number of pairs


def prepare(folder: Path, running: LocalCluster) -> None:
    """The demo's corpus, tokenizer and tokens in the folder; complete ones are skipped."""
    raw = ROOT / "runs/demo/raw"
    if not raw.exists():
        raise SystemExit(f"{raw} is missing: .venv/bin/python jobs/fetch_demo_corpus.py --storage_uri {raw.parent}")
    shutil.copytree(raw, folder / "raw", dirs_exist_ok=True, copy_function=shutil.copy2)
    for job in ("prepare_corpus", "train_tokenizer", "pack_tokens"):
        command = [sys.executable, f"jobs/{job}.py", "--config", str(demo_training.DEMO / f"{job}.yaml")]
        environment = PRIVATE | running.environment
        done = subprocess.run(
            [*command, "--storage_uri", str(folder)], cwd=ROOT, env=os.environ | environment,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")


def settings(folder: Path, name: str, seed: int) -> TrainConfig:
    """The demo's training settings with that model and seed; scored after the last step."""
    given = yaml.safe_load((demo_training.DEMO / "train_model.yaml").read_text(encoding="utf-8"))
    uris = {"tokens_uri": f"{folder}/tokens", "tokenizer_uri": f"{folder}/tokenizer", "cache_dir": f"{folder}/cache"}
    output = folder / "output" / f"{name.split()[0]}-{seed}"
    changes = {"model": MODELS[name], "seed": seed, "num_steps": STEPS, "storage_uri": str(output), "export": "last"}
    intervals = {"checkpoint_interval_steps": STEPS, "evaluation_interval_steps": STEPS, "wandb_mode": "disabled"}
    return TrainConfig.model_validate(given | uris | changes | intervals)


def train(folder: Path, name: str, seed: int, running: LocalCluster) -> dict[str, float]:
    """One job; its figures."""
    config = settings(folder, name, seed)
    demo_training.finish(demo_training.submit(config, running), config)
    figures: dict[str, Any] = dict(read_manifest(config.resolve(config.output_uri), "model").figures)
    last = journal.read_log(config.resolve(config.checkpoints_uri))[-1]
    loads = {key: last[key] for key in ("expert_load_max", "expert_load_entropy") if key in last}
    return {key: float(figures[key]) for key in ("held_out_bits_per_byte", "tokens_per_second", "tokens")} | loads


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), STUDENT[len(differences)] * spread


def main() -> None:
    given = demo_training.arguments(__doc__, "moe-against-dense")
    given.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    with demo_training.cluster(given.folder / "cluster") as running:
        prepare(given.folder, running)
        for seed in range(given.runs):
            for name in MODELS:
                found[name].append(train(given.folder, name, seed, running))
                print(f"  seed {seed}: {name} {found[name][-1]}", file=sys.stderr, flush=True)
    vocab_size = int(str(read_manifest(f"{given.folder}/tokens", "tokens").figures["vocab_size"]))
    print(f"{STEPS} steps, {found['dense'][0]['tokens']:,.0f} tokens, seeds 0 to {given.runs - 1}")
    print(f"{'':22} {'parameters':>11} {'multiplied':>11} {'bits per byte':>14} {'tokens/s':>9}")
    for name, runs in found.items():
        count = count_parameters(settings(given.folder, name, 0).model, vocab_size)
        score, speed = (
            statistics.fmean(run[key] for run in runs) for key in ("held_out_bits_per_byte", "tokens_per_second")
        )
        print(f"{name:22} {count.total:11,} {count.multiplied:11,} {score:14.4f} {speed:9.0f}")
    dense, mixture = ([run["held_out_bits_per_byte"] for run in runs] for runs in found.values())
    mean, half = interval([after - before for before, after in zip(dense, mixture, strict=True)])
    print(f"mixture less dense: {mean:+.4f} bits per byte, 95 % interval {mean - half:+.4f} to {mean + half:+.4f}")
    print(f"busiest expert over the mean at the end: {max(run['expert_load_max'] for run in found[name]):.2f}")
    print(f"dense / mixture, bits per byte: {statistics.fmean(dense) / statistics.fmean(mixture):.4f}")


if __name__ == "__main__":
    main()
