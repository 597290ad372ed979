"""A run that is killed and submitted again equals the undisturbed one; what is exported is what was trained."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from app.artifacts import Input, Manifest, publish, read_manifest
from app.cluster import LocalCluster
from app.config import RunConfig
from app.records import TOKEN_BLOCK
from app.training import stage
from app.training.config import TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE, BLOCK_TOKENS, HELD_OUT_BYTES = 300, 32, 1000
SETTINGS = {
    "model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
    "num_steps": 60,
    "global_batch_sequences": 8,
    "micro_batch_sequences": 2,
    "checkpoint_interval_steps": 10,
    "evaluation_interval_steps": 30,
    "wandb_mode": "disabled",
}


def write_inputs(root: Path) -> None:
    """A tokenizer, and random walks through its ids as tokens; the held-out blocks fill no whole batch."""
    from app.tokens import tokenizer as bpe

    (root / "tokenizer").mkdir()
    bpe.save(bpe.train(["却说刘备引兵南下。"] * 3, VOCAB_SIZE, 2), root / "tokenizer")
    tokenizer = publish(Manifest.draft("tokenizer", str(root / "tokenizer"), RunConfig(), {}), {})
    walks = np.random.default_rng(0).integers(0, 3, (103, BLOCK_TOKENS)).cumsum(1) % VOCAB_SIZE
    for split, blocks in (("train", walks[:96]), ("held_out", walks[96:])):
        rows = [{"input_ids": block.tolist(), "document_starts": [0]} for block in blocks]
        (root / "tokens" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, TOKEN_BLOCK), root / "tokens" / split / "0.parquet")
    held_out = {"documents": 7, "blocks": 7, "tokens": 7 * BLOCK_TOKENS + 5, "tail_tokens": 5, "bytes": HELD_OUT_BYTES}
    inputs: dict[str, Input] = {"tokenizer": tokenizer.as_input()}
    draft = Manifest.draft("tokens", str(root / "tokens"), RunConfig(), inputs)
    draft = draft.model_copy(update={"config": draft.config | {"block_tokens": BLOCK_TOKENS}})
    publish(draft, {"vocab_size": VOCAB_SIZE, "held_out": held_out})


def config_of(inputs: Path, root: Path, **changes: object) -> dict[str, object]:
    """Settings of a run in `root` on the inputs of another folder."""
    uris = {"tokens_uri": f"{inputs}/tokens", "tokenizer_uri": f"{inputs}/tokenizer", "storage_uri": str(root)}
    return {**SETTINGS, **uris, **changes}


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root)))
    return root


def log_of(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "model" / "training_log.jsonl").read_text().splitlines()]


def test_the_model_scores_what_the_trainer_reported(undisturbed: Path) -> None:
    """The exported weights, loaded by transformers alone, give the trainer's bits per byte."""
    import torch
    from transformers import AutoModelForCausalLM

    figures = read_manifest(f"{undisturbed}/model", "model").figures
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    assert model.dtype == torch.float32
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["restarts"] == 0
    rows = pq.read_table(undisturbed / "tokens" / "held_out" / "0.parquet").column("input_ids").to_pylist()
    blocks = torch.tensor(rows)  # [7, T]
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)  # mean over T-1 scored tokens of a block
    scored = 7 * (BLOCK_TOKENS - 1)
    scored_bytes = HELD_OUT_BYTES * scored / (7 * BLOCK_TOKENS + 5)
    bits_per_byte = loss * scored / math.log(2) / scored_bytes
    assert log_of(undisturbed)[-1]["held_out_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
    assert loss < 0.7 * math.log(VOCAB_SIZE)  # it has learned, so the comparison says something


def test_a_killed_job_submitted_again_changes_nothing(undisturbed: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    """SIGKILL of the whole job after its first checkpoint, and a half-written newer checkpoint left behind."""
    settings = tmp_path / "train.yaml"
    settings.write_text(yaml.safe_dump(config_of(undisturbed, tmp_path)))
    command = [sys.executable, "jobs/train_model.py", "--config", str(settings)]
    options = {"cwd": ROOT, "env": os.environ | cluster.environment, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + 240
    while not (snapshots := list(tmp_path.glob("checkpoints/*/checkpoint_manager_snapshot.json"))):
        assert first.poll() is None, "the job ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "model" / "manifest.json").exists()
    half_written = snapshots[0].parent / "checkpoint_2999-01-01_00-00-00.000000"
    (half_written / "state").mkdir(parents=True)
    (half_written / "training_log.jsonl").write_text("{")
    again = subprocess.run(command, capture_output=True, timeout=300, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming after step" in again.stderr
    for field in ("step", "loss", "learning_rate", "grad_norm"):
        assert [line[field] for line in log_of(tmp_path)] == [line[field] for line in log_of(undisturbed)]
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (tmp_path, undisturbed)]
    assert weights[0] == weights[1]
    assert read_manifest(f"{tmp_path}/model", "model").figures["restarts"] == 1


def test_a_diverging_run_is_the_users_to_mend(undisturbed: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    settings = tmp_path / "train.yaml"
    changes = {"num_steps": 20, "optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}
    settings.write_text(yaml.safe_dump(config_of(undisturbed, tmp_path, **changes)))
    command = [sys.executable, "jobs/train_model.py", "--config", str(settings)]
    environment = os.environ | cluster.environment
    result = subprocess.run(command, capture_output=True, timeout=300, cwd=ROOT, env=environment, text=True)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "lower optimizer.learning_rate or check the data" in result.stderr.splitlines()[-1]
    assert len(list(tmp_path.glob("checkpoints/*/starts/*"))) == 1  # not retried
    assert not (tmp_path / "model").exists()
