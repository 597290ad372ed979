from pathlib import Path
from typing import Any

import pytest

from app.tuning import report
from app.tuning.trial import Trial


def trials(root: Path) -> list[Trial]:
    made = [
        Trial(str(root / "0"), 0, {}),
        Trial(str(root / "1"), 1, {"optimizer.learning_rate": 1e-4, "optimizer.schedule": "<cosine>"}),
        Trial(str(root / "2"), 2, {"optimizer.learning_rate": 1e-2, "optimizer.schedule": "linear"}),
        Trial(str(root / "3"), 3, {"optimizer.learning_rate": 10.0, "optimizer.schedule": "linear"}),
    ]
    made[0].report(10, 4.0)
    made[0].finish(20, 3.0, 3.0)
    made[1].report(10, 5.0)
    made[1].is_ended = True
    made[2].fail("a worker died")
    made[2].finish(20, 2.5, 2.4)
    made[3].fail("the loss is NaN")
    made[3].fail("the loss is NaN")
    return made


def test_figures_count_trials_and_tell_the_gain(tmp_path: Path) -> None:
    made = trials(tmp_path)
    figures: dict[str, Any] = report.figures(made, made[2])
    assert figures == {
        "trials": 4, "best_trial": 2, "best_score": 2.4, "finished": 2, "ended_early": 1, "failed": 1, "retries": 2,
        "steps": 50, "start_score": 3.0, "gain_percent": pytest.approx(20.0),
        "best": {"optimizer.learning_rate": 1e-2, "optimizer.schedule": "linear"},
    }  # fmt: skip


def test_the_page_shows_every_trial_and_escapes(tmp_path: Path) -> None:
    made = trials(tmp_path)
    page = report.render(report.content(made, made[2], "held_out_bits_per_byte"))
    assert page.count("<svg") == 2
    assert "the loss is NaN" in page
    assert "&lt;cosine&gt;" in page
    assert "<cosine>" not in page
    assert "ended early 1; failed 3" in page.replace("finished 0, 2; ", "")
    assert page == report.render(report.content(made, made[2], "held_out_bits_per_byte"))
