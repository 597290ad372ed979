from pathlib import Path

import pytest

from app.training.checkpoint import write_scores
from app.tuning.trial import Trial, choose_best, join, new_scores


def test_a_trial_is_read_as_it_was_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "0001")
    assert Trial.open(uri, 1) is None
    trial = Trial.begin(uri, 1, {"optimizer.learning_rate": 0.1 + 0.2})
    assert trial.outcome == "unfinished"
    trial.report(10, 2.5)
    trial.fail("a worker died")
    assert Trial.open(uri, 1) == trial
    assert trial.outcome == "failed"
    trial.finish(20, 2.25, 2.125)
    again = Trial.begin(uri, 1, {"optimizer.learning_rate": 0.1 + 0.2})
    assert again == trial
    assert (again.outcome, again.score, again.last_step) == ("finished", 2.125, 20)
    with pytest.raises(ValueError, match="holds a trial with"):
        Trial.begin(uri, 1, {"optimizer.learning_rate": 0.3})


def test_the_mark_is_seen_by_who_trains(tmp_path: Path) -> None:
    uri = str(tmp_path / "0001")
    trial = Trial.begin(uri, 1, {})
    trial.report(10, 2.5)
    assert not trial.was_ended()
    Trial(uri, 1, {}).end_early()  # the scheduler, in another process
    assert trial.was_ended()
    assert trial.outcome == "ended early"
    trial.finish(20, 2.0, 2.0)  # what has finished stays so, whatever is decided later
    assert trial.outcome == "finished"


def test_scores_of_a_run_are_reported_once(tmp_path: Path) -> None:
    for step, score in ((20, 2.0), (5, 4.0), (10, 3.0)):
        write_scores(str(tmp_path), step, {"held_out_bits_per_byte": score})
    assert new_scores(str(tmp_path), "held_out_bits_per_byte", 5) == [(10, 3.0), (20, 2.0)]
    assert new_scores(str(tmp_path), "replay_bits_per_byte", 0) == []


def test_the_best_is_the_lowest_that_finished(tmp_path: Path) -> None:
    trials = [Trial(str(tmp_path / str(number)), number, {}) for number in range(4)]
    trials[0].finish(20, 3.0, 3.0)
    trials[1].report(10, 1.0)
    trials[1].end_early()
    trials[2].finish(20, 2.0, 2.0)
    trials[3].finish(20, 2.0, 2.0)
    assert choose_best(trials).number == 2


def test_when_none_finished_the_error_is_told(tmp_path: Path) -> None:
    failed = Trial(str(tmp_path), 0, {})
    failed.fail("the loss is NaN at step 3")
    with pytest.raises(
        ValueError, match=r"no trial finished \(0: failed\); the first error: the loss is NaN at step 3"
    ):
        choose_best([failed])


def test_generations_are_shown_as_one_trial(tmp_path: Path) -> None:
    parts = [Trial.begin(str(tmp_path / str(generation)), 3, {"x": generation}) for generation in range(2)]
    parts[0].finish(10, 3.0, 3.0)
    parts[1].fail("a worker died")
    failed = join(parts)
    assert (failed.outcome, failed.last_step) == ("failed", 10)
    parts[1].finish(20, 2.0, 2.0)
    joined = join(parts)
    assert (joined.number, joined.values, joined.outcome, joined.score) == (3, {"x": 1}, "finished", 2.0)
    assert [report["step"] for report in joined.reports] == [10, 20]
    for generation in range(2):
        (tmp_path / str(generation) / "checkpoints").mkdir()
    joined.drop_weights()
    assert not list(tmp_path.glob("*/checkpoints"))
