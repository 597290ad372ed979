"""Bits per byte on the held-out blocks, the figure that compares models whatever their tokenizers.

Every rank scores its share of the blocks; their sum is one number on all. It chooses nothing by that number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.training import batches


@dataclass(frozen=True)
class HeldOut:
    """The held-out blocks [N, T] and the UTF-8 bytes that their scored tokens stand for."""

    blocks: batches.Blocks
    scored_bytes: float

    @classmethod
    def read(cls, tokens_uri: str, figures: Any) -> HeldOut | None:
        """None when the split fills no block. A block's first token is context only; the tail is not scored.

        The bytes are those of the split times the share of its tokens that are scored.
        """
        if not figures["blocks"]:
            return None
        blocks = batches.read_blocks(tokens_uri, "held_out")
        scored_tokens = blocks.shape[0] * (blocks.shape[1] - 1)
        return cls(blocks, figures["bytes"] * scored_tokens / figures["tokens"])

    @torch.no_grad()
    def bits_per_byte(self, engine: Any, micro_batch: int) -> float:
        """Cross-entropy in bits over bytes; collective. Every rank runs as many forward passes as the others."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        once = micro_batch * world_size
        engine.eval()
        nats = torch.zeros((), dtype=torch.float64, device=engine.device)
        for start in range(0, len(self.blocks), once):
            rows = np.arange(start, start + once)[rank::world_size]
            inside = rows < len(self.blocks)  # the last pass is filled up with block 0, which does not count there
            input_ids = torch.from_numpy(self.blocks[np.where(inside, rows, 0)]).long().to(engine.device)  # [B, T]
            logits = engine(input_ids=input_ids).logits[:, :-1].float()  # [B, T-1, V]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
            nats += losses.sum(1).double()[torch.from_numpy(inside)].sum()
        engine.train()
        torch.distributed.all_reduce(nats)
        return float(nats) / math.log(2) / self.scored_bytes
