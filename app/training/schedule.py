"""The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) or the
peak until a linear decay at the end (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395).
"""

import math

from app.training.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of the step with that index, 0 ≤ step < num_steps.

    >>> optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_learning_rate_ratio=0.0)
    >>> [round(learning_rate(step, 6, optimizer), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        progress = (step - optimizer.warmup_steps) / max(1, num_steps - optimizer.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        height = min(1.0, (num_steps - step) / (optimizer.decay_ratio * num_steps))
    floor = optimizer.final_learning_rate_ratio
    return optimizer.learning_rate * (floor + (1 - floor) * height)
