"""DeepSeek's mixture on two workers under ZeRO-3: its bias evens out the load, resumes bit for bit, and is exported."""

from pathlib import Path
from typing import Any

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint, export, stage
from app.training.config import TrainConfig
from tests.training.runs import assert_equal_runs, kill_and_submit_again
from tests.training.tiny import SETTINGS, config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RATE = 1 / 128  # a power of two: sums of it are exact
MODEL = SETTINGS["model"] | {
    "architecture": "deepseek_v3",
    "num_layers": 3,
    "num_dense_layers": 1,
    "num_experts": 8,
    "experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
    "latent": {
        "key_value_rank": 32,
        "query_rank": 24,
        "rope_head_size": 16,
        "plain_head_size": 16,
        "value_head_size": 16,
    },
}
CHANGES: dict[str, Any] = {
    "model": MODEL,
    "num_steps": 40,
    "evaluation_interval_steps": 20,
    "export": "last",
    "optimizer": SETTINGS["optimizer"] | {"router_bias_rate": RATE},
}


def train(inputs: Path, root: Path, **changes: Any) -> Path:
    stage.run(TrainConfig.model_validate(config_of(inputs, root, **CHANGES | changes)))
    return root


@pytest.fixture(scope="module")
def trained(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deepseek")
    write_inputs(root)
    return train(root, root)


@pytest.fixture(scope="module")
def unmoved(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a bias."""
    changes = {"optimizer": SETTINGS["optimizer"] | {"router_bias_rate": 0.0}}
    return train(trained, tmp_path_factory.mktemp("unmoved"), **changes)


def biases_in(root: Path) -> dict[str, list[float]]:
    """Of the exported model, by layer."""
    from safetensors import safe_open

    with safe_open(root / "model" / "model.safetensors", "pt") as file:
        names = sorted(name for name in file.keys() if name.endswith("e_score_correction_bias"))  # noqa: SIM118
        assert all(file.get_slice(name).get_dtype() == "F32" for name in names)
        return {name.split(".")[2]: file.get_tensor(name).tolist() for name in names}


def load_of(root: Path) -> float:
    """Of the busiest expert over the mean, the mean over the last steps."""
    lines = log_of(root)[-10:]
    return float(sum(line["expert_load_max"] for line in lines)) / len(lines)


def test_it_learns_and_its_bias_evens_out_the_load(trained: Path, unmoved: Path) -> None:
    log = log_of(trained)
    losses = [line["loss"] for line in log]
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert {"expert_load_max_layer_00", "expert_load_max_layer_01", "expert_load_entropy"} <= log[0].keys()
    assert "balance_loss" not in log[0]
    assert log[0]["router_bias_max"] == RATE
    assert {line["router_bias_max"] for line in log_of(unmoved)} == {0.0}
    assert load_of(trained) < 0.75 * load_of(unmoved)


def test_the_bias_is_exported_and_scores_what_the_trainer_reported(trained: Path, unmoved: Path) -> None:
    from transformers import AutoModelForCausalLM

    from app.training import held_out
    from app.training.families import biases_of

    found = biases_in(trained)
    assert list(found) == ["1", "2"]
    for layer in found.values():
        moves = [bias / RATE for bias in layer]
        assert moves == [round(move) for move in moves]
        assert any(moves)
        assert max(map(abs, moves)) <= 40
    assert max(abs(bias) for layer in found.values() for bias in layer) == log_of(trained)[-1]["router_bias_max"]
    assert biases_in(unmoved) == {layer: [0.0] * 8 for layer in ("1", "2")}
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}.items() <= model.config.to_dict().items()
    assert [bias.tolist() for _, bias in sorted(biases_of(model).items())] == list(found.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    figures = read_manifest(f"{trained}/model", "model").figures
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    config = TrainConfig.model_validate(config_of(trained, trained, **CHANGES))
    scores = held_out.score(held_out.open_all(config), model, 2)
    assert log_of(trained)[-1]["held_out_bits_per_byte"] == pytest.approx(scores["held_out_bits_per_byte"], rel=1e-5)


@pytest.mark.long
def test_a_killed_job_submitted_again_changes_nothing(trained: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    kill_and_submit_again(tmp_path, trained, cluster, **CHANGES)
    assert_equal_runs(tmp_path, trained)
    assert biases_in(tmp_path) == biases_in(trained)


def short(trained: Path) -> dict[str, Any]:
    """Four steps from the exported model: fresh weights are drawn otherwise under ZeRO-3."""
    intervals = {"num_steps": 4, "checkpoint_interval_steps": 2, "evaluation_interval_steps": 2}
    return {"model": {}, "init_from_uri": f"{trained}/model"} | intervals


@pytest.fixture(scope="module")
def continued(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(trained, tmp_path_factory.mktemp("continued"), **short(trained))


def test_it_goes_on_from_a_hugging_face_folder(trained: Path, continued: Path) -> None:
    assert log_of(continued)[0]["loss"] < 0.6 * log_of(trained)[0]["loss"]
    before, after = biases_in(trained), biases_in(continued)
    for layer, biases in after.items():
        moves = {(new - old) / RATE for new, old in zip(biases, before[layer], strict=True)}
        assert moves <= {-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0}
        assert len(moves) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 1, "micro_batch_sequences": 8, "zero_stage": 0},
        pytest.param({"zero_stage": 1, "activation_checkpointing": True}, marks=pytest.mark.long),
        {"zero_stage": 2, "offload_optimizer": "cpu", "micro_batch_sequences": 3},
        pytest.param({"validation": "async"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_bias_does_not_depend_on(trained: Path, continued: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """How many workers count, in how many passes, and how often a pass is repeated; nor do loss and scores."""
    train(trained, tmp_path, **short(trained) | changes)
    lines, wanted = log_of(tmp_path), log_of(continued)
    assert biases_in(tmp_path) == biases_in(continued)
    assert [line["expert_load_max"] for line in lines] == [line["expert_load_max"] for line in wanted]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], abs=2e-5)
    runs = (tmp_path, continued)
    scores = [checkpoint.read_scores(f"{root}/checkpoints")[4]["held_out_bits_per_byte"] for root in runs]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage_of_zero", [1, 3])
def test_other_workers_go_on_with_the_bias(trained: Path, continued: Path, tmp_path: Path, stage_of_zero: int) -> None:
    """Two workers stop at step 2, one goes on: by way of a universal checkpoint."""
    changes = short(trained) | {"zero_stage": stage_of_zero}
    config = TrainConfig.model_validate(config_of(trained, tmp_path, **CHANGES | changes))
    with pytest.raises(SystemExit):
        stage.run(config.with_overrides({"stop_at_step": 2}))
    before, *_ = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    assert (before.step, before.world_size) == (2, 2)
    train(trained, tmp_path, **changes | {"num_workers": 1})
    assert {line["world_size"] for line in log_of(tmp_path)} == {1.0, 2.0}
    assert biases_in(tmp_path) == biases_in(continued)


def test_bfloat16_keeps_the_bias_in_float32(trained: Path, tmp_path: Path) -> None:
    """A step of 1 / 4096 from a bias of 1 / 8 is none in bfloat16, whose next number is 1 / 1024 away."""
    rate = 2**-12
    changes = short(trained) | {"dtype": "bfloat16", "optimizer": {"router_bias_rate": rate}}
    config = TrainConfig.model_validate(config_of(trained, tmp_path, **CHANGES | changes))
    train(trained, tmp_path, **changes)
    before = biases_in(trained)
    for layer, biases in biases_in(tmp_path).items():
        moves = [(new - old) / rate for new, old in zip(biases, before[layer], strict=True)]
        assert set(moves) <= {-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0}
        assert any(moves)
    newest, *_ = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    model = export.load_whole(f"{tmp_path}/checkpoints", newest, config)
    assert str(model.dtype) == "torch.bfloat16"
    assert [model.model.layers[layer].mlp.gate.e_score_correction_bias.tolist() for layer in (1, 2)] == list(
        biases_in(tmp_path).values()
    )
