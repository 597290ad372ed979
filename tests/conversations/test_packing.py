"""Nothing is lost, nothing crosses a border, and blocks are full."""

import random

import numpy as np

from app.conversations.packing import Piece, assign, fill

T, PADDING = 32, 7


def make_piece(length: int, first: int = 100) -> Piece:
    return Piece(np.arange(first, first + length, dtype=np.int32), np.arange(length) % 2 == 0)


def test_every_piece_is_in_one_block_and_blocks_are_full() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, T) for _ in range(500)]
    blocks = assign(lengths, T)
    assert sorted(index for block in blocks for index in block) == list(range(500))
    used = [sum(lengths[index] for index in block) for block in blocks]
    assert max(used) <= T
    assert sum(used) / (len(blocks) * T) > 0.97
    assert assign(lengths, T) == blocks
    assert assign([T] * 3, T) == [[0], [1], [2]]
    assert assign([], T) == []


def test_a_block_is_its_pieces_and_padding() -> None:
    block = fill([make_piece(5), make_piece(10, 200)], T, PADDING)
    assert block.document_starts == [0, 5, 15]
    assert block.input_ids.tolist() == [*range(100, 105), *range(200, 210), *[PADDING] * 17]
    assert np.flatnonzero(block.loss_mask).tolist() == [2, 4, 7, 9, 11, 13]  # none where a document begins
    assert block.input_ids.dtype == np.int32


def test_a_full_block_has_no_padding() -> None:
    block = fill([make_piece(T)], T, PADDING)
    assert block.document_starts == [0]
    assert PADDING not in block.input_ids
