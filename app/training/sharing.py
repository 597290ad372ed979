"""What workers that share a model add to one: the attention that gathers a block's tokens, and a rank's own of them.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509) by DeepSpeed: around each attention it trades tokens for heads, in place
of transformers' SDPA. It drops attention masks, so all tokens before one are seen. The labels are shifted before the
block is cut: a part's last token predicts the first of the next. Tensor parallelism needs nothing here: DeepSpeed cuts
the matrices itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from app.training.feed import IGNORED
from app.training.layout import Layout


def share_tokens(model: Any, sequence_size: int, micro_batch: int) -> Any:
    """Have the model's attention see the tokens of all ranks that share a block; collective, once in a process.

    What it returns tells DeepSpeed of the groups.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=sequence_size,
        micro_batch_size=micro_batch,
    )


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """[B, T], what each token of [B, T] labels is to predict; the last one nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def own_tokens(batch: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """This rank's of [B, T] input_ids and what goes with them, and where in the block they are; all, if none shares."""
    if layout.sequence_size == 1:
        return dict(batch)
    ids = batch["input_ids"]
    whole = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids), **batch}
    return {name: tensor[:, layout.tokens(ids.shape[1])].contiguous() for name, tensor in whole.items()}


def model_inputs(batch: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """What the model takes of a micro-batch with labels; it shifts them itself where the rank has whole blocks."""
    if layout.sequence_size == 1:
        return dict(batch)
    shifted = next_tokens(batch["labels"])
    return own_tokens({**batch, "labels": shifted, "shift_labels": shifted}, layout)
