"""A model cut into pipeline stages: which layers each stage takes, and what the cut costs.

The method is GPipe's (Huang et al. 2019, arXiv:1811.06965). Pure arithmetic on the costs of the embedding, the layers
and the head, in parameters, seconds or any other unit. The cut is the best one: no other has a smaller largest stage.
It builds no model; pipeline.py does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LARGE_BUBBLE = 0.2


@dataclass(frozen=True)
class Costs:
    """Of the embedding, each layer and the head (the last norm included), in one unit."""

    embedding: float
    layers: tuple[float, ...]
    head: float


@dataclass(frozen=True)
class Stages:
    """Stage s has the layers bounds[s] to bounds[s + 1]; the first has the embedding too, the last the head."""

    bounds: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """(max - mean) / mean of the stages' costs: the share by which the slowest keeps the others waiting."""
        mean = sum(self.costs) / len(self.costs)
        return (max(self.costs) - mean) / mean


def balance(costs: Costs, num_stages: int) -> Stages:
    """The cut into contiguous stages of one layer or more whose largest is smallest; of such, the most even one.

    There are not more stages than layers: a rule refuses it.

    >>> balance(Costs(3, (2, 2, 2, 2), 4), 2)
    Stages(bounds=(0, 2, 4), costs=(7, 8))
    """
    weights = list(costs.layers)
    assert num_stages <= len(weights), (num_stages, len(weights))
    weights[0] += costs.embedding
    weights[-1] += costs.head
    sums = [sum(weights[:end]) for end in range(len(weights) + 1)]
    largest = _cut(sums, num_stages, math.inf, is_even=False)[0]
    _, bounds = _cut(sums, num_stages, largest, is_even=True)
    return Stages(bounds, tuple(sum(weights[start:end]) for start, end in pairwise(bounds)))


def _cut(sums: Sequence[float], num_stages: int, limit: float, is_even: bool) -> tuple[float, tuple[int, ...]]:
    """The smallest largest stage, or with is_even the smallest sum of squares of stages up to the limit; its bounds."""
    num_layers = len(sums) - 1
    slack = 1e-12 * abs(sums[-1])  # differences of sums of the same layers may differ in the last bits
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(1, num_stages + 1):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(stage, num_layers - (num_stages - stage) + 1):
            for start, (value, bounds) in best.items():
                cost = sums[end] - sums[start]
                if start >= end or cost > limit + slack:
                    continue
                now = value + cost * cost if is_even else max(value, cost)
                if end not in found or now < found[end][0]:
                    found[end] = now, (*bounds, end)
        best = found
    return best[num_layers]


def bubble_share(num_stages: int, num_micro_batches: int) -> float:
    """Share of a step that a stage waits for the others while the pipeline fills and drains, stages being equal.

    >>> bubble_share(4, 9)
    0.25
    """
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)


def describe_schedule(num_stages: int, num_workers: int, num_micro_batches: int) -> list[str]:
    """How the micro-batches of a step go through the stages, in words; [] without stages.

    >>> describe_schedule(2, 4, 4)
    ['pipeline of 2 stages × 2 replicas: of 4 micro-batches a step a stage waits 20.0 % for the others']
    """
    if num_stages == 1:
        return []
    bubble = bubble_share(num_stages, num_micro_batches)
    said = (
        f"pipeline of {num_stages} stages × {num_workers // num_stages} replicas: of {num_micro_batches} micro-batches "
        f"a step a stage waits {100 * bubble:.1f} % for the others"
    )
    advice = "; a smaller micro_batch_sequences or a larger global_batch_sequences makes more of them"
    return [said + (advice if bubble > LARGE_BUBBLE else "")]


def describe(stages: Stages, unit: str = "parameters") -> str:
    """The cut in words.

    >>> describe(balance(Costs(3, (2, 2, 2, 2), 4), 2))
    '2 + 2 layers, at most 8 parameters a stage, imbalance 6.7 %'
    """
    layers = " + ".join(str(end - start) for start, end in pairwise(stages.bounds))
    most, imbalance = max(stages.costs), 100 * stages.imbalance
    return f"{layers} layers, at most {most:,.0f} {unit} a stage, imbalance {imbalance:.1f} %"


def exported_name(name: str, index: int, num_layers: int) -> str:
    """What transformers calls the weight `name` of the pipeline's part of that index.

    >>> [exported_name("weight", index, 2) for index in (0, 3, 4)]
    ['model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight']
    >>> exported_name("mlp.up_proj.weight", 2, 2)
    'model.layers.1.mlp.up_proj.weight'
    """
    ends = {0: "model.embed_tokens", num_layers + 1: "model.norm", num_layers + 2: "lm_head"}
    return f"{ends.get(index, f'model.layers.{index - 1}')}.{name}"
