"""From a base model that answers nothing to one that does: all weights, LoRA, resumed LoRA, merged, and preferences."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from app.artifacts import Manifest, read_manifest
from app.cluster import LocalCluster
from app.conversations import stage as conversations
from app.conversations.config import PackConversationsConfig
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from tests.conversations.tiny import CONTEXT_TOKENS, preferences, records, write_base, write_jsonl, write_tokenizer
from tests.training.runs import finish, start, wait_for_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 60
ADAPTER = {"rank": 8, "alpha": 32}


def settings(inputs: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A tuning run in `root` on the inputs' conversations, begun on their base model."""
    given = {
        "storage_uri": str(root),
        "tokens_uri": f"{inputs}/conversations",
        "tokenizer_uri": f"{inputs}/tokenizer",
        "init_from_uri": f"{inputs}/base",
        "cache_dir": f"{inputs}/cache",
        "document_masking": True,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5, "weight_decay": 0.0},
        "num_steps": STEPS,
        "global_batch_sequences": 8,
        "micro_batch_sequences": 4,
        "checkpoint_interval_steps": 20,
        "evaluation_interval_steps": 20,
        "wandb_mode": "disabled",
    }
    return {**given, **changes}


def train(inputs: Path, root: Path, **changes: Any) -> Manifest:
    return stage.run(TrainConfig.model_validate(settings(inputs, root, **changes)))


@pytest.fixture(scope="module")
def inputs(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, base model, and packed conversations and preferences."""
    root = tmp_path_factory.mktemp("tuning")
    write_base(write_tokenizer(root / "tokenizer"), root / "base")
    for name, rows in (("conversations", records()), ("preferences", preferences())):
        write_jsonl(root / f"{name}.jsonl", rows)
        given = {"storage_uri": str(root), "sources": [f"{name}.jsonl"], "block_tokens": CONTEXT_TOKENS}
        given |= {"output_uri": name, "held_out_fraction": 0.1}
        conversations.run(PackConversationsConfig.model_validate(given))
    return root


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights tuned."""
    root = tmp_path_factory.mktemp("whole")
    train(inputs, root)
    return root


@pytest.fixture(scope="module")
def adapted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained, undisturbed."""
    root = tmp_path_factory.mktemp("adapted")
    train(inputs, root, adapter=ADAPTER, output_uri="adapters/json")
    return root


def test_all_weights_learn_the_answers(inputs: Path, whole: Path) -> None:
    figures = read_manifest(f"{whole}/model", "model").figures
    print(figures)


def test_an_adapter_learns_the_answers(inputs: Path, adapted: Path) -> None:
    figures = read_manifest(f"{adapted}/adapters/json", "adapter").figures
    print(figures)
