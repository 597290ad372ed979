"""The search space: dotted TrainConfig keys with a typed distribution each, and the values of a trial.

A trial's values are a function of (seed, number, key), so they depend on no order, no worker and no library. `refuse`
tries what can be drawn on the config that the sweep starts from, before anything runs.
It chooses nothing by results: Optuna does, through stage.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from app.config import Config
from app.training.config import TrainConfig

Value = bool | int | float | str
Overrides = dict[str, Value]
SET_BY_SWEEP = {
    "storage_uri",
    "overwrite",
    "checkpoints_uri",
    "output_uri",
    "num_workers",
    "min_workers",
    "validation",
    "stop_at_step",
}


class Distribution(Config):
    """Where the values of one key come from: exactly one of these."""

    uniform: tuple[float, float] | None = Field(None, description="[low, high], any float between")
    log_uniform: tuple[float, float] | None = Field(None, description="[low, high] above 0, uniform in the logarithm")
    integer: tuple[int, int] | None = Field(None, description="[low, high], any integer, both ends included")
    log_integer: tuple[int, int] | None = Field(None, description="[low, high] above 0, small ones more often")
    choice: tuple[Value, ...] | None = Field(None, min_length=1, description="one of these")

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is None and self.ends[0] >= self.ends[1]:
            raise ValueError(f"{given[0]}: low must be below high")
        if given[0].startswith("log_") and self.ends[0] <= 0:
            raise ValueError(f"{given[0]}: low must be above 0")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """The lowest and highest value, or all choices."""
        found = self.uniform or self.log_uniform or self.integer or self.log_integer or self.choice
        assert found
        return found

    def sample(self, source: random.Random) -> Value:
        """One value."""
        if self.choice is not None:
            return source.choice(self.choice)
        low, high = self.ends
        if self.uniform:
            return source.uniform(low, high)
        if self.log_uniform:
            return _bounded(math.exp(source.uniform(math.log(low), math.log(high))), low, high)
        if self.integer:
            return source.randint(low, high)
        return int(_bounded(round(math.exp(source.uniform(math.log(low), math.log(high)))), low, high))


Space = Mapping[str, Distribution]


def sample(space: Space, seed: int, number: int) -> Overrides:
    """The values of one trial."""
    return {key: one.sample(random.Random(f"{seed}/{number}/{key}")) for key, one in space.items()}


def grid(space: Space) -> list[Overrides]:
    """All combinations, the last key changing fastest. Raises ValueError for a key that is no choice."""
    for key, one in space.items():
        if one.choice is None:
            raise ValueError(f"space.{key}: search grid needs a choice")
    keys = list(space)
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(space[key].ends for key in keys))]


def refuse(space: Space, train: TrainConfig) -> None:
    """Raise ValueError, with the dotted key, for one that is unknown or has an end or a choice that does not fit.

    What only does not go with other settings is left to `with_overrides` of the whole trial.
    """
    for key, one in space.items():
        if key.split(".")[0] in SET_BY_SWEEP:
            raise ValueError(f"space.{key}: the sweep needs it to be the same in all trials; set train.{key}")
        for value in one.ends:
            try:
                train.with_overrides({key: value})
            except ValueError as error:
                first = str(error).splitlines()[0]
                if first.split(":")[0] == key or "unknown key" in first or "not a section" in first:
                    raise ValueError(f"space.{first}") from None


def _bounded(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
