"""transformers' Trainer with DeepSpeed: the same model, tokens, order and DeepSpeed config.

Arguments: OUTPUT SETTINGS WARM_UP. It logs, saves and evaluates nothing. The learning rate is constant.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml
from competitors import demo_training
from competitors.torchrun_deepspeed import shape_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from app.training.batches import open_plan, open_train_blocks
from app.training.config import TrainConfig
from app.training.engine import fresh_model
from app.training.sampler import rows_of_step
from app.training.zero import deepspeed_config


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of the warm-up to the end of the last step."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self._began = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        if state.global_step == self._warm_up:
            self._began = now
        self.seconds = now - self._began


def arguments(config: TrainConfig, output: Path, world_size: int) -> TrainingArguments:
    """Trainer's settings, the same as ours where it has them."""
    return TrainingArguments(
        output_dir=str(output),
        deepspeed=deepspeed_config(config, world_size, use_gpu=False),
        per_device_train_batch_size=config.micro_batch_sequences,
        gradient_accumulation_steps=config.accumulation_steps(world_size),
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        **demo_training.trainer_arguments(config),
    )


def model_of(config: TrainConfig) -> Any:
    """The model that ours builds; Trainer's arguments come first: they shard it."""
    torch.manual_seed(config.seed)
    model = fresh_model(config, shape_of(config))
    model.config.use_cache = False
    return model


def dataset_of(config: TrainConfig) -> list[dict[str, torch.Tensor]]:
    """The rows of all steps in order: Trainer deals them to the ranks as our sampler does."""
    (blocks,), plan = open_train_blocks(config), open_plan(config)
    rows = [int(row) for step in range(config.num_steps) for row in rows_of_step(plan, step)]
    return [{"input_ids": ids, "labels": ids} for ids in map(torch.from_numpy, blocks.input_ids[rows].astype("int64"))]


def main() -> None:
    output, settings, warm_up = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = TrainConfig.model_validate(yaml.safe_load(settings.read_text()))
    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    trainer_arguments = arguments(config, output, config.num_workers)
    clock = Clock(warm_up)
    trainer = Trainer(model_of(config), trainer_arguments, train_dataset=dataset_of(config), callbacks=[clock])
    loss = trainer.train().training_loss
    demo_training.answer(output, {"seconds": clock.seconds, "loss": loss})
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort the interpreter's own exit now and then


if __name__ == "__main__":
    main()
