"""A mixture of experts while it trains: the loss or the bias that evens out the load, and where the tokens went.

Hooks read the routers' logits and choices in the forward pass (not when it is repeated for the backward pass, nor in
an evaluation). The loss is that of Fedus et al. 2021 (Switch, arXiv:2101.03961, equation 4), for each layer on its own;
transformers pools all layers, so that one layer's favourite can hide another's. Where a router has a bias for its
choice, that is moved after each step instead (Wang et al. 2024, arXiv:2408.15664), which transformers leaves to us. No
expert has a capacity, so no token is dropped. It does not add up the training loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from app.training.families import BIAS, num_experts

Shares = npt.NDArray[np.float64]  # [layers, experts], each row sums to 1


class Experts:
    """Watches the routers of a model that DeepSpeed has taken over: ZeRO-3 has to see their outputs first."""

    def __init__(self, model: Any, routers: list[Any], bias_rate: float) -> None:
        model.config.output_router_logits = False  # else transformers adds its own loss to the cross-entropy
        self.num_experts = num_experts(model.config)
        self._biased = [router for router in routers if hasattr(router, BIAS)]
        self._bias_rate = bias_rate
        self.coefficient = 0.0 if self._biased else float(model.config.router_aux_loss_coef)
        self._num_layers = len(routers)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # logits [N, E], choices [N, K], by layer
        self._is_open = False
        self._sums = torch.zeros(self._num_layers * self.num_experts + 2, dtype=torch.float64)
        model.register_forward_pre_hook(self._open)
        model.register_forward_hook(self._close)
        for router in routers:
            router.register_forward_hook(self._see)

    @classmethod
    def of(cls, model: Any, bias_rate: float = 0.0) -> Self | None:
        """None for a dense model. A step moves a router's bias by `bias_rate`, where it has one."""
        if not num_experts(model.config):
            return None
        routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
        assert routers, f"{model.config.model_type}: no routers found"
        return cls(model, routers, bias_rate)

    def _open(self, *_: Any) -> None:
        self._seen, self._is_open = [], torch.is_grad_enabled()

    def _close(self, *_: Any) -> None:
        self._is_open = False

    def _see(self, router: Any, inputs: Any, outputs: Any) -> None:
        if self._is_open:
            logits, _, chosen = outputs
            self._seen.append((logits, chosen))

    def balanced(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss to go backward from: that of the forward pass just done, and the weighted balancing loss.

        Rows of `labels` [B, T] without any label fill up the batch: their tokens do not count.
        """
        assert len(self._seen) == self._num_layers, "a forward pass comes first"
        is_counted = (labels >= 0).any(1, keepdim=True).expand_as(labels).flatten().to(loss.device)  # [B·T]
        losses, loads = [], []
        for logits, chosen in self._seen:
            loads.append(count_tokens(chosen, is_counted, self.num_experts))
            losses.append(loss.new_zeros(()) if self._biased else balance(logits, loads[-1], is_counted))
        self._seen = []
        mean = torch.stack(losses).mean()
        ends = torch.stack([mean.detach().double(), torch.ones_like(mean, dtype=torch.float64)])
        self._sums = self._sums.to(loss.device) + torch.cat([*(load.double() for load in loads), ends])
        return loss + self.coefficient * mean

    def values(self) -> tuple[dict[str, float], Shares]:
        """The step's load figures over all ranks, and the share of each expert; collective.

        Moves the biases by them, so it ends a step. Starts to count anew.
        """
        torch.distributed.all_reduce(self._sums)
        *loads, balance_sum, passes = self._sums.tolist()
        self._sums.zero_()
        counts = np.array(loads).reshape(self._num_layers, self.num_experts)
        shares = counts / counts.sum(1, keepdims=True)
        if not self._biased:
            return {"balance_loss": balance_sum / passes, **load_values(shares)}, shares
        move_biases([getattr(router, BIAS) for router in self._biased], counts, self._bias_rate)
        largest = max(float(getattr(router, BIAS).abs().max()) for router in self._biased)
        return {"router_bias_max": largest, **load_values(shares)}, shares


@torch.no_grad()
def move_biases(biases: Sequence[torch.Tensor], counts: Shares, rate: float) -> None:
    """Down by the rate for experts that got more than the mean of their layer, up for those that got less.

    `biases` are [E] for each layer, `counts` the tokens [layers, E] of the step: whole numbers, so that it does not
    depend on which worker counted them.
    """
    against = np.sign(counts.sum(1, keepdims=True) - counts.shape[1] * counts)
    for bias, direction in zip(biases, against, strict=True):
        bias.add_(torch.from_numpy(direction).to(bias), alpha=rate)


def count_tokens(chosen: torch.Tensor, is_counted: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens each expert got [E]; `chosen` [N, K] are ids of experts, `is_counted` is [N] bool."""
    spread = is_counted.to(torch.float32).repeat_interleave(chosen.shape[1])
    return torch.zeros(num_experts, device=chosen.device).index_add_(0, chosen.flatten(), spread)


def balance(logits: torch.Tensor, load: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """The balancing loss of a layer, from logits [N, E] and the experts' tokens [E] of those that are counted [N].

    E · Σ (an expert's tokens over all) · (its mean probability): the experts of a token when even, E at worst.
    """
    weights = is_counted.to(torch.float32)
    tokens = weights.sum().clamp(min=1)
    probabilities = torch.softmax(logits.float(), -1)  # [N, E]
    mean = (probabilities * weights[:, None]).sum(0) / tokens
    return logits.shape[-1] * (load / tokens * mean).sum()


def load_values(shares: Shares) -> dict[str, float]:
    """Figures of [layers, experts] shares, 1.0 when even: of the worst layer the largest and the smallest share over
    the mean, the mean layer's entropy over the most that it can be, and the largest of each layer.

    >>> load_values(np.array([[0.5, 0.5], [0.75, 0.25]]))["expert_load_max"]
    1.5
    """
    size = shares.shape[1]
    safe = np.where(shares > 0, shares, 1.0)
    entropy = -(shares * np.log(safe)).sum(1) / math.log(size)
    largest = size * shares.max(1)
    return {
        "expert_load_max": float(largest.max()),
        "expert_load_min": float(size * shares.min()),
        "expert_load_entropy": float(entropy.mean()),
        **{f"expert_load_max_layer_{layer:02d}": float(value) for layer, value in enumerate(largest)},
    }
