from collections.abc import Sequence
from typing import Any

import optuna
import pytest

from app.tuning.sampler import NumberedSampler, to_optuna
from app.tuning.space import Distribution

SPACE = to_optuna(
    {
        "x": Distribution(uniform=(-1.0, 1.0)),
        "y": Distribution(log_uniform=(1e-4, 1.0)),
        "n": Distribution(integer=(1, 9)),
        "c": Distribution(choice=("a", "b")),
    }
)


def search(count: int, known: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The proposals of a search for a small x, of which the first ones are known before."""
    study = optuna.create_study(sampler=NumberedSampler(0, 20))
    for point in known:
        study.enqueue_trial(point)
    proposed = []
    for _ in range(count):
        trial = study.ask(SPACE)
        proposed.append(dict(trial.params))
        study.tell(trial, trial.params["x"] ** 2)
    return proposed


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_search_that_goes_on_proposes_what_it_would_have() -> None:
    whole = search(16)
    for cut in (1, 3, 9):
        assert search(16, whole[:cut]) == whole


def test_values_are_in_range_and_not_alike() -> None:
    proposed = search(20)
    assert all(-1 <= one["x"] <= 1 and 1e-4 <= one["y"] <= 1 and 1 <= one["n"] <= 9 for one in proposed)
    assert {one["c"] for one in proposed} == {"a", "b"}
    assert len({one["x"] for one in proposed}) == 20
    assert len({(one["x"] + 1) / 2 - one["y"] for one in proposed}) == 20


def test_it_learns_from_results() -> None:
    proposed = search(40)
    first = sum(abs(one["x"]) for one in proposed[:5]) / 5
    assert sum(abs(one["x"]) for one in proposed[-15:]) / 15 < first / 2
