"""Training a model whose layers see chosen blocks: settings, cost, and a run from fresh weights to a folder."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.cluster import LocalCluster
from app.training.config import ModelConfig, TrainConfig
from app.training.sizes import seen_tokens
from tests.training.tiny import (
    BLOCK_TOKENS,
    HELD_OUT_BLOCKS,
    HELD_OUT_BYTES,
    SETTINGS,
    TRAIN_BLOCKS,
    config_of,
    log_of,
    walks,
    write_inputs,
)

BLOCKS: dict[str, Any] = {"architecture": "qwen3", "attention_block_tokens": 4, "attention_blocks": 3}
MODEL = SETTINGS["model"] | BLOCKS | {"num_layers": 3, "global_every": 3}
SHORT = {"num_steps": 30, "checkpoint_interval_steps": 10, "model": MODEL}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "llama"}, "attention_block_tokens needs architecture qwen3 .it is llama"),
        ({"attention_blocks": 0}, "belong together"),
        ({"attention_block_tokens": 0}, "belong together"),
        ({"attention_blocks": 1}, "attention_blocks to 2 or more"),
        ({"sliding_window_tokens": 8}, "sliding_window_tokens needs architecture olmo3"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate(BLOCKS | changes)


def test_what_blocks_cost() -> None:
    """A token sees two whole blocks and, as a mean, half of its own; PaLM counts a causal layer twice."""
    model = ModelConfig.model_validate(BLOCKS | {"num_layers": 6, "global_every": 3, "attention_block_tokens": 64})
    assert (model.num_local_layers, model.local_tokens) == (4, 160)
    assert seen_tokens(8192, 6, model.num_local_layers, model.local_tokens) == (4 * 320 + 2 * 8192) / 6


@pytest.mark.slow
def test_the_model_costs_what_its_config_says() -> None:
    """The worker asks the model, planning the config."""
    from app.planning.estimate import Shape, training_flops
    from app.training.engine import fresh_model
    from app.training.worker import _workload

    config = TrainConfig.model_validate({"model": MODEL})
    shape = {"vocab_size": 300, "block_tokens": 64, "end_of_text_id": 0}
    model = fresh_model(config, shape)
    work = _workload(config, model, 64, use_gpu=False)
    assert work.flops_per_token == training_flops(config, Shape(300, 64))
    dense = TrainConfig.model_validate(
        {"model": MODEL | dict.fromkeys(("attention_block_tokens", "attention_blocks", "global_every"), 0)}
    )
    assert training_flops(dense, Shape(300, 64)) - work.flops_per_token == 12 * 2 * 64 * (64 - 2 * 2.5 * 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ""),
        ({"document_masking": True, "compile": True}, "compile, document_masking"),
        ({"float8": "rowwise"}, "float8"),
    ],
)
def test_a_base_with_blocks(changes: dict[str, Any], named: str) -> None:
    """What is refused of fresh weights is refused of a folder to start from."""
    from app.training.families import refuse_untried_with_blocks

    config = TrainConfig.model_validate({"init_from_uri": "base", **changes})
    refuse_untried_with_blocks(config, {"model_type": "qwen3"})
    if not named:
        refuse_untried_with_blocks(config, {"attention_block_tokens": 64})
        return
    with pytest.raises(ValueError, match=f"chosen blocks only; {named}: not tried"):
        refuse_untried_with_blocks(config, {"attention_block_tokens": 64})


@pytest.fixture(scope="module")
def trained(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from app.training import stage

    root = tmp_path_factory.mktemp("blocks")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root, **SHORT)))
    return root


@pytest.mark.ray
@pytest.mark.slow
def test_it_learns_and_its_model_scores_what_training_scored(trained: Path) -> None:
    """The exported model, read by transformers, has the training stage's own held-out figure."""
    import torch

    from app.artifacts import read_manifest
    from app.models import load_model
    from app.training.held_out import nats_of

    losses = [line["loss"] for line in log_of(trained)]
    assert losses[-1] < losses[0] - 0.5
    model = load_model(trained / "model")
    assert type(model).__name__ == "BlockSparseQwen3ForCausalLM"
    assert BLOCK_TOKENS // (MODEL["attention_blocks"] * MODEL["attention_block_tokens"]) == 2
    ids = torch.from_numpy(walks(0, TRAIN_BLOCKS + HELD_OUT_BLOCKS)[TRAIN_BLOCKS:])
    with torch.no_grad():
        logits = model(ids).logits
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    figures = read_manifest(f"{trained}/model", "model").figures
    scored_bytes = HELD_OUT_BYTES * HELD_OUT_BLOCKS * (BLOCK_TOKENS - 1) / (HELD_OUT_BLOCKS * BLOCK_TOKENS + 5)
    bits = float(nats_of(logits, targets)) / math.log(2) / scored_bytes
    assert bits == pytest.approx(float(str(figures["held_out_bits_per_byte"])), abs=1e-4)  # as it is rounded


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_settings_of_how_change_no_loss(trained: Path, tmp_path: Path) -> None:
    """From the exported folder, under ZeRO 0 and 3."""
    from app.training import stage

    found = []
    for index, changes in enumerate(({"zero_stage": 0}, {"zero_stage": 3, "activation_checkpointing": True})):
        root = tmp_path / str(index)
        short = {"num_steps": 4, "checkpoint_interval_steps": 4, "evaluation_interval_steps": 4}
        config = config_of(trained, root, **short, **changes, init_from_uri=f"{trained}/model")
        stage.run(TrainConfig.model_validate(config))
        found.append([line["loss"] for line in log_of(root)])
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    first = log_of(trained)
    assert found[0][0] < first[0]["loss"] - 0.5
