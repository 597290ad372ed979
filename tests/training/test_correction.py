"""A bad step is taken back and its data skipped; when that is used up, the run ends with a whole checkpoint."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.training import checkpoint, journal, stage
from app.training.config import TrainConfig
from tests.training.tiny import config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CORRECTION = {"max_rewinds": 2, "window_steps": 16, "spike_score": 8.0}
ONLY_CHECKPOINT = 30  # the steps are poisoned after it


def train_poisoned(job: dict[str, Any], bad: dict[int, str]) -> dict[str, Any]:
    """The worker's function, whose data is bad at some data steps: labels that are noise, or a count that is NaN."""
    import torch

    from app.training.feed import Feed, StepData

    take = Feed.next

    def take_poisoned(self: Feed) -> StepData:
        data = take(self)
        if bad.get(data.data_step) == "nan":
            data.num_labels = math.nan  # type: ignore[assignment]
        elif bad.get(data.data_step) == "spike":
            for micro_batch in data.micro_batches:
                noise = torch.randint(0, 300, micro_batch["labels"].shape)
                micro_batch["labels"] = torch.where(micro_batch["labels"] < 0, -100, noise)
        return data

    Feed.next = take_poisoned  # type: ignore[method-assign]
    from app.training.loop import train_per_worker

    return train_per_worker(job | {"began": 0.0, "import_seconds": 0.0})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


def run(inputs: Path, root: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[int, str], **changes: Any) -> None:
    monkeypatch.setattr(stage, "_train", functools.partial(train_poisoned, bad=bad))
    changes = {"checkpoint_interval_steps": ONLY_CHECKPOINT, "correction": CORRECTION, "num_steps": 50, **changes}
    stage.run(TrainConfig.model_validate(config_of(inputs, root, **changes)))


def test_a_nan_and_a_spike_are_rewound(
    inputs: Path, cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(inputs, tmp_path, monkeypatch, {35: "nan", 44: "spike"})
    rewinds = journal.read_rewinds(f"{tmp_path}/checkpoints")
    assert [(rewind.to_step, rewind.at_step) for rewind in rewinds] == [(30, 35), (30, 38)]
    assert rewinds[0].reason.startswith("loss is nan")
    assert "robust deviations above the median" in rewinds[1].reason
    assert [line["data_step"] for line in log_of(tmp_path)] == [*range(30), *range(45, 65)]
    figures = read_manifest(f"{tmp_path}/model", "model").figures
    assert (figures["rewinds"], figures["skipped_sequences"]) == (2, 15 * 8)
    assert figures["train_loss"] < 2.0 < log_of(tmp_path)[0]["loss"]  # type: ignore[operator]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(math.isfinite(float(weight.sum())) for weight in weights.values())


def test_a_run_without_rewinds_left_ends_with_a_whole_checkpoint(
    inputs: Path, cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = dict.fromkeys(range(33, 100), "nan")
    error = (
        r"^step 30: loss is nan, gradient norm \S+; rewound 2 times already \(correction.max_rewinds 2\); lower "
        r"optimizer.learning_rate or check the data; the checkpoint of step 30 is whole$"
    )
    with pytest.raises(ValueError, match=error):
        run(inputs, tmp_path, monkeypatch, bad)
    (manifest,) = checkpoint.find_complete(f"{tmp_path}/checkpoints")
    assert manifest.step == ONLY_CHECKPOINT
    assert checkpoint.find_damage(f"{tmp_path}/checkpoints", manifest) == ""
    run(inputs, tmp_path, monkeypatch, {}, correction=CORRECTION | {"max_rewinds": 3})
    assert [line["data_step"] for line in log_of(tmp_path)] == [*range(30), *range(35, 55)]
