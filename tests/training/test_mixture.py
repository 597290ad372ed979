"""A mixture of experts on two workers under ZeRO-3 learns, resumes bit for bit and is exported as it was trained."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.planning.estimate import Shape, checkpoint_bytes, memory_of
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from app.training.sizes import count_parameters
from tests.training.runs import assert_equal_runs, kill_and_submit_again
from tests.training.tiny import BLOCK_TOKENS, HELD_OUT_BYTES, SETTINGS, VOCAB_SIZE, config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL = SETTINGS["model"] | {
    "architecture": "qwen3_moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_intermediate_size": 96,
    "router_aux_loss_coefficient": 0.01,
    "head_size": 32,
}
CHANGES: dict[str, Any] = {"model": MODEL, "num_steps": 40, "evaluation_interval_steps": 20, "export": "last"}


@pytest.fixture(scope="module")
def trained(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root, **CHANGES)))
    return root


def test_it_learns_and_tells_the_load_of_its_experts(trained: Path) -> None:
    log = log_of(trained)
    losses = [line["loss"] for line in log]
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.6)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    for line in log:
        assert 0 <= line["expert_load_min"] <= 1 <= line["expert_load_max"] <= 4
        assert 0 < line["expert_load_entropy"] <= 1
        assert line["expert_load_max"] == max(line["expert_load_max_layer_00"], line["expert_load_max_layer_01"])
        assert line["balance_loss"] >= 1.9  # 2 when even
    noted = journal.read_events(f"{trained}/checkpoints", "experts")
    assert [event["step"] for event in noted] == [20, 40]
    assert [sum(shares) for shares in noted[-1]["shares"]] == pytest.approx([1, 1], abs=1e-5)
    assert "<h2>Load of the experts</h2>" in (trained / "checkpoints" / "report.html").read_text()


def test_the_exported_weights_are_finite_and_score_what_the_trainer_reported(trained: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    figures = read_manifest(f"{trained}/model", "model").figures
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not model.config.output_router_logits
    assert model.config.router_aux_loss_coef == 0.01
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if ".experts." in name:
            assert 0.01 < parameter.std() < 0.2
            assert not torch.equal(parameter[0], parameter[1])
    rows = pq.read_table(trained / "tokens" / "held_out" / "0.parquet").column("input_ids").to_pylist()
    blocks = torch.tensor(rows)  # [7, T]
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)
    scored = 7 * (BLOCK_TOKENS - 1)
    bits_per_byte = loss * scored / math.log(2) / (HELD_OUT_BYTES * scored / (7 * BLOCK_TOKENS + 5))
    assert log_of(trained)[-1]["held_out_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)


def test_its_checkpoint_is_as_large_as_planned(trained: Path) -> None:
    """And each rank's optimizer states are the half that the memory plan says."""
    config = TrainConfig.model_validate(config_of(trained, trained, **CHANGES))
    newest, *_ = checkpoint.find_complete(f"{trained}/checkpoints")
    files = [path for path in (trained / "checkpoints" / "checkpoints" / newest.name).iterdir() if path.suffix == ".pt"]
    optimizer = [path.stat().st_size for path in files if path.name.endswith("optim_states.pt")]
    planned = memory_of(config, Shape(VOCAB_SIZE, BLOCK_TOKENS), 2)
    assert optimizer == pytest.approx([planned.optimizer] * 2, rel=0.05)
    total = count_parameters(config.model, VOCAB_SIZE).total
    assert sum(path.stat().st_size for path in files) == pytest.approx(checkpoint_bytes(config, total), rel=0.1)


@pytest.mark.long
def test_a_killed_job_submitted_again_changes_nothing(trained: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    kill_and_submit_again(tmp_path, trained, cluster, **CHANGES)
    assert_equal_runs(tmp_path, trained)
    assert [line["expert_load_max"] for line in log_of(tmp_path)] == [
        line["expert_load_max"] for line in log_of(trained)
    ]


@pytest.fixture(scope="module")
def continued(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps more from the exported model, under ZeRO-3."""
    return go_on(trained, tmp_path_factory.mktemp("continued"))


def go_on(trained: Path, root: Path, **changes: Any) -> Path:
    given = {"model": {}, "init_from_uri": f"{trained}/model", "num_steps": 4, "checkpoint_interval_steps": 4}
    stage.run(TrainConfig.model_validate(config_of(trained, root, **CHANGES | given | changes)))
    return root


def test_it_goes_on_from_a_hugging_face_folder(trained: Path, continued: Path) -> None:
    losses = [line["loss"] for line in log_of(continued)]
    assert losses[0] < 0.6 * log_of(trained)[0]["loss"]
    assert {"expert_load_max", "balance_loss"} <= log_of(continued)[0].keys()


@pytest.mark.long  # test_deepseek.py has others
@pytest.mark.parametrize("changes", [{"zero_stage": 0}, {"activation_checkpointing": True, "offload_optimizer": "cpu"}])
def test_the_loss_does_not_depend_on(trained: Path, continued: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """As for dense models, and neither does the load."""
    lines, wanted = log_of(go_on(trained, tmp_path, **changes)), log_of(continued)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], abs=2e-5)
    assert [line["expert_load_max"] for line in lines] == [line["expert_load_max"] for line in wanted]
