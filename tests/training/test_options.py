"""Settings that change how a run is computed and not what: each gives the losses of the plain run.

All start from the same weights: ZeRO-3 draws fresh ones in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint, stage
from app.training.config import TrainConfig
from tests.training.tiny import BLOCK_TOKENS, config_of, log_of, walks, write_inputs, write_tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SHORT = {"num_steps": 8, "checkpoint_interval_steps": 4, "evaluation_interval_steps": 4}


@pytest.fixture(scope="module")
def plain(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root, **SHORT)))
    return root


def from_weights(plain: Path) -> dict[str, Any]:
    return {"init_from_uri": f"{plain}/model"}


@pytest.fixture(scope="module")
def continued(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all are compared to: ZeRO-3."""
    root = tmp_path_factory.mktemp("continued")
    stage.run(TrainConfig.model_validate(config_of(plain, root, **SHORT, **from_weights(plain))))
    return root


def losses(root: Path) -> list[float]:
    return [line["loss"] for line in log_of(root)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"zero_stage": 0}, marks=pytest.mark.long),
        pytest.param({"zero_stage": 2, "activation_checkpointing": True}, marks=pytest.mark.long),
        {"offload_parameters": "cpu", "offload_optimizer": "cpu"},
        {  # the last micro-batch is filled up with rows of no weight
            "zero_stage": 1,
            "offload_optimizer": "cpu",
            "micro_batch_sequences": 3,
            "attention": "eager",
        },
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_the_loss_does_not_depend_on(plain: Path, continued: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    stage.run(TrainConfig.model_validate(config_of(plain, tmp_path, **SHORT, **changes, **from_weights(plain))))
    assert losses(tmp_path) == pytest.approx(losses(continued), abs=2e-5)
    figures = [read_manifest(f"{root}/model", "model").figures for root in (continued, tmp_path)]
    assert figures[1]["held_out_bits_per_byte"] == pytest.approx(figures[0]["held_out_bits_per_byte"], abs=2e-4)


def test_products_in_8_bits_cost_little(plain: Path, continued: Path, tmp_path: Path) -> None:
    changes = {"float8": "tensorwise", "activation_checkpointing": True}
    stage.run(TrainConfig.model_validate(config_of(plain, tmp_path, **SHORT, **changes, **from_weights(plain))))
    assert losses(tmp_path) != pytest.approx(losses(continued), rel=1e-5)  # rounded, or nothing is tested
    assert losses(tmp_path) == pytest.approx(losses(continued), rel=0.01)
    figures = [read_manifest(f"{root}/model", "model").figures for root in (continued, tmp_path)]
    assert figures[1]["held_out_bits_per_byte"] == pytest.approx(figures[0]["held_out_bits_per_byte"], rel=0.01)


def test_continued_pretraining_with_replay(plain: Path, tmp_path: Path) -> None:
    """From a Hugging Face folder, on new text with a quarter of the old; a Ray task scores both while it trains."""
    tokenizer = read_manifest(f"{plain}/tokenizer", "tokenizer")
    blocks = walks(1, 60)[:, ::-1].copy()  # backwards: another text
    write_tokens(tmp_path / "tokens", tokenizer, blocks[:50], blocks[50:])
    config = config_of(plain, tmp_path, **SHORT) | {
        "tokens_uri": "tokens",
        **from_weights(plain),
        "replay": {"tokens_uri": f"{plain}/tokens", "share": 0.25},
        "validation": "async",
    }
    stage.run(TrainConfig.model_validate(config))
    figures = read_manifest(f"{tmp_path}/model", "model").figures
    assert figures["epochs"] == pytest.approx(8 * 6 / 50, abs=1e-4)  # two of each eight rows are old
    assert {"held_out_bits_per_byte", "replay_bits_per_byte"} <= figures.keys()
    scores = checkpoint.read_scores(f"{tmp_path}/checkpoints")
    assert 8 in scores
    old = read_manifest(f"{plain}/model", "model").figures
    assert figures["replay_bits_per_byte"] < 1.1 * float(str(old["held_out_bits_per_byte"]))  # not forgotten
    assert losses(tmp_path)[0] != pytest.approx(losses(plain)[0], abs=0.1)  # it did not start from scratch
    assert figures["tokens"] == BLOCK_TOKENS * 8 * 8


def test_a_model_that_does_not_fit_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init_from_uri: \S+/config.json does not exist"):
        stage.run(TrainConfig.model_validate(config_of(plain, tmp_path, init_from_uri="/nowhere")))
