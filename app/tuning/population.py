"""Population based training (Jaderberg et al. 2017, arXiv:1711.09846): who goes on from whom, with which values.

All members train for an interval; then each of the worst quantile takes the weights of one of the best and its values,
perturbed. A generation is a function of the scores, the seed and its number, so a sweep that is resumed repeats it.
It trains nothing and copies nothing; stage.py does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.tuning.space import Distribution, Overrides, Space, Value

PERTURBATIONS = (0.8, 1.25)
RESAMPLED = 0.25  # share of perturbed values that are drawn anew


@dataclass(frozen=True)
class Member:
    """A place of the population in one generation; `parent` is the member of the last one that it goes on from."""

    number: int
    generation: int
    parent: int
    values: Overrides


def evolve(
    members: Sequence[Member], scores: Mapping[int, float], space: Space, seed: int, share: float
) -> list[Member]:
    """The next generation. Members without a score have failed and start again from one of the best.

    Raises ValueError when nobody has a score.
    """
    ranked = sorted(scores, key=lambda number: (scores[number], number))
    if not ranked:
        raise ValueError(f"every trial of generation {members[0].generation} failed")
    count = max(1, min(math.ceil(share * len(ranked)), len(ranked) // 2))
    best, worst = ranked[:count], set(ranked[max(count, len(ranked) - count) :])
    by_number = {member.number: member for member in members}
    evolved = []
    for member in members:
        generation, number = member.generation + 1, member.number
        parent, values = number, member.values
        if number in worst or number not in scores:
            source = random.Random(f"{seed}/{generation}/{number}")
            parent = source.choice(best)
            values = {key: perturb(space[key], value, source) for key, value in by_number[parent].values.items()}
        evolved.append(Member(number, generation, parent, values))
    return evolved


def perturb(one: Distribution, value: Value, source: random.Random) -> Value:
    """A value near another, within the distribution, or sometimes a new one."""
    if source.random() < RESAMPLED:
        return one.sample(source)
    if one.choice is not None:
        place = one.choice.index(value) if value in one.choice else 0
        return one.choice[min(max(place + source.choice((-1, 1)), 0), len(one.choice) - 1)]
    low, high = one.ends
    moved: float = min(max(float(value) * source.choice(PERTURBATIONS), low), high)
    return round(moved) if one.integer or one.log_integer else moved
