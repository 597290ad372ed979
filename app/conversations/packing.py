"""Conversations into token blocks of a fixed length: none is cut by a border, and the rest of a block is padding.

Best-fit decreasing: the longest first, each into the block that it fills best. What goes together (the two answers of a
preference) is packed as one. Every piece and the padding begin a document, so that attention stays inside each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Piece:
    """Token ids [N] and whether each is to be predicted [N]."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Block:
    """input_ids [T], loss_mask [T], and the offsets where pieces and the padding begin."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    document_starts: list[int]


def assign(lengths: Sequence[int], block_tokens: int) -> list[list[int]]:
    """For each block the indices of what goes into it, in order; no length may exceed block_tokens.

    >>> assign([3, 5, 2, 6], 8)
    [[2, 3], [0, 1]]
    """
    blocks: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens left and the block, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        assert lengths[index] <= block_tokens, "too long for a block"
        found = bisect_left(free, (lengths[index], -1))
        if found < len(free):
            left, block = free.pop(found)
        else:
            left, block = block_tokens, len(blocks)
            blocks.append([])
        blocks[block].append(index)
        insort(free, (left - lengths[index], block))
    return [sorted(block) for block in blocks]


def fill(pieces: Sequence[Piece], block_tokens: int, padding: int) -> Block:
    """The pieces one after the other, then padding. The first token of a piece is never predicted."""
    input_ids = np.full(block_tokens, padding, np.int32)
    loss_mask = np.zeros(block_tokens, np.bool_)
    starts = []
    end = 0
    for piece in pieces:
        starts.append(end)
        input_ids[end : end + len(piece)] = piece.input_ids
        loss_mask[end + 1 : end + len(piece)] = piece.loss_mask[1:]
        end += len(piece)
    if end < block_tokens:
        starts.append(end)
    return Block(input_ids, loss_mask, starts)
