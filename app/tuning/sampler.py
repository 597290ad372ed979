"""Optuna's proposals as a function of (seed, number of the trial, results so far).

A TPE sampler (Bergstra et al. 2011) draws from one random stream, so what it proposes depends on all it has proposed
since it was made. Here each value has a stream of its own: a sweep that goes on after a kill proposes what it would
have. It converts no results; Ray Tune's OptunaSearch does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from app.tuning.space import Distribution, Space


class NumberedSampler(optuna.samplers.BaseSampler):
    """TPE, with random values for the first quarter of the trials (10 at most), as there is nothing to learn from."""

    def __init__(self, seed: int, num_trials: int) -> None:
        self._seed = seed
        self._num_random = max(1, min(10, num_trials // 4))

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        """Nothing: each value is chosen for itself."""
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        """A value of one key."""
        digest = hashlib.sha256(f"{self._seed}/{trial.number}/{param_name}".encode()).digest()
        tpe = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]), n_startup_trials=self._num_random)
        return tpe.sample_independent(study, trial, param_name, param_distribution)


def to_optuna(space: Space) -> dict[str, BaseDistribution]:
    """The distributions in Optuna's terms."""
    return {key: _convert(one) for key, one in space.items()}


def _convert(one: Distribution) -> BaseDistribution:
    if one.choice is not None:
        return CategoricalDistribution(one.choice)
    low, high = one.ends
    if one.uniform or one.log_uniform:
        return FloatDistribution(low, high, log=bool(one.log_uniform))
    return IntDistribution(low, high, log=bool(one.log_integer))
