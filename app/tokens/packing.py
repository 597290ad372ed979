"""Documents to token blocks of a fixed length, with nothing lost.

Documents follow each other, each closed by the end-of-text token, and are cut every T tokens; where documents begin
is kept, so that a trainer can mask attention across the borders. No padding: the remainder is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]  # a stream may be longer than 2^31 tokens


@dataclass(frozen=True)
class Stream:
    """Concatenated documents: input_ids [N] and the offsets where documents begin, ascending."""

    input_ids: Ids = field(default_factory=lambda: np.empty(0, np.int32))
    document_starts: Offsets = field(default_factory=lambda: np.empty(0, np.int64))


def num_copies(identity: str, upsampling: float) -> int:
    """How often a document is packed: the whole part of its source's factor, and the rest by its id.

    >>> num_copies("00000000", 1.5), num_copies("ffffffff", 1.5)
    (2, 1)
    """
    rest = upsampling % 1
    return int(upsampling) + bool(rest and int(identity[:8], 16) < rest * 16**8)


def concatenate_documents(documents: Sequence[Sequence[int]], end_of_text: int) -> Stream:
    """All documents in order, each followed by end_of_text."""
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    flat = [token for document in documents for token in (*document, end_of_text)]
    return Stream(np.array(flat, np.int32), np.cumsum(lengths) - lengths)


def join(streams: Sequence[Stream]) -> Stream:
    """One stream after the other; a stream that begins inside a document has no start at its offset 0."""
    if not streams:
        return Stream()
    return Stream(np.concatenate([stream.input_ids for stream in streams]), join_starts(streams))


def join_starts(streams: Sequence[Stream]) -> Offsets:
    """The document starts of all streams, as offsets in their concatenation."""
    lengths = [len(stream.input_ids) for stream in streams]
    offsets = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return np.concatenate([stream.document_starts + offset for stream, offset in zip(streams, offsets, strict=True)])


def cut_blocks(stream: Stream, block_tokens: int) -> tuple[Ids, list[Ids], Stream]:
    """Blocks [B, T], for each block the document starts inside it, and the tail of fewer than T tokens."""
    num_blocks = len(stream.input_ids) // block_tokens
    end = num_blocks * block_tokens
    blocks = stream.input_ids[:end].reshape(num_blocks, block_tokens)
    bounds = np.searchsorted(stream.document_starts, np.arange(num_blocks + 1) * block_tokens)
    starts = np.split((stream.document_starts % block_tokens).astype(np.int32), bounds[1:])[:-1]
    tail = Stream(stream.input_ids[end:], stream.document_starts[bounds[-1] :] - end)
    return blocks, starts, tail
