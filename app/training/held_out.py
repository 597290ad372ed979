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
from torch.nn import functional

from app.artifacts import read_manifest
from app.training import preference, sharing
from app.training.batches import PAIRS, Blocks, open_blocks
from app.training.checkpoint import PREFERENCE_SCORE, SCORE
from app.training.config import TrainConfig
from app.training.feed import IGNORED, batch_of, positions_of
from app.training.layout import Layout
from app.training.sampler import Rows

FIGURES = (SCORE, "replay_bits_per_byte")
ALONE = Layout()


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

    def bits_per_byte(self, model: Any, micro_batch: int, layout: Layout = ALONE) -> float:
        """Cross-entropy in bits over bytes; collective when there are several ranks, all of which get the sum."""
        nats = self._nats(model, micro_batch, layout)
        if layout.world_size > 1:
            torch.distributed.all_reduce(nats)
        return self.bits_per_byte_of(float(nats) / layout.tensor_size)

    def bits_per_byte_of(self, nats: float) -> float:
        """Of the cross-entropy of all blocks together."""
        return nats / math.log(2) / self.scored_bytes

    @torch.no_grad()
    def preferences(self, model: Any, micro_batch: int, layout: Layout = ALONE) -> dict[str, float]:
        """Loss, share told right, and reward margin, means over the pairs; collective when there are several ranks."""
        sums = torch.zeros(4, dtype=torch.float64, device=model.device)
        model.eval()
        for rows, inside in self._passes(micro_batch, layout):
            inputs = batch_of([(self.blocks, int(row)) for row in rows], int(inside.sum()))
            tensors = {name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()}
            judged = preference.judge(model, tensors, self.blocks.block_tokens, self.beta)
            sums += torch.cat([judged.loss_sum[None].double(), judged.tally])
        model.train()
        if layout.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss, right, margin, count = sums.tolist()
        return {
            PREFERENCE_SCORE: loss / count,
            "held_out_preference_accuracy": right / count,
            "held_out_reward_margin": margin / count,
        }

    def _passes(self, micro_batch: int, layout: Layout) -> Iterator[tuple[Rows, npt.NDArray[np.bool_]]]:
        """Rows of this rank's forward passes, as many as the others have; block 0 fills up and is not inside."""
        once = micro_batch * layout.data_size
        for start in range(0, len(self.blocks), once):
            rows = np.arange(start, start + once)[layout.data_rank :: layout.data_size]
            inside = rows < len(self.blocks)
            yield np.where(inside, rows, 0), inside

    def batches(self, micro_batch: int, layout: Layout) -> Iterator[dict[str, torch.Tensor]]:
        """The inputs [B, T] of each of this rank's forward passes, with `targets`: the token after each, if it counts.

        Every rank has as many as the others.
        """
        for chosen, inside in self._passes(micro_batch, layout):
            ids = torch.from_numpy(self.blocks.input_ids[chosen]).long()
            batch, labels = {"input_ids": ids}, ids.masked_fill(~torch.from_numpy(inside)[:, None], IGNORED)
            if self.blocks.loss_mask is not None:  # packed conversations do not see each other
                labels[torch.from_numpy(~self.blocks.loss_mask[chosen])] = IGNORED
                positions = positions_of([(self.blocks, int(row)) for row in chosen], self.blocks.block_tokens)
                batch["position_ids"] = torch.from_numpy(positions)
            yield {**batch, "targets": sharing.next_tokens(labels)}

    def num_passes(self, micro_batch: int, layout: Layout) -> int:
        """Of each rank."""
        return math.ceil(len(self.blocks) / (micro_batch * layout.data_size))

    @torch.no_grad()
    def _nats(self, model: Any, micro_batch: int, layout: Layout) -> torch.Tensor:
        """Sum over this rank's blocks, of its tokens."""
        nats = torch.zeros((), dtype=torch.float64, device=model.device)
        model.eval()
        for batch in self.batches(micro_batch, layout):
            inputs = {name: own.to(model.device) for name, own in sharing.own_tokens(batch, layout).items()}
            targets = inputs.pop("targets")
            nats += nats_of(_logits(model, inputs), targets)
        model.train()
        return nats


def nats_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the targets [B, T] that count; logits [B, T, V]."""
    ahead = logits.float().transpose(1, 2)
    losses = functional.cross_entropy(ahead, targets, ignore_index=IGNORED, reduction="none")  # [B, T]
    return losses.sum(1).double().sum()


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


def score(texts: Mapping[str, HeldOut], model: Any, micro_batch: int, layout: Layout = ALONE) -> dict[str, float]:
    """Bits per byte of each, or what is measured of pairs; the layout says which part is this worker's."""
    figures: dict[str, float] = {}
    for name, held_out in texts.items():
        if held_out.beta:
            figures |= held_out.preferences(model, micro_batch, layout)
        else:
            figures[name] = held_out.bits_per_byte(model, micro_batch, layout)
    return figures
