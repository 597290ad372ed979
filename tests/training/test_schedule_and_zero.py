import pytest

from app.training.config import OptimizerConfig, TrainConfig
from app.training.schedule import learning_rate
from app.training.zero import deepspeed_config


def test_learning_rate_by_step() -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, final_learning_rate_ratio=0.1)
    rates = [learning_rate(step, 110, optimizer) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert max(rates) == pytest.approx(1e-3)


def test_deepspeed_config_follows_ours() -> None:
    config = TrainConfig(
        global_batch_sequences=16, micro_batch_sequences=4, num_workers=2, dtype="bfloat16", zero_stage=2
    )
    made = deepspeed_config(config, world_size=2, use_gpu=True)
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2 == 16
    assert made["zero_optimization"]["stage"] == 2
    assert made["bf16"]["enabled"] is True
    assert deepspeed_config(TrainConfig(), world_size=2, use_gpu=False)["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize(("num_workers", "steps"), [(1, 3), (2, 2), (3, 1), (5, 1), (10, 1)])
def test_the_forward_passes_hold_the_largest_share(num_workers: int, steps: int) -> None:
    """10 rows in micro-batches of 4: the largest share is 10, 5, 4, 2 and 1 rows."""
    config = TrainConfig(global_batch_sequences=10, micro_batch_sequences=4, num_workers=2)
    assert config.accumulation_steps(num_workers) == steps
    assert deepspeed_config(config, num_workers, use_gpu=False)["gradient_accumulation_steps"] == steps


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
