"""A run that goes on from a copy of another one is that run, as far as the settings are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cluster import LocalCluster
from app.training import stage
from app.training.config import TrainConfig
from app.training.fork import copy_run
from tests.training.runs import assert_equal_runs
from tests.training.tiny import config_of, trajectory, write_inputs

CHANGES = {"num_steps": 30, "num_workers": 1, "evaluation_interval_steps": 10}


def test_an_empty_run_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint to go on from"):
        copy_run(str(tmp_path / "run"), str(tmp_path / "other"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_copy_goes_on_as_the_run_would_have(cluster: LocalCluster, tmp_path: Path) -> None:
    whole, part, same, other = (tmp_path / name for name in ("whole", "part", "same", "other"))
    write_inputs(tmp_path)
    stage.run(TrainConfig.model_validate(config_of(tmp_path, whole, **CHANGES)))
    with pytest.raises(SystemExit):
        stage.run(TrainConfig.model_validate(config_of(tmp_path, part, **CHANGES, stop_at_step=15)))  # no interval
    assert not (part / "model").exists()
    for root, optimizer in ((same, {}), (other, {"learning_rate": 1e-3})):
        copy_run(f"{part}/checkpoints", f"{root}/checkpoints")
        config = config_of(tmp_path, root, **CHANGES)
        stage.run(TrainConfig.model_validate(config | {"optimizer": config["optimizer"] | optimizer}))
    assert_equal_runs(same, whole)
    assert trajectory(other)[:15] == trajectory(whole)[:15]
    assert trajectory(other)[15][2] != trajectory(whole)[15][2]  # the learning rate is the new one's
