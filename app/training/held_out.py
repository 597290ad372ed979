"""Bits per byte on held-out blocks, the figure that compares models whatever their tokenizers; of pairs of answers,
how many are told right.

The workers share the blocks and add up, or one process scores a checkpoint's whole weights. It chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from app.artifacts import read_manifest
from app.training import preference
from app.training.batches import PAIRS, Blocks, open_blocks
from app.training.checkpoint import PREFERENCE_SCORE, SCORE
from app.training.config import TrainConfig
from app.training.feed import batch_of, positions_of
from app.training.sampler import Rows

FIGURES = (SCORE, "replay_bits_per_byte")


@dataclass(frozen=True)
class HeldOut:
    """Held-out blocks [N, T] and the UTF-8 bytes that their scored tokens stand for; with a beta, pairs of answers."""

    blocks: Blocks
    scored_bytes: float
    beta: float = 0.0

    @classmethod
    def open(cls, tokens_uri: str, cache_dir: str, beta: float = 0.0) -> Self | None:
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
            return cls(blocks, figures["bytes"], beta if tokens.figures.get("kind") == PAIRS else 0.0)
        scored_tokens = len(blocks) * (blocks.block_tokens - 1)
        return cls(blocks, figures["bytes"] * scored_tokens / figures["tokens"])

    def bits_per_byte(self, model: Any, micro_batch: int, rank: int = 0, world_size: int = 1) -> float:
        """Cross-entropy in bits over bytes; collective when there are several ranks, all of which get the sum."""
        nats = self._nats(model, micro_batch, rank, world_size)
        if world_size > 1:
            torch.distributed.all_reduce(nats)
        return self.bits_per_byte_of(float(nats))

    def bits_per_byte_of(self, nats: float) -> float:
        """Of the cross-entropy of all blocks together."""
        return nats / math.log(2) / self.scored_bytes

    @torch.no_grad()
    def preferences(self, model: Any, micro_batch: int, rank: int = 0, world_size: int = 1) -> dict[str, float]:
        """Loss, share told right, and reward margin, means over the pairs; collective when there are several ranks."""
        sums = torch.zeros(4, dtype=torch.float64, device=model.device)
        model.eval()
        for rows, inside in self.passes(micro_batch, rank, world_size):
            inputs = batch_of([(self.blocks, int(row)) for row in rows], int(inside.sum()))
            tensors = {name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()}
            judged = preference.judge(model, tensors, self.blocks.block_tokens, self.beta)
            sums += torch.cat([judged.loss_sum[None].double(), judged.tally])
        model.train()
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        loss, right, margin, count = sums.tolist()
        return {
            PREFERENCE_SCORE: loss / count,
            "held_out_preference_accuracy": right / count,
            "held_out_reward_margin": margin / count,
        }

    def passes(self, micro_batch: int, rank: int, world_size: int) -> Iterator[tuple[Rows, npt.NDArray[np.bool_]]]:
        """Rows of this rank's forward passes, as many as the others have; block 0 fills up and is not inside."""
        once = micro_batch * world_size
        for start in range(0, len(self.blocks), once):
            rows = np.arange(start, start + once)[rank::world_size]
            inside = rows < len(self.blocks)
            yield np.where(inside, rows, 0), inside

    @torch.no_grad()
    def _nats(self, model: Any, micro_batch: int, rank: int, world_size: int) -> torch.Tensor:
        """Sum over this rank's blocks; every rank runs as many forward passes as the others."""
        device = model.device
        nats = torch.zeros((), dtype=torch.float64, device=device)
        model.eval()
        for chosen, inside in self.passes(micro_batch, rank, world_size):
            inputs = {"input_ids": torch.from_numpy(self.blocks.input_ids[chosen]).long().to(device)}  # [B, T]
            if self.blocks.loss_mask is not None:  # packed conversations do not see each other
                positions = positions_of([(self.blocks, int(row)) for row in chosen], self.blocks.block_tokens)
                inputs["position_ids"] = torch.from_numpy(positions).to(device)
            mask = self.blocks.loss_mask
            given = None if mask is None else torch.from_numpy(mask[chosen]).to(device)
            summed = row_nats(_logits(model, inputs), inputs["input_ids"], given)
            nats += summed[torch.from_numpy(inside)].sum()
        model.train()
        return nats


def row_nats(logits: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of each block [B], of the tokens after its first that the mask [B, T] has; logits [B, T, V]."""
    ahead = logits[:, :-1].float().transpose(1, 2)  # [B, V, T-1]
    losses = torch.nn.functional.cross_entropy(ahead, input_ids[:, 1:], reduction="none")
    if mask is not None:
        losses = losses * mask[:, 1:]
    return losses.sum(1).double()


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
    beta = config.preference.beta
    opened = {name: HeldOut.open(config.resolve(uri), config.cache_dir, beta) for name, uri in uris if uri}
    return {name: held_out for name, held_out in opened.items() if held_out}


def score(
    texts: Mapping[str, HeldOut], model: Any, micro_batch: int, ranks: tuple[int, int] = (0, 1)
) -> dict[str, float]:
    """Bits per byte of each, or what is measured of pairs; `ranks` are this worker's and their number."""
    figures: dict[str, float] = {}
    for name, held_out in texts.items():
        if held_out.beta:
            figures |= held_out.preferences(model, micro_batch, *ranks)
        else:
            figures[name] = held_out.bits_per_byte(model, micro_batch, *ranks)
    return figures
