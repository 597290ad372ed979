"""TRL's SFTTrainer with LoRA under torchrun: the same model, conversations, token ids and settings as ours.

Arguments: OUTPUT SETTINGS, a JSON file of a TrainConfig, the conversations with their masks, and how many each rank
takes a step. It writes the adapter; the median seconds of a step after the warm-up are its answer.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from competitors import demo_training
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from app.training.config import TrainConfig


class Clock(TrainerCallback):  # type: ignore[misc]
    """The times at the ends of the steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())


def arguments(config: TrainConfig, output: Path, batch: int) -> SFTConfig:
    """SFTTrainer's settings, the same as ours where it has them."""
    optimizer = config.optimizer
    return SFTConfig(
        output_dir=str(output),
        bf16=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        completion_only_loss=True,
        max_length=block_tokens_of(config),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optimizer.final_learning_rate_ratio},
        warmup_steps=optimizer.warmup_steps,
        ddp_find_unused_parameters=False,
        **demo_training.trainer_arguments(config),
    )


def block_tokens_of(config: TrainConfig) -> int:
    """T of ours: the longest conversation."""
    from app.artifacts import read_manifest

    return int(str(read_manifest(config.tokens_uri, "tokens").config["block_tokens"]))


def main() -> None:
    output, given = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    config = TrainConfig.model_validate(given["config"])
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.init_from_uri, dtype=torch.float32),
        args=arguments(config, output / "work", given["batch"]),
        train_dataset=Dataset.from_list(given["conversations"]),
        processing_class=AutoTokenizer.from_pretrained(config.init_from_uri),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=config.adapter.rank,
            lora_alpha=config.adapter.alpha,
            lora_dropout=config.adapter.dropout,
            target_modules="all-linear",
        ),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    steps = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    demo_training.answer(output, {"step_seconds": statistics.median(steps[given["warm_up"] :])})
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort the interpreter's own exit now and then


if __name__ == "__main__":
    main()
