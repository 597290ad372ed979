"""Two stages train what one worker trains, are exported as they were trained, and resume bit for bit."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import journal, stage
from app.training.config import TrainConfig
from tests.training.runs import assert_equal_runs, kill_a_worker
from tests.training.tiny import config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHANGES: dict[str, Any] = {
    "zero_stage": 1,
    "num_steps": 100,
    "global_batch_sequences": 7,  # one row of eight is filled up
    "evaluation_interval_steps": 50,
}
STAGED: dict[str, Any] = CHANGES | {"pipeline_stages": 2, "num_workers": 2}


@pytest.fixture(scope="module")
def staged(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("staged")
    write_inputs(root)
    stage.run(TrainConfig.model_validate(config_of(root, root, **STAGED)))
    return root


def test_two_stages_train_what_one_worker_trains(staged: Path, tmp_path: Path) -> None:
    stage.run(TrainConfig.model_validate(config_of(staged, tmp_path, num_workers=1, **CHANGES)))
    alone, together = log_of(tmp_path), log_of(staged)
    for one, two in zip(alone, together, strict=True):
        assert one["rows"] == two["rows"]
        assert two["bubble_share"] == pytest.approx(0.2)  # of 4 micro-batches
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in alone[:50]]
        assert [line[name] for line in together[:50]] == pytest.approx(expected, rel=1e-4)
    assert alone[49]["loss"] < 0.7 * alone[0]["loss"]  # it learns, so the comparison says something
    assert together[49]["held_out_bits_per_byte"] == pytest.approx(alone[49]["held_out_bits_per_byte"], rel=1e-3)


def test_the_model_scores_what_the_stages_reported(staged: Path) -> None:
    from transformers import AutoModelForCausalLM

    from app.training import held_out

    model = AutoModelForCausalLM.from_pretrained(staged / "model")
    figures = read_manifest(f"{staged}/model", "model").figures
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    texts = held_out.open_all(TrainConfig.model_validate(config_of(staged, staged)))
    scores = held_out.score(texts, model, 2)
    reported = log_of(staged)[figures["exported_step"] - 1]
    assert scores == {"held_out_bits_per_byte": pytest.approx(reported["held_out_bits_per_byte"], rel=1e-6)}


def test_a_killed_stage_changes_nothing(staged: Path, cluster: LocalCluster, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_worker, f"{tmp_path}/checkpoints", cluster, 20)
        stage.run(TrainConfig.model_validate(config_of(staged, tmp_path, **STAGED)))
        killed.result()
    assert_equal_runs(tmp_path, staged)
    resumed = [event["step"] for event in journal.read_events(f"{tmp_path}/checkpoints", "started")]
    assert len(resumed) == 2
    assert resumed[1] >= 20


def test_a_pipeline_goes_on_as_it_began(staged: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(config_of(staged, staged, **STAGED))
    for changes, said in (
        ({"num_workers": 4}, "num_workers: 2, now 4"),
        ({"pipeline_stages": 1}, "pipeline_stages: 2, "),
    ):
        with pytest.raises(ValueError, match=f"holds a run with .*{said}"):
            stage.run(config.with_overrides(changes | {"output_uri": str(tmp_path)}))
