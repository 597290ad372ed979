"""The bare loop: our engine and data order under torchrun; forward, backward, step and nothing else.

Arguments: OUTPUT SETTINGS WARM_UP. All batches are in memory before the first step. The learning rate is constant.
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

from app.training.batches import open_plan, open_train_blocks
from app.training.config import TrainConfig
from app.training.engine import build
from app.training.sampler import rows_of_rank, rows_of_step


def batches(config: TrainConfig, rank: int, world_size: int) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of this rank, step by step."""
    (blocks,), plan = open_train_blocks(config), open_plan(config)
    steps = []
    for step in range(config.num_steps):
        rows = rows_of_rank(rows_of_step(plan, step), rank, world_size)
        input_ids = torch.from_numpy(blocks.input_ids[rows]).long()  # [B, T]
        steps.append([{"input_ids": part, "labels": part} for part in input_ids.split(config.micro_batch_sequences)])
    return steps


def shape_of(config: TrainConfig) -> dict[str, int]:
    """What the model takes from the tokens."""
    from app.artifacts import read_manifest

    tokens = read_manifest(config.tokens_uri, "tokens")
    sizes = {"vocab_size": tokens.figures["vocab_size"], "block_tokens": tokens.config["block_tokens"]}
    return {name: int(str(size)) for name, size in sizes.items()} | {"end_of_text_id": 0}


def main() -> None:
    output, settings, warm_up = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = TrainConfig.model_validate(yaml.safe_load(settings.read_text()))
    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine: Any = build(config, shape_of(config), world_size, use_gpu=False)
    began, loss_sum = 0.0, torch.zeros(())
    for step, micro_batches in enumerate(batches(config, rank, world_size)):
        if step == warm_up:
            began = time.perf_counter()
        for micro_batch in micro_batches:
            loss = engine(**micro_batch).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
    seconds = time.perf_counter() - began
    num_losses = config.num_steps * config.accumulation_steps(world_size)
    demo_training.answer(output, {"seconds": seconds, "loss": float(loss_sum) / num_losses})
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort the interpreter's own exit now and then


if __name__ == "__main__":
    main()
