import math
import random

import pytest
from pydantic import ValidationError

from app.training.config import TrainConfig
from app.tuning.space import Distribution, grid, refuse, sample


def of(**kind: object) -> Distribution:
    return Distribution.model_validate(kind)


def test_values_stay_in_their_range_and_have_their_type() -> None:
    source = random.Random(0)
    for one, kind, low, high in (
        (of(uniform=(0.5, 2)), float, 0.5, 2),
        (of(log_uniform=("1e-5", "1e-1")), float, 1e-5, 1e-1),  # PyYAML gives 1e-5 as text
        (of(integer=(3, 5)), int, 3, 5),
        (of(log_integer=(1, 64)), int, 1, 64),
    ):
        values = [one.sample(source) for _ in range(500)]
        assert {type(value) for value in values} == {kind}
        assert low <= min(values) < max(values) <= high
    assert {of(integer=(3, 5)).sample(source) for _ in range(100)} == {3, 4, 5}
    assert {of(choice=("a", 2, True)).sample(source) for _ in range(100)} == {"a", 2, True}


def test_logarithmic_ones_are_uniform_in_the_exponent() -> None:
    source = random.Random(0)
    values = [of(log_uniform=(1e-4, 1.0)).sample(source) for _ in range(4000)]
    by_decade = [sum(-4 + n <= math.log10(float(value)) < -3 + n for value in values) for n in range(4)]
    assert all(900 < count < 1100 for count in by_decade)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({}, "exactly one of"),
        ({"uniform": (0, 1), "choice": (1,)}, "exactly one of"),
        ({"uniform": (1, 1)}, "low must be below high"),
        ({"log_uniform": (0, 1)}, "low must be above 0"),
        ({"integer": (0.5, 2)}, "integer"),
        ({"choice": ()}, "at least 1"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(kind: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        of(**kind)


def test_a_trial_is_a_function_of_seed_number_and_key() -> None:
    rate, steps = of(log_uniform=(1e-4, 1e-2)), of(integer=(0, 100))
    both = {"optimizer.learning_rate": rate, "optimizer.warmup_steps": steps}
    first = sample(both, 0, 3)
    assert first == sample(dict(reversed(both.items())), 0, 3)
    assert (
        first["optimizer.learning_rate"] == sample({"optimizer.learning_rate": rate}, 0, 3)["optimizer.learning_rate"]
    )
    assert len({str(sample(both, seed, number)) for seed in (0, 1) for number in (1, 2, 3)}) == 6


def test_a_grid_is_all_combinations() -> None:
    space = {"a": of(choice=(1, 2)), "b": of(choice=("x", "y", "z"))}
    found = grid(space)
    assert len(found) == 6
    assert found[:4] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": "z"}, {"a": 2, "b": "x"}]
    with pytest.raises(ValueError, match=r"space\.c: search grid needs a choice"):
        grid({"c": of(integer=(1, 2))})


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [
        ("optimizer.learning_rte", {"choice": (1,)}, r"space\.optimizer\.learning_rte: unknown key; did you mean"),
        ("optimiser.learning_rate", {"choice": (1,)}, r"space\.optimiser: unknown key; did you mean optimizer"),
        ("optimizer.beta1", {"uniform": (0.5, 1.5)}, r"space\.optimizer\.beta1: Input should be less than 1"),
        ("zero_stage", {"choice": (2, 4)}, r"space\.zero_stage: Input should be 0, 1, 2 or 3 \(got 4\)"),
        ("num_steps.x", {"choice": (2, 4)}, r"space\.num_steps\.x: num_steps is a value, not a section"),
        ("output_uri", {"choice": ("a", "b")}, r"space\.output_uri: the sweep needs it to be the same"),
    ],
)
def test_a_key_that_does_not_fit_is_refused_by_its_name(key: str, kind: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse({key: of(**kind)}, TrainConfig())


def test_what_only_does_not_go_with_other_settings_is_no_fault_of_the_key() -> None:
    refuse({"model.hidden_size": of(choice=(250, 256))}, TrainConfig())
