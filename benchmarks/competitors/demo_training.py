"""The demo's training run on random walks: its inputs, its settings, and the processes that run it.

The settings are jobs/configs/demo's, with changes; the tokens are made, so that the corpus need not be. Ours runs as a
job on a Ray cluster of its own, which is up only while `cluster` is open; the others run under torchrun, without Ray.
It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app.cluster import PRIVATE, LocalCluster, LocalClusterConfig, start_local, stop_local
from app.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent
DEMO = ROOT / "jobs/configs/demo"
TRAIN_BLOCKS, HELD_OUT_BLOCKS = 512, 8
FARTHEST = 3  # from a token to the next in a walk
RAY_CPUS = 4  # two workers, the controller, the export
LOG = "log.txt"
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}


def arguments(description: str | None, folder: str, runs: int = 3, tools: Sequence[str] = ()) -> argparse.Namespace:
    """The command line of a benchmark of training; of one with several tools also which of them, on how many ranks."""
    parser = argparse.ArgumentParser(description=description)
    if tools:
        parser.add_argument("--only", nargs="+", choices=tools, default=tools, help="these alone")
        parser.add_argument("--ranks", type=int, default=2, help="of one thread each")
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / folder
    parser.add_argument("--folder", type=Path, default=default, help="inputs and outputs")
    parser.add_argument("--runs", type=int, default=runs, help="rounds; medians are printed")
    return parser.parse_args()


def settings_of(folder: Path, output: Path, **changes: Any) -> TrainConfig:
    """The demo's settings on the inputs in `folder`, made when they are missing; it writes into `output` alone."""
    vocab_size = _read("train_tokenizer")["vocab_size"]
    block_tokens = _read("pack_tokens")["block_tokens"]
    inputs = folder / f"walks-{vocab_size}-{block_tokens}"
    if not (inputs / "tokens" / "manifest.json").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        _write_inputs(inputs, vocab_size, block_tokens)
    uris = {"tokens_uri": f"{inputs}/tokens", "tokenizer_uri": f"{inputs}/tokenizer", "storage_uri": str(output)}
    fixed = {"cache_dir": f"{inputs}/cache", "wandb_mode": "disabled"}  # the others report to nobody either
    return TrainConfig.model_validate(_read("train_model") | uris | fixed | changes)


def _read(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((DEMO / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings


def _write_inputs(root: Path, vocab_size: int, block_tokens: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from app.artifacts import Manifest, publish
    from app.config import RunConfig
    from app.records import TOKEN_BLOCK
    from app.tokens import tokenizer as bpe

    (root / "tokenizer").mkdir(parents=True)
    bpe.save(bpe.train(["却说刘备引兵南下。"] * 3, 300, 2), root / "tokenizer")
    tokenizer = publish(Manifest.draft("tokenizer", str(root / "tokenizer"), RunConfig(), {}), {})
    sizes = {"train": TRAIN_BLOCKS, "held_out": HELD_OUT_BLOCKS}
    for seed, (split, num_blocks) in enumerate(sizes.items()):
        walks = np.random.default_rng(seed).integers(0, FARTHEST, (num_blocks, block_tokens)).cumsum(1) % vocab_size
        rows = [{"input_ids": walk.tolist(), "document_starts": [0]} for walk in walks]
        (root / "tokens" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, TOKEN_BLOCK), root / "tokens" / split / "0.parquet")
    tokens = HELD_OUT_BLOCKS * block_tokens
    held_out = {"blocks": HELD_OUT_BLOCKS, "tokens": tokens, "tail_tokens": 0, "bytes": tokens}
    draft = Manifest.draft("tokens", str(root / "tokens"), RunConfig(), {"tokenizer": tokenizer.as_input()})
    draft = draft.model_copy(update={"config": draft.config | {"block_tokens": block_tokens}})
    publish(draft, {"vocab_size": vocab_size, "train": {"blocks": TRAIN_BLOCKS}, "held_out": held_out})


@contextmanager
def cluster(folder: Path) -> Iterator[LocalCluster]:
    """A private Ray cluster, up while the block runs. This process does not join it."""
    running = start_local(LocalClusterConfig(folder=str(folder), num_cpus=RAY_CPUS))
    try:
        yield running
    finally:
        stop_local(folder)


def submit(config: TrainConfig, running: LocalCluster) -> subprocess.Popen[str]:
    """The training job on the cluster, in a process of its own; what is in its output folder is deleted."""
    output = _empty(Path(config.storage_uri))
    settings = output / "train.yaml"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "jobs/train_model.py", "--config", str(settings)]
    environment = os.environ | PRIVATE | running.environment
    with (output / LOG).open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=log, stderr=log)


def finish(job: subprocess.Popen[str], config: TrainConfig) -> None:
    """Wait for the job. Raises RuntimeError with the end of its log when it failed."""
    if job.wait():
        raise RuntimeError(f"training failed ({job.returncode}):\n{_tail(Path(config.storage_uri))}")


def job(script: str, settings: dict[str, Any], running: LocalCluster) -> None:
    """Run one of the project's jobs with these settings. Raises RuntimeError with the end of its output."""
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, f"jobs/{script}.py", *arguments]
    environment = os.environ | PRIVATE | running.environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def torchrun(
    script: Path, output: Path, num_processes: int, *options: str, packages: Path | None = None
) -> list[dict[str, Any]]:
    """Run a script on so many ranks, with a folder of further packages; the JSON that each `answer` wrote, by rank.

    Raises RuntimeError with the end of the log when it fails.
    """
    from app.training.stage import CPU_ENVIRONMENT  # takes Ray with it, which the ranks are free of

    _empty(output)
    path = os.pathsep.join(map(str, filter(None, (ROOT, SCRIPTS.parent, packages))))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--nproc-per-node={num_processes}", str(script), str(output), *options]
    environment = os.environ | CPU_ENVIRONMENT | OFFLINE | {"PYTHONPATH": path}
    with (output / LOG).open("w") as log:
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    if process.returncode:
        raise RuntimeError(f"{script.name} failed ({process.returncode}):\n{_tail(output)}")
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(num_processes)]


def trainer_arguments(config: TrainConfig) -> dict[str, Any]:
    """What transformers' Trainer, and those made from it, have the same as ours; nothing is logged or saved."""
    optimizer = config.optimizer
    return {
        "use_cpu": True,
        "max_steps": config.num_steps,
        "optim": "adamw_torch",
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "max_grad_norm": optimizer.gradient_clipping,
        "seed": config.seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def answer(output: Path, figures: dict[str, Any]) -> None:
    """What a rank under torchrun has measured."""
    (output / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(figures))


def _empty(output: Path) -> Path:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    return output


def _tail(output: Path) -> str:
    return f"{output / LOG} ends:\n{(output / LOG).read_text(errors='replace')[-3000:]}"
