"""Training stage: Ray Train hosts the DeepSpeed workers, restarts them after a failure and resumes.

A run's folder under checkpoints_uri is named by the hash of its settings and data: the same job submitted again
continues it, a job with other settings never does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors import safe_open

from app import cluster, storage
from app.artifacts import Manifest, clear, find_complete, publish, read_manifest
from app.models import END_OF_TEXT
from app.training.config import TrainConfig
from app.training.telemetry import STARTS

logger = logging.getLogger(__name__)

CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "1",  # the number of devices; unset, DeepSpeed runs numactl several times a step
    "OMP_NUM_THREADS": "1",
}
_NOT_OF_THE_RUN = {"storage_uri", "overwrite", "output_uri", "max_failures", "wandb_mode", "keep_checkpoints"}


def run(config: TrainConfig) -> Manifest:
    """Train, or resume, to the last step and make the model artifact.

    Raises ValueError when the inputs do not fit or a worker finds the user's mistake.
    """
    uri = config.resolve(config.output_uri)
    tokens = read_manifest(config.resolve(config.tokens_uri), "tokens")
    tokenizer = read_manifest(config.resolve(config.tokenizer_uri), "tokenizer")
    inputs = {"tokens": tokens.as_input(), "tokenizer": tokenizer.as_input()}
    draft = Manifest.draft("model", uri, config, inputs)
    if done := find_complete(draft, config.overwrite):
        return done
    if tokens.inputs["tokenizer"].digest != tokenizer.digest:
        raise ValueError(f"{tokens.uri}: packed with another tokenizer than {tokenizer.uri}; run pack_tokens again")
    clear(uri)
    cluster.connect()
    use_gpu = cluster.has_gpu()
    run_name = run_identity(draft)
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "run_uri": f"{config.resolve(config.checkpoints_uri)}/{run_name}",
        "use_gpu": use_gpu,
        "end_of_text_id": _end_of_text_id(tokenizer.uri),
    }
    logger.info("run %s: %d workers on %s", run_name, config.num_workers, "GPUs" if use_gpu else "CPUs")
    _refuse_damaged(job["run_uri"])
    if diverged := _trainer(config, job, run_name).fit().return_value:
        raise ValueError(diverged)
    restarts = len(storage.list_files(f"{job['run_uri']}/{STARTS}")) - 1
    sizes = {"parameters": _num_parameters(uri), "block_tokens": tokens.config["block_tokens"]}
    return publish(draft, sizes | summarize(_read_log(uri), config, sizes["block_tokens"]) | {"restarts": restarts})


def run_identity(draft: Manifest) -> str:
    """16 hex digits of the settings that shape the run and of its inputs."""
    settings = {name: value for name, value in draft.config.items() if name not in _NOT_OF_THE_RUN}
    content = [settings, {name: given.digest for name, given in draft.inputs.items()}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_damaged(run_uri: str) -> None:
    """Ray Train rewrites its list of complete checkpoints in place, so a kill can cut it short."""
    path = f"{run_uri}/checkpoint_manager_snapshot.json"
    if not storage.exists(path):
        return
    try:
        with storage.open_file(path) as file:
            json.load(file)
    except ValueError:
        raise ValueError(f"{path}: cut short by a kill; delete {run_uri} to train from the start") from None


def _trainer(config: TrainConfig, job: dict[str, Any], run_name: str) -> TorchTrainer:
    from app.training.loop import train_per_worker

    use_gpu = job["use_gpu"]
    return TorchTrainer(
        train_per_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=config.resolve(config.checkpoints_uri),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={} if use_gpu else {"env_vars": CPU_ENVIRONMENT},
        ),
    )


def _end_of_text_id(tokenizer_uri: str) -> int:
    with storage.local_copy(tokenizer_uri) as folder:
        added = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return next(int(token["id"]) for token in added if token["content"] == END_OF_TEXT)


def _read_log(model_uri: str) -> list[dict[str, float]]:
    with storage.open_file(f"{model_uri}/training_log.jsonl", "r", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _num_parameters(model_uri: str) -> int:
    """Counted from the headers of the exported weights."""
    total = 0
    with storage.local_copy(model_uri) as folder:
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "np") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def summarize(log: list[dict[str, float]], config: TrainConfig, block_tokens: int) -> dict[str, Any]:
    """The figures of the manifest from the lines of the steps; the train loss is the mean of the last tenth."""
    assert [line["step"] for line in log] == list(range(config.num_steps)), "a step is missing or there twice"
    last = log[-max(1, len(log) // 10) :]
    speeds = sorted(line["tokens_per_second"] for line in log)
    figures = {
        "steps": len(log),
        "tokens": len(log) * config.global_batch_sequences * block_tokens,
        "train_loss": round(sum(line["loss"] for line in last) / len(last), 4),
        "tokens_per_second": round(speeds[len(speeds) // 2]),
    }
    if "held_out_bits_per_byte" in log[-1]:
        figures["held_out_bits_per_byte"] = round(log[-1]["held_out_bits_per_byte"], 4)
    return figures
