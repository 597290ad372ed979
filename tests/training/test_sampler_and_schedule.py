import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training import sampler
from app.training.config import OptimizerConfig, TrainConfig
from app.training.schedule import learning_rate
from app.training.zero import deepspeed_config


@given(num_rows=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_row_once_an_epoch(num_rows: int, batch: int, seed: int) -> None:
    epochs = 3
    steps = -(-epochs * num_rows // batch)
    rows = np.concatenate([sampler.rows_of_step(seed, step, num_rows, batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_rows_are_a_function_of_seed_and_step() -> None:
    first = [sampler.rows_of_step(1, step, 1000, 8).tolist() for step in range(200)]
    sampler._epoch_order.cache_clear()
    assert [sampler.rows_of_step(1, step, 1000, 8).tolist() for step in reversed(range(200))] == first[::-1]
    assert sampler.rows_of_step(2, 0, 1000, 8).tolist() != first[0]
    assert first[0] == [975, 553, 800, 316, 809, 879, 808, 650]  # a change here breaks the resume of older runs


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_shares_of_all_ranks_are_the_batch(world_size: int) -> None:
    rows = sampler.rows_of_step(0, 3, 100, 8)
    shares = [sampler.rows_of_rank(rows, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == rows.tolist()


def test_learning_rate_by_step() -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, final_learning_rate_ratio=0.1)
    rates = [learning_rate(step, 110, optimizer) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert max(rates) == pytest.approx(1e-3)


def test_the_batch_must_divide() -> None:
    with pytest.raises(ValueError, match=r"global_batch_sequences \(10\) must be a multiple .* \(8\)"):
        TrainConfig(global_batch_sequences=10, micro_batch_sequences=4, num_workers=2)


def test_deepspeed_config_follows_ours() -> None:
    config = TrainConfig(
        global_batch_sequences=16, micro_batch_sequences=4, num_workers=2, dtype="bfloat16", zero_stage=2
    )
    made = deepspeed_config(config, use_gpu=True)
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2 == 16
    assert made["zero_optimization"]["stage"] == 2
    assert made["bf16"]["enabled"] is True
    assert deepspeed_config(TrainConfig(), use_gpu=False)["zero_optimization"]["overlap_comm"] is False


def test_warmup_stable_decay() -> None:
    optimizer = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=2,
        final_learning_rate_ratio=0.2,
        schedule="warmup_stable_decay",
        decay_ratio=0.4,
    )
    rates = [round(learning_rate(step, 10, optimizer), 3) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
