"""The cut of a model into stages, by numbers and against every other cut."""

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.config import ModelConfig
from app.training.sizes import count_parameters, stage_costs
from app.training.stages import Costs, balance, bubble_share, describe, exported_name

NUMBERS = st.floats(0.1, 100)


@given(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=7), NUMBERS, st.data())
def test_no_cut_has_a_smaller_largest_stage(
    first: float, layers: list[float], last: float, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))
    made = balance(Costs(first, tuple(layers), last), num_stages)
    weights = [first + layers[0], *layers[1:-1], layers[-1] + last] if len(layers) > 1 else [first + layers[0] + last]
    everyone = [
        [sum(weights[start:end]) for start, end in pairwise((0, *inner, len(layers)))]
        for inner in combinations(range(1, len(layers)), num_stages - 1)
    ]
    assert max(made.costs) == pytest.approx(min(max(costs) for costs in everyone))
    squares = min(sum(cost**2 for cost in costs) for costs in everyone if max(costs) <= max(made.costs) * (1 + 1e-9))
    assert sum(cost**2 for cost in made.costs) == pytest.approx(squares)
    assert (made.bounds[0], made.bounds[-1]) == (0, len(layers))
    assert all(start < end for start, end in pairwise(made.bounds))
    assert sum(made.costs) == pytest.approx(first + sum(layers) + last)


def test_the_ends_take_fewer_layers() -> None:
    made = balance(Costs(5, (2,) * 10, 3), 3)
    assert made.bounds == (0, 2, 7, 10)
    assert made.costs == (9, 10, 9)
    assert made.imbalance == pytest.approx((10 - 28 / 3) / (28 / 3))
    assert describe(made) == "2 + 5 + 3 layers, at most 10 parameters a stage, imbalance 7.1 %"


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_the_parameters_of_the_model(tied: bool) -> None:
    model = ModelConfig(num_layers=64, tie_embeddings=tied)
    counted = count_parameters(model, 8192)
    made = balance(stage_costs(model, 8192), 8)
    assert sum(made.costs) == counted.total + tied * counted.embedding
    assert made.imbalance < 0.05


@pytest.mark.parametrize(("stages", "passes", "share"), [(1, 8, 0), (2, 1, 0.5), (2, 4, 0.2), (8, 56, 1 / 9)])
def test_bubble(stages: int, passes: int, share: float) -> None:
    assert bubble_share(stages, passes) == pytest.approx(share)


def test_names_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**tiny, num_hidden_layers=2, num_key_value_heads=1))
    inner = model.model
    parts = [inner.embed_tokens, *inner.layers, inner.norm, model.lm_head]
    names = {exported_name(name, index, 2) for index, part in enumerate(parts) for name in part.state_dict()}
    assert names == set(model.state_dict())
