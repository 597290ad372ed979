"""Bits per byte on held-out blocks, the figure that compares models whatever their tokenizers.

The workers share the blocks and add up, or one process scores a checkpoint's whole weights. It chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from app.artifacts import read_manifest
from app.training.batches import Blocks, open_blocks
from app.training.checkpoint import SCORE
from app.training.config import TrainConfig
from app.training.feed import positions_of

FIGURES = (SCORE, "replay_bits_per_byte")


@dataclass(frozen=True)
class HeldOut:
    """Held-out blocks [N, T] and the UTF-8 bytes that their scored tokens stand for."""

    blocks: Blocks
    scored_bytes: float

    @classmethod
    def open(cls, tokens_uri: str, cache_dir: str) -> Self | None:
        """None when the split fills no block. A block's first token is context only; the tail is not scored.

        The bytes are those of the split times the share of its tokens that are scored; of conversations, those of the
        answers.
        """
        tokens = read_manifest(tokens_uri, "tokens")
        figures: Any = tokens.figures["held_out"]
        if not figures["blocks"]:
            return None
        blocks = open_blocks(tokens.uri, "held_out", tokens.digest, cache_dir)
        if blocks.loss_mask is not None:
            return cls(blocks, figures["bytes"])
        scored_tokens = len(blocks) * (blocks.block_tokens - 1)
        return cls(blocks, figures["bytes"] * scored_tokens / figures["tokens"])

    def bits_per_byte(self, model: Any, micro_batch: int, rank: int = 0, world_size: int = 1) -> float:
        """Cross-entropy in bits over bytes; collective when there are several ranks, all of which get the sum."""
        nats = self._nats(model, micro_batch, rank, world_size)
        if world_size > 1:
            torch.distributed.all_reduce(nats)
        return float(nats) / math.log(2) / self.scored_bytes

    @torch.no_grad()
    def _nats(self, model: Any, micro_batch: int, rank: int, world_size: int) -> torch.Tensor:
        """Sum over this rank's blocks; every rank runs as many forward passes as the others."""
        once = micro_batch * world_size
        device = model.device
        nats = torch.zeros((), dtype=torch.float64, device=device)
        model.eval()
        for start in range(0, len(self.blocks), once):
            rows = np.arange(start, start + once)[rank::world_size]
            inside = rows < len(self.blocks)  # the last pass is filled up with block 0, which does not count there
            chosen = np.where(inside, rows, 0)
            inputs = {"input_ids": torch.from_numpy(self.blocks.input_ids[chosen]).long().to(device)}  # [B, T]
            if self.blocks.loss_mask is not None:  # packed conversations do not see each other
                positions = positions_of([(self.blocks, int(row)) for row in chosen], self.blocks.block_tokens)
                inputs["position_ids"] = torch.from_numpy(positions).to(device)
            logits = _logits(model, inputs)[:, :-1].float()  # [B, T-1, V]
            targets = inputs["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            if self.blocks.loss_mask is not None:
                losses = losses * torch.from_numpy(self.blocks.loss_mask[chosen][:, 1:]).to(device)
            nats += losses.sum(1).double()[torch.from_numpy(inside)].sum()
        model.train()
        return nats


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, T, V]; flash attention tells documents apart in a single row only."""
    if "position_ids" in inputs and getattr(model.config, "_attn_implementation", "") == "flash_attention_2":
        joined = {name: tensor.view(1, -1) for name, tensor in inputs.items()}
        logits: torch.Tensor = model(**joined).logits.view(*inputs["input_ids"].shape, -1)
        return logits
    logits = model(**inputs).logits
    return logits


def open_all(config: TrainConfig) -> dict[str, HeldOut]:
    """The held-out texts to score, by the name of their figure: of the corpus, and of the one that is replayed."""
    uris = zip(FIGURES, (config.tokens_uri, config.replay.tokens_uri), strict=True)
    opened = {name: HeldOut.open(config.resolve(uri), config.cache_dir) for name, uri in uris if uri}
    return {name: held_out for name, held_out in opened.items() if held_out}


def score(
    texts: Mapping[str, HeldOut], model: Any, micro_batch: int, ranks: tuple[int, int] = (0, 1)
) -> dict[str, float]:
    """Bits per byte of each; `ranks` are this worker's and their number."""
    return {name: held_out.bits_per_byte(model, micro_batch, *ranks) for name, held_out in texts.items()}
