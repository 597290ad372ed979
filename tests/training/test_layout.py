"""Each row and token has its ranks, and what cannot be shared is refused before a worker starts."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.config import TrainConfig
from app.training.layout import Layout, refuse_unshareable, sequence_fits, tensor_fits
from app.training.zero import deepspeed_config

DEGREES = st.integers(1, 4)
BASE: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}


def layouts(world_size: int, sequence: int, tensor: int) -> list[Layout]:
    return [Layout(rank, world_size, sequence, tensor) for rank in range(world_size)]


@given(DEGREES, DEGREES, DEGREES)
def test_every_place_in_the_grid_is_taken_once(data: int, sequence: int, tensor: int) -> None:
    ranks = layouts(data * sequence * tensor, sequence, tensor)
    places = [(one.data_rank, one.sequence_rank, one.tensor_rank) for one in ranks]
    assert places == list(product(range(data), range(sequence), range(tensor)))  # neighbours share matrices
    assert {one.data_size for one in ranks} == {data}
    assert [one.data_rank for one in ranks if one.is_first] == list(range(data))


def test_stages_are_farthest_apart() -> None:
    ranks = [Layout(rank, 6, num_stages=3) for rank in range(6)]
    assert [one.stage for one in ranks] == [0, 0, 1, 1, 2, 2]
    assert [one.data_rank for one in ranks] == [0, 1, 0, 1, 0, 1]
    assert [one.is_first for one in ranks] == [True, True, False, False, False, False]
    assert {(one.data_size, one.same_loss, one.averaged_ranks(1)) for one in ranks} == {(2, 3, 2)}


@given(DEGREES, DEGREES, st.integers(1, 9))
def test_the_tokens_of_the_ranks_are_the_block(data: int, sequence: int, share: int) -> None:
    block = list(range(sequence * share))
    ranks = layouts(data * sequence, sequence, 1)
    for first in range(0, data * sequence, sequence):
        own = [block[one.tokens(len(block))] for one in ranks[first : first + sequence]]
        assert [token for part in own for token in part] == block


@pytest.mark.parametrize(
    ("layout", "below_zero_3", "zero_3"),
    [(Layout(0, 4), 4, 4), (Layout(0, 4, 2), 2, 4), (Layout(0, 4, 4), 1, 4), (Layout(0, 4, 1, 2), 2, 2)],
)
def test_ranks_that_deepspeed_averages_over(layout: Layout, below_zero_3: int, zero_3: int) -> None:
    assert [layout.averaged_ranks(stage) for stage in range(4)] == [*[below_zero_3] * 3, zero_3]


def test_workers_that_share_a_model_share_out_no_batch() -> None:
    """8 workers in groups of 4: two shares of 5 rows, three forward passes of 2."""
    given = {"global_batch_sequences": 10, "micro_batch_sequences": 2, "num_workers": 8, "zero_stage": 1}
    for degrees in ({"sequence_parallel": 4}, {"tensor_parallel": 4}, {"sequence_parallel": 2, "tensor_parallel": 2}):
        config = TrainConfig.model_validate(given | degrees)
        assert config.num_replicas(8) == 2
        assert deepspeed_config(config, 8, use_gpu=False)["gradient_accumulation_steps"] == 3
    assert TrainConfig.model_validate(given | {"global_batch_sequences": 2, "tensor_parallel": 4}).accumulation_steps(8)
    with pytest.raises(ValueError, match=r"\(1\) must not be below num_workers \(8\) / 4 that share a batch"):
        TrainConfig.model_validate(given | {"global_batch_sequences": 1, "tensor_parallel": 4})


def test_a_group_that_lost_a_worker_is_no_group() -> None:
    with pytest.raises(ValueError, match=r"sequence_parallel \(2\) x .* does not divide .* \(3\)"):
        Layout.of(TrainConfig(num_workers=4, sequence_parallel=2), 0, 3)


@pytest.mark.parametrize(
    ("degree", "heads", "key_value_heads", "fits"),
    [(2, 8, 2, True), (4, 8, 2, True), (8, 8, 1, True), (4, 8, 8, True), (4, 6, 2, False), (6, 12, 4, False)],
)
def test_heads_for_tokens(degree: int, heads: int, key_value_heads: int, fits: bool) -> None:
    assert sequence_fits(degree, heads, key_value_heads) is fits


def test_equal_parts_of_layers() -> None:
    assert tensor_fits(2, 4, 96)
    assert not tensor_fits(4, 2, 96)  # a rank would have no keys
    assert not tensor_fits(2, 4, 97)


@pytest.mark.parametrize(
    ("degrees", "base", "said"),
    [
        ({"sequence_parallel": 4}, {}, "sequence_parallel: 4 workers cannot share blocks of 30 tokens"),
        ({"sequence_parallel": 3}, {}, "sequence_parallel: 3 does not fit the model of init_from_uri, with 8 heads"),
        ({"tensor_parallel": 4}, {}, "tensor_parallel: 4 must divide the 2 heads of keys and values"),
        ({"tensor_parallel": 2}, {"intermediate_size": 97}, "the intermediate_size (97), of the model"),
        ({"sequence_parallel": 2}, {"model_type": "mistral"}, "cannot share a model of type mistral, only llama and"),
        ({"sequence_parallel": 2}, {"layer_types": ["sliding_attention"]}, "of type llama with windows"),
        ({"pipeline_stages": 4}, {}, "pipeline_stages: 4 is more than the 3 layers of init_from_uri"),
        ({"pipeline_stages": 2}, {"model_type": "gemma3"}, "cannot share a model of type gemma3"),
        ({"sequence_parallel": 2}, {}, ""),
        ({"tensor_parallel": 2}, {"model_type": "qwen3"}, ""),
        ({}, {"model_type": "mistral", "use_sliding_window": True}, ""),
    ],
)
def test_models_to_start_from(degrees: dict[str, int], base: dict[str, Any], said: str) -> None:
    config = TrainConfig.model_validate({"num_workers": 12, "init_from_uri": "base", **degrees})
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            refuse_unshareable(config, 30, BASE | base)
    else:
        refuse_unshareable(config, 30, BASE | base)
