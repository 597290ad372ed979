"""What is proposed fits, runs, and is the least that does."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.planning import search
from app.planning.estimate import GIB, Shape, memory_of
from app.training import parallel
from app.training.config import TrainConfig
from app.training.refusals import Devices
from tests.planning.test_estimate import LLAMA_2_7B

SHAPE = Shape(32_000, 4096)


def train_of(**changes: Any) -> TrainConfig:
    given = {"model": LLAMA_2_7B, "dtype": "bfloat16", "global_batch_sequences": 1024, "num_workers": 8}
    return TrainConfig.model_validate(given | changes)


@given(
    stage=st.integers(0, 3),
    blocks=st.integers(1, 32),
    again=st.booleans(),
    room=st.sampled_from([4, 16, 40, 80, 160]),
    number=st.sampled_from([1, 8, 64]),
)
@settings(max_examples=60, deadline=None)
def test_the_nearest_fit_fits(stage: int, blocks: int, again: bool, room: int, number: int) -> None:
    config = train_of(zero_stage=stage, micro_batch_sequences=blocks, activation_checkpointing=again)
    fit = search.nearest_fit(config, SHAPE, number, room * GIB)
    if fit is None:  # then nothing does: not even all knobs together
        most = config.with_overrides(
            {"zero_stage": 3, "micro_batch_sequences": 1, "activation_checkpointing": True}
            | {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
        )
        assert memory_of(most, SHAPE, 1024).device > room * GIB
        return
    changed = config.with_overrides(fit.changes)
    assert memory_of(changed, SHAPE, fit.num_devices) == fit.memory
    assert fit.memory.device <= room * GIB
    assert not parallel.refusals(changed, Devices())
    for key in fit.changes:  # no change is idle, or the job without it is refused
        fewer = config.with_overrides({name: value for name, value in fit.changes.items() if name != key})
        fits = memory_of(fewer, SHAPE, fit.num_devices).device <= room * GIB
        assert not fits or parallel.refusals(fewer, Devices())


def test_what_helps_is_turned_alone() -> None:
    config = train_of(zero_stage=1, micro_batch_sequences=8)
    now = memory_of(config, SHAPE, 8).device
    found = search.single_changes(config, SHAPE, 8)
    assert {trial.words(8) for trial in found} == {
        "--zero_stage 2",
        "--micro_batch_sequences 4",
        "--activation_checkpointing true",
        "--offload_optimizer cpu",
        "16 devices",
    }
    assert all(trial.memory.device < now for trial in found)


@pytest.mark.parametrize(("room", "blocks"), [(10, 0), (10_000, 128)])
def test_the_largest_forward_pass(room: int, blocks: int) -> None:
    assert search.largest_micro_batch(train_of(zero_stage=2), SHAPE, 8, room * GIB) == blocks
