"""Training with products in FP8 beside bfloat16: the loss of every recipe, and on a GPU tokens/s and memory.

The same weights, random walks and learning rates in each run; only `float8` differs. On a GPU that has FP8 the model
has 1.1 billion parameters and is compiled; elsewhere operands are rounded to FP8 and multiplied in bfloat16, which
shows the numerics and not the speed. No Ray: torchrun runs this file on one rank.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from competitors import demo_training

from app import overlays

RECIPES = ("none", "tensorwise", "rowwise")
STEPS, LAST, WARM_STEPS = 200, 20, 20
VOCAB_SIZE, BLOCK_TOKENS, MICRO_BATCH = 2000, 128, 8
MODEL = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
GPU_VOCAB_SIZE, GPU_BLOCK_TOKENS = 32_000, 4096
GPU_MODEL = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
AIM = 0.01


def walks(step: int, vocab_size: int, block_tokens: int) -> Any:
    """The blocks of a step [B, T]: the next token is near the last."""
    steps = np.random.default_rng([0, step]).integers(0, 3, (MICRO_BATCH, block_tokens))
    return steps.cumsum(1) % vocab_size


def measure_rank(output: Path, recipe: str) -> None:
    """What torchrun runs: the losses of all steps, and the median seconds of those after the first."""
    import deepspeed
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import build
    from app.training.schedule import learning_rate

    use_gpu = torch.cuda.is_available()
    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")
    vocab_size, block_tokens = (GPU_VOCAB_SIZE, GPU_BLOCK_TOKENS) if use_gpu else (VOCAB_SIZE, BLOCK_TOKENS)
    given = {
        "model": GPU_MODEL if use_gpu else MODEL, "num_workers": 1, "zero_stage": 1, "dtype": "bfloat16",
        "micro_batch_sequences": MICRO_BATCH, "global_batch_sequences": MICRO_BATCH, "num_steps": STEPS,
        "float8": recipe, "compile": use_gpu, "activation_checkpointing": use_gpu,
        "optimizer": {"learning_rate": 3e-4 if use_gpu else 2e-3},
    }  # fmt: skip
    config = TrainConfig.model_validate(given)
    shape = {"vocab_size": vocab_size, "block_tokens": block_tokens, "end_of_text_id": 0}
    engine = build(config, shape, 1, use_gpu)
    losses, seconds = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optimizer)
        ids = torch.from_numpy(walks(step, vocab_size, block_tokens)).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    speed = MICRO_BATCH * block_tokens / statistics.median(seconds[WARM_STEPS:])
    memory = torch.cuda.max_memory_allocated() if use_gpu else 0
    name = torch.cuda.get_device_name() if use_gpu else "CPU, FP8 emulated"
    demo_training.answer(output, {"losses": losses, "speed": speed, "memory": memory, "device": name})


def main() -> None:
    given = demo_training.arguments(__doc__, "float8-losses", runs=1)
    packages = overlays.ROOT / "float8"
    found = {
        recipe: demo_training.torchrun(Path(__file__), given.folder / recipe, 1, recipe, packages=packages)[0]
        for recipe in RECIPES
    }
    plain = found["none"]
    print(f"{plain['device']}; {STEPS} steps, loss: mean of the last {LAST}")
    print(f"{'float8':12} {'first loss':>10} {'loss':>8} {'/ bfloat16':>11} {'tokens/s':>10} {'times':>6} {'GiB':>6}")
    ends = {recipe: statistics.fmean(one["losses"][-LAST:]) for recipe, one in found.items()}
    for recipe, one in found.items():
        speed, memory = one["speed"] / plain["speed"], one["memory"] / 2**30
        print(
            f"{recipe:12} {one['losses'][0]:10.4f} {ends[recipe]:8.4f} {ends[recipe] / ends['none']:11.4f}"
            f" {one['speed']:10.0f} {speed:6.2f} {memory:6.1f}"
        )
    worst = max(abs(ends[recipe] / ends["none"] - 1) for recipe in RECIPES)
    print(f"farthest from bfloat16's loss: {100 * worst:.2f} %   (aim: {100 * AIM:.0f} %)")


if __name__ == "__main__":
    if demo_training.is_rank():
        measure_rank(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
