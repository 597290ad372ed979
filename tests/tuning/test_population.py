import random

import pytest

from app.tuning.population import Member, evolve, perturb
from app.tuning.space import Distribution

SPACE = {"rate": Distribution(log_uniform=(1e-4, 1e-1)), "schedule": Distribution(choice=("a", "b", "c"))}
MEMBERS = [Member(number, 0, number, {"rate": 10.0 ** -(1.5 + number / 4), "schedule": "b"}) for number in range(8)]
SCORES = {number: float(number) for number in range(8)}


def test_the_worst_go_on_from_the_best_with_other_values() -> None:
    evolved = evolve(MEMBERS, SCORES, SPACE, seed=0, share=0.25)
    assert [member.number for member in evolved] == list(range(8))
    assert {member.generation for member in evolved} == {1}
    assert [member.parent for member in evolved[:6]] == list(range(6))
    assert [member.values for member in evolved[:6]] == [member.values for member in MEMBERS[:6]]
    for member in evolved[6:]:
        assert member.parent in (0, 1)
        assert member.values["rate"] != MEMBERS[member.parent].values["rate"]
        assert 1e-4 <= float(member.values["rate"]) <= 1e-1


def test_it_is_a_function_of_scores_seed_and_generation() -> None:
    assert evolve(MEMBERS, SCORES, SPACE, 0, 0.5) == evolve(MEMBERS, dict(reversed(SCORES.items())), SPACE, 0, 0.5)
    assert evolve(MEMBERS, SCORES, SPACE, 0, 0.5) != evolve(MEMBERS, SCORES, SPACE, 1, 0.5)


def test_who_failed_starts_again_from_one_of_the_best() -> None:
    scores = {number: score for number, score in SCORES.items() if number != 0}
    evolved = evolve(MEMBERS, scores, SPACE, 0, 0.25)
    assert evolved[0].parent in (1, 2)
    assert [member.parent for member in evolved[1:6]] == [1, 2, 3, 4, 5]
    alone = evolve(MEMBERS[:2], {1: 2.0}, SPACE, 0, 0.25)
    assert [member.parent for member in alone] == [1, 1]
    assert alone[1].values == MEMBERS[1].values
    with pytest.raises(ValueError, match="every trial of generation 0 failed"):
        evolve(MEMBERS, {}, SPACE, 0, 0.25)


def test_perturbed_values_stay_near_and_within() -> None:
    source = random.Random(0)
    rates = [float(perturb(SPACE["rate"], 1e-2, source)) for _ in range(400)]
    near = [rate for rate in rates if rate in (1e-2 * 0.8, 1e-2 * 1.25)]
    assert 250 < len(near) < 350  # the others are drawn anew
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert {perturb(Distribution(uniform=(0.5, 1)), 1.0, random.Random(seed)) for seed in range(40)} > {0.8, 1.0}
    assert {perturb(SPACE["schedule"], "b", source) for _ in range(50)} == {"a", "b", "c"}
    assert all(isinstance(perturb(Distribution(integer=(1, 9)), 4, source), int) for _ in range(20))
