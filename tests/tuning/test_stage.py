"""Sweeps on a real cluster: resumed after a kill, failed trials, several at once, Optuna."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util.state import list_placement_groups

from app.artifacts import read_manifest
from app.cluster import LocalCluster
from app.config import read_yaml, validate
from app.training import checkpoint, journal
from app.training.config import TrainConfig
from app.tuning import stage
from app.tuning.config import TuneConfig
from app.tuning.trial import Trial
from tests.training.tiny import write_inputs
from tests.tuning.sweeps import finish, settings, start, trial_of, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ASHA = {"scheduler": "asha", "asha": {"grace_steps": 10}, "num_trials": 8, "keep_trials": "all"}


def sweep(inputs: Path, root: Path, **changes: Any) -> TuneConfig:
    return validate(TuneConfig, settings(inputs, root, **changes))


def facts(root: Path) -> list[tuple[Any, ...]]:
    """What of the trials must not depend on what befell the sweep."""
    report = json.loads((root / "sweep" / "report.json").read_text())
    return [(one["number"], one["outcome"], one["score"], one["curve"], one["values"]) for one in report["trials"]]


def best(root: Path) -> dict[str, Any]:
    chosen = yaml.safe_load((root / "sweep" / "best.yaml").read_text())
    assert chosen.pop("storage_uri") == str(root)
    return dict(chosen)


@pytest.mark.long  # sixteen trainings
def test_a_sweep_killed_half_way_ends_as_the_undisturbed_one(cluster: LocalCluster, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for root in (calm, killed):
        root.mkdir()
    write_inputs(tmp_path)

    job = start(killed, cluster, settings(tmp_path, killed, **ASHA))

    def is_half_way() -> bool:
        """In the third trial or later, in one that has a checkpoint and measured something, and has not ended."""
        running = [trial for number in range(2, 8) if (trial := trial_of(killed, number))]
        return any(
            trial.outcome == "unfinished" and trial.reports and checkpoint.find_complete(f"{trial.uri}/checkpoints")
            for trial in running
        )

    until(job, is_half_way)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = [trial for number in range(8) if (trial := trial_of(killed, number))]
    assert 3 <= len(before) < 8
    cut = {trial.number for trial in before if trial.outcome == "unfinished"}
    assert len(cut) <= 1
    finish(start(killed, cluster, settings(tmp_path, killed, **ASHA)))

    manifest = stage.run(sweep(tmp_path, calm, **ASHA))
    assert facts(killed) == facts(calm)
    assert best(killed) == best(calm)
    attempts = {one.number: len(journal.read_events(f"{one.uri}/checkpoints", "started")) for one in before}
    assert {number for number, count in attempts.items() if count > 1} <= cut  # what was over was not run again

    figures: Any = manifest.figures
    assert figures["trials"] == 8
    assert figures["ended_early"] >= 3
    assert figures["failed"] == 0
    assert figures["best_score"] < 0.9 * figures["start_score"]
    assert stage.run(sweep(tmp_path, calm, **ASHA)) == manifest

    path = calm / "sweep" / "best.yaml"
    winner = validate(TrainConfig, read_yaml(TrainConfig, path))
    number = figures["best_trial"]
    model = read_manifest(f"{calm}/trials/{number:04d}/model", "model")
    assert model.figures["held_out_bits_per_byte"] == figures["best_score"]
    assert model.config["optimizer"] == winner.optimizer.model_dump()
    assert not [group for group in list_placement_groups() if group.state == "CREATED"]  # every trial gave back its own


def test_trials_that_fail_are_tried_again_and_counted(cluster: LocalCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    space = {"init_from_uri": {"choice": ["/nowhere"]}}
    changes = {"space": space, "num_trials": 2, "max_concurrent_trials": 2, "keep_trials": "all"}
    figures: Any = stage.run(sweep(tmp_path, tmp_path, **changes)).figures
    assert (figures["finished"], figures["failed"], figures["retries"]) == (1, 1, 1)
    failed = trial_of(tmp_path, 1)
    assert failed
    assert [said.startswith("init_from_uri: /nowhere/config.json does not exist") for said in failed.failures] == [
        True
    ] * 2
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "init_from_uri: /nowhere/config.json does not exist" in page


def test_a_sweep_that_cannot_run_says_so(cluster: LocalCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    big = sweep(tmp_path, tmp_path)
    big = big.with_overrides({"train.num_workers": 64, "train.global_batch_sequences": 64})
    cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(ValueError, match=rf"train\.num_workers: a trial needs 64 CPUs, the cluster has {cpus}"):
        stage.run(big)
    with pytest.raises(ValueError, match=r"train\.global_batch_sequences: 64, now 8"):
        stage.run(sweep(tmp_path, tmp_path))


def test_a_population_passes_weights_and_values_on(cluster: LocalCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    space = {"optimizer.learning_rate": {"log_uniform": [1e-5, 5e-2]}}
    changes: dict[str, Any] = {"scheduler": "pbt", "pbt": {"interval_steps": 20}, "num_trials": 3, "space": space}
    config = sweep(tmp_path, tmp_path, **changes, max_concurrent_trials=3, keep_trials="all", seed=1)
    figures: Any = stage.run(config).figures
    assert (figures["finished"], figures["failed"]) == (3, 0)

    def run_of(number: int, generation: int) -> str:
        return f"{config.generation_uri(number, generation)}/checkpoints"

    first = {one: Trial.open(config.generation_uri(one, 0), one) for one in range(3)}
    scores = {one: trial.score for one, trial in first.items() if trial and trial.score is not None}
    best, worst = min(scores, key=lambda one: scores[one]), max(scores, key=lambda one: scores[one])
    for number in range(3):
        own, parent = journal.read_log(run_of(number, 1)), best if number == worst else number
        before = journal.read_log(run_of(parent, 0))
        assert [line["loss"] for line in own[:20]] == [line["loss"] for line in before]
        assert len(own) == 40
        (step,) = [event["step"] for event in journal.read_events(run_of(number, 1), "started") if event["step"]]
        assert step == 20
    heir = Trial.open(config.generation_uri(worst, 1), worst)
    assert heir
    assert heir.values != config.planned()[best][1]
    assert json.loads((tmp_path / "sweep" / "report.json").read_text())["trials"][worst]["values"] == heir.values

    (tmp_path / "sweep" / "manifest.json").unlink()  # as if it was killed at the very end
    assert stage.run(config).figures == figures
    assert len(journal.read_events(run_of(worst, 1), "started")) == 2  # one of the copy, one of its own


def test_optuna_proposes_in_range_and_all_at_once_end(cluster: LocalCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    changes = {"search": "optuna", "num_trials": 3, "max_concurrent_trials": 3}
    figures: Any = stage.run(sweep(tmp_path, tmp_path, **changes)).figures
    assert figures["finished"] == 3
    winner = tmp_path / "trials" / f"{figures['best_trial']:04d}"
    assert list((tmp_path / "trials").glob("*/model")) == [winner / "model"]  # keep_trials: best
    rates = [trial.values["optimizer.learning_rate"] for number in (1, 2) if (trial := trial_of(tmp_path, number))]
    assert len(set(rates)) == 2
    assert all(1e-5 <= float(rate) <= 5e-2 for rate in rates)
