"""Direct preference optimization: the better of two answers becomes likelier, measured against the model before.

The sigmoid loss of Rafailov et al. 2023 (arXiv:2305.18290). A block holds pairs of documents, the chosen answer and
then the rejected one, each after its prompt; what is learned are sums over the answers' tokens. The reference is the
same model with its adapter switched off: it costs a forward pass, and no second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from app.training import adapter
from app.training.feed import IGNORED


@dataclass(frozen=True)
class Judged:
    """Sums over the pairs of a micro-batch: the loss, and [3] how many are told right, reward margin, pairs."""

    loss_sum: torch.Tensor
    tally: torch.Tensor


def judge(model: Any, inputs: Mapping[str, torch.Tensor], block_tokens: int, beta: float) -> Judged:
    """Two forward passes over blocks of pairs; under ZeRO-3 collective. Gradients flow from the second if it records.

    `inputs` are those of the feed: input_ids, labels and position_ids, [B, T] or joined to one row.
    """
    given = {name: inputs[name] for name in ("input_ids", "position_ids")}
    module = getattr(model, "module", model)  # DeepSpeed's engine does not know in which mode its module is
    was_training = module.training
    with torch.no_grad(), adapter.switched_off(module):
        module.eval()
        before = _pair_sums(model(**given).logits, inputs, block_tokens)
    module.train(was_training)
    now = _pair_sums(model(**given).logits, inputs, block_tokens)
    return compare(now, before, is_pair(inputs, block_tokens), beta)


def compare(now: torch.Tensor, before: torch.Tensor, valid: torch.Tensor, beta: float) -> Judged:
    """From log-probabilities [B, P, 2] of chosen and rejected answers, under the model and under the reference."""
    margins = beta * ((now - before)[..., 0] - (now - before)[..., 1])  # [B, P], of the implicit rewards
    losses = -torch.nn.functional.logsigmoid(margins)
    tally = torch.stack([((margins > 0) & valid).sum(), (margins * valid).sum(), valid.sum()])
    return Judged((losses * valid).sum(), tally.detach().double())


def is_pair(inputs: Mapping[str, torch.Tensor], block_tokens: int) -> torch.Tensor:
    """[B, P], whether both documents of a place have answers: padding has none, nor have rows that fill a batch up."""
    counted = _by_document((inputs["labels"] != IGNORED).view(-1, block_tokens).float(), inputs, block_tokens)
    return (counted > 0).all(-1)


def _pair_sums(logits: torch.Tensor, inputs: Mapping[str, torch.Tensor], block_tokens: int) -> torch.Tensor:
    """[B, P, 2], the log-probability of each answer."""
    labels = inputs["labels"].view(-1, block_tokens)
    logits = logits.view(*labels.shape, -1)[:, :-1].float()  # [B, T-1, V]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return _by_document(-torch.nn.functional.pad(losses, (1, 0)), inputs, block_tokens)


def _by_document(values: torch.Tensor, inputs: Mapping[str, torch.Tensor], block_tokens: int) -> torch.Tensor:
    """Sums of [B, T] over each document, two by two: [B, P, 2]."""
    documents = (inputs["position_ids"].view(-1, block_tokens) == 0).cumsum(1) - 1  # [B, T]
    num_pairs = int(documents.max()) // 2 + 1
    sums = values.new_zeros(len(values), 2 * num_pairs).scatter_add(1, documents, values)
    return sums.view(len(values), num_pairs, 2)
