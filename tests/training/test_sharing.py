"""Workers that share a block's tokens, or each layer's matrices, learn what one learns; also when one is killed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from app.training.layout import Layout
from tests.training.runs import assert_equal_runs, kill_a_worker
from tests.training.tiny import BLOCK_TOKENS, SETTINGS, VOCAB_SIZE, config_of, log_of, write_inputs

if TYPE_CHECKING:
    import torch

SHORT = {"num_steps": 40, "checkpoint_interval_steps": 10, "evaluation_interval_steps": 20}
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"sequence_parallel": 2, "zero_stage": 3},
    "matrices": {"tensor_parallel": 2, "zero_stage": 2},
}
KILLED_AFTER = 10  # steps: the run goes on from there or a later checkpoint


def test_a_part_predicts_the_first_token_of_the_next() -> None:
    import torch

    from app.training.sharing import model_inputs

    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 8, -100)}
    parts = [model_inputs(batch, Layout(rank, 2, 2)) for rank in range(2)]
    assert parts[0]["shift_labels"].tolist() == [[1, 2, 3], [7, -100, 9]]
    assert parts[1]["shift_labels"].tolist() == [[4, 5, -100], [10, 11, -100]]
    assert parts[1]["input_ids"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert parts[1]["position_ids"].tolist() == [[3, 4, 5]] * 2
    assert model_inputs(batch, Layout(1, 2, 1, 2)).keys() == batch.keys()  # beside it, whole blocks
    summed = sum(loss(part["input_ids"], part["shift_labels"]) for part in parts)
    assert summed == pytest.approx(loss(ids[:, :-1], batch["labels"][:, 1:]))


def loss(ids: torch.Tensor, targets: torch.Tensor) -> float:
    """Of a table as the model, summed."""
    import torch

    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    return float(torch.nn.functional.cross_entropy(table[ids.flatten()], targets.flatten(), reduction="sum"))


def test_parts_of_matrices_are_joined() -> None:
    import torch

    from app.training.export import join

    whole = torch.arange(24.0).view(4, 6)
    assert torch.equal(join(whole.split(2, 0), whole.shape), whole)  # columns of the product
    assert torch.equal(join(whole.split(3, 1), whole.shape), whole)  # rows
    assert join([whole, whole], whole.shape) is whole  # what every rank has


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, and the weights that all runs start from: ZeRO-3 draws fresh ones in another order."""
    import torch

    from app.training.engine import fresh_model

    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    torch.manual_seed(0)
    config = TrainConfig.model_validate({"model": SETTINGS["model"] | {"num_heads": 4, "num_key_value_heads": 2}})
    shape = {"vocab_size": VOCAB_SIZE, "block_tokens": BLOCK_TOKENS, "end_of_text_id": 0}
    fresh_model(config, shape).save_pretrained(root / "fresh")
    return root


def settings(inputs: Path, root: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(config_of(inputs, root, init_from_uri=f"{inputs}/fresh", **SHORT, **changes))


@pytest.fixture(scope="module")
def alone(cluster: LocalCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of it."""
    root = tmp_path_factory.mktemp("alone")
    stage.run(settings(inputs, root, num_workers=1, zero_stage=0))
    return root


@pytest.fixture(scope="module")
def shared(cluster: LocalCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The undisturbed run of each way, made once."""

    @cache
    def run(way: str) -> Path:
        root = tmp_path_factory.mktemp(way)
        stage.run(settings(inputs, root, **WAYS[way]))
        return root

    return run


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_sharing_changes_nothing(inputs: Path, alone: Path, shared: Callable[[str], Path], way: str) -> None:
    calm = shared(way)
    lines, expected = log_of(calm), log_of(alone)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)
    for name in ("rows", "learning_rate"):
        assert [line[name] for line in lines] == [line[name] for line in expected]
    figures, others = (read_manifest(f"{root}/model", "model").figures for root in (calm, alone))
    assert figures["parameters"] == others["parameters"]
    counted = [journal.read_events(f"{root}/checkpoints", "started")[0]["all_parameters"] for root in (calm, alone)]
    assert counted[0] == counted[1] == figures["parameters"]
    assert score(settings(inputs, calm), calm / "model") == pytest.approx(lines[-1]["held_out_bits_per_byte"], rel=1e-5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_worker_changes_nothing(
    cluster: LocalCluster, inputs: Path, shared: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_worker, f"{tmp_path}/checkpoints", cluster, KILLED_AFTER)
        stage.run(settings(inputs, tmp_path, **WAYS[way]))
        killed.result()
    assert read_manifest(f"{tmp_path}/model", "model").figures["restarts"] == 1
    assert_equal_runs(tmp_path, shared(way))


def score(config: TrainConfig, model: Path) -> float:
    """By transformers alone."""
    from transformers import AutoModelForCausalLM

    from app.training import held_out

    whole = AutoModelForCausalLM.from_pretrained(model)
    return held_out.score(held_out.open_all(config), whole, config.micro_batch_sequences)[checkpoint.SCORE]
