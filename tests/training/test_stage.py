from pathlib import Path

import pytest

from app.artifacts import Input, Manifest
from app.training.config import TrainConfig
from app.training.stage import _refuse_damaged, run_identity, summarize


def draft(digest: str = "a", **settings: object) -> Manifest:
    config = TrainConfig.model_validate(settings)
    return Manifest.draft("model", "/model", config, {"tokens": Input(uri="/tokens", digest=digest)})


def test_a_run_is_resumed_only_with_the_same_settings_and_data() -> None:
    same = run_identity(draft())
    assert run_identity(draft(storage_uri="/elsewhere", max_failures=9, wandb_mode="disabled")) == same
    others = [draft("b"), draft(seed=1), draft(num_steps=5), draft(**{"optimizer": {"learning_rate": 1e-4}})]
    assert len({same, *map(run_identity, others)}) == 5


def test_figures_of_a_log() -> None:
    log = [{"step": step, "loss": 8 - step / 10, "tokens_per_second": 100.0 + step} for step in range(20)]
    log[-1]["held_out_bits_per_byte"] = 2.5
    figures = summarize(log, TrainConfig(num_steps=20, global_batch_sequences=16), block_tokens=16)
    assert figures["train_loss"] == pytest.approx((6.2 + 6.1) / 2)
    assert figures["tokens"] == 20 * 16 * 16
    assert figures["held_out_bits_per_byte"] == 2.5


def test_a_step_missing_or_twice_is_noticed() -> None:
    log = [{"step": step, "loss": 1.0, "tokens_per_second": 1.0} for step in (0, 1, 1)]
    with pytest.raises(AssertionError, match="a step is missing or there twice"):
        summarize(log, TrainConfig(num_steps=3), 16)
