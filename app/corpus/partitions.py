"""Where rows meet: shards in blocks of neighbours, hashes in partitions, and what each block sends to which.

The `split_…` functions do the sending half of an exchange for one block or partition, a part for each receiver in turn;
the receiving half are functions of dedup.py over the joined parts. Texts are read from the shards' files and sent as
hashes of shingles, for candidates only. It starts nothing in parallel; stage.py does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from app.corpus import dedup
from app.corpus.config import CorpusConfig
from app.corpus.dedup import Keys
from app.corpus.shards import BATCH_DOCUMENTS, Work, read_bands, read_clean


class Shingles(NamedTuple):
    """Sets of shingles of N documents, one after the other: few large arrays, which Ray hands on without a copy."""

    keys: Keys  # [N]
    lengths: npt.NDArray[np.int64]  # [N]
    hashes: Keys  # [sum of lengths], each set in order


@dataclass(frozen=True)
class Layout:
    """Shards in blocks of neighbours, and the key at which each block begins; hashes meet in partitions."""

    blocks: list[list[Work]]
    starts: Keys
    num_partitions: int

    @classmethod
    def of(cls, works: Sequence[Work], num_partitions: int) -> Layout:
        """So many partitions and at most as many blocks."""
        bounds = np.linspace(0, len(works), min(num_partitions, len(works)) + 1).astype(int)
        blocks = [list(works[start:end]) for start, end in itertools.pairwise(bounds)]
        starts = np.concatenate([block[0].keys([block[0].shard.start]) for block in blocks])
        return cls(blocks, starts, num_partitions)

    @property
    def num_blocks(self) -> int:
        """How many blocks of shards there are."""
        return len(self.blocks)

    def by_block(self, rows: Keys) -> list[Keys]:
        """The rows, by the block that holds the document of their first column."""
        blocks = np.searchsorted(self.starts, rows[:, 0], side="right") - 1
        return dedup.split_rows(rows, blocks, self.num_blocks)

    def by_hash(self, rows: Keys, column: int) -> list[Keys]:
        """The rows, by the partition in which equal values of that column meet."""
        return dedup.split_rows(rows, dedup.partition_of(rows[:, column], self.num_partitions), self.num_partitions)


def checksum(rows: Keys) -> list[int]:
    """Length and a hash of the set of rows: equal when nothing changed."""
    mixed = dedup.mix(rows[:, 0] * np.uint64(3) + dedup.mix(rows[:, 1]))
    return [len(rows), int(np.bitwise_xor.reduce(mixed)) >> 12 if len(rows) else 0]


def join(parts: list[Keys]) -> Keys:
    """Distinct rows of all parts."""
    return dedup.distinct(np.concatenate(parts))


def large_star(parts: list[Keys]) -> Keys:
    """`dedup.large_star` of all parts."""
    return dedup.large_star(np.concatenate(parts))


def small_star(parts: list[Keys]) -> Keys:
    """`dedup.small_star` of all parts."""
    return dedup.small_star(np.concatenate(parts))


def split_rows(rows: Keys, layout: Layout, column: int) -> list[Keys]:
    """By the hash of a column."""
    return layout.by_hash(rows, column)


def split_both(edges: Keys, layout: Layout) -> list[Keys]:
    """Edges in both directions, by node."""
    return layout.by_hash(dedup.both_directions(edges), 0)


def split_to_blocks(rows: Keys, layout: Layout) -> list[Keys]:
    """By the block of the document in the first column."""
    return layout.by_block(rows)


def split_needs(pairs: Keys, partition: int, layout: Layout) -> list[Keys]:
    """Rows (document, partition that compares it), by the block that holds the document."""
    documents = np.unique(pairs)
    return layout.by_block(np.column_stack([documents, np.full(len(documents), partition, np.uint64)]))


def split_identities(block: Sequence[Work], layout: Layout) -> list[Keys]:
    """Identity rows of a block, by id."""
    rows = [np.empty((0, 3), np.uint64)]
    for work in block:
        rows += [dedup.identity_rows(table["id"].to_pylist(), keys) for keys, table in read_clean(work, ["id"])]
    return layout.by_hash(np.concatenate(rows), 0)


def split_buckets(block: Sequence[Work], fallen: Keys, layout: Layout, config: CorpusConfig) -> list[Keys]:
    """Rows (bucket key, document) of a block without the exact duplicates, by bucket."""
    rows = [np.empty((0, 2), np.uint64)]
    for work in block:
        for keys, bands in read_bands(work, config):
            stays = ~np.isin(keys, fallen[:, 0])
            rows.append(np.column_stack([bands[stays].ravel(), np.repeat(keys[stays], bands.shape[1])]))
    return layout.by_hash(np.concatenate(rows), 0)


def split_shingles(block: Sequence[Work], needs: Keys, layout: Layout, config: CorpusConfig) -> Iterator[Shingles]:
    """For each partition in turn, the sets of shingles of the documents that it compares.

    Of the whole block only the texts are held: shingles take four times their room.
    """
    keys, texts = _texts(block, np.unique(needs[:, 0]))
    places = np.searchsorted(keys, needs[:, 0])
    for partition in range(layout.num_partitions):
        rows = places[needs[:, 1] == partition]
        sets = [np.empty(0, np.uint64)]
        for start in range(0, len(rows), BATCH_DOCUMENTS):
            chosen = [texts[row] for row in rows[start : start + BATCH_DOCUMENTS]]
            hashes, offsets = dedup.shingle_hashes(chosen, config.dedup.shingle_characters)
            sets += [dedup.sorted_set(hashes[begin:end]) for begin, end in itertools.pairwise(offsets)]
        yield Shingles(keys[rows], np.array([len(one) for one in sets[1:]], np.int64), np.concatenate(sets))


def _texts(block: Sequence[Work], wanted: Keys) -> tuple[Keys, list[str]]:
    """Keys [N], in order, and texts of a block's documents whose keys are in `wanted` (sorted)."""
    keys: list[Keys] = [np.empty(0, np.uint64)]
    texts: list[str] = []
    for work in block:
        for found, table in read_clean(work, ["text"]):
            chosen = np.isin(found, wanted)
            keys.append(found[chosen])
            texts += table["text"].filter(pa.array(chosen)).to_pylist()
    return np.concatenate(keys), texts


def verify(parts: list[Shingles], pairs: Keys, min_similarity: float) -> Keys:
    """Those of the pairs whose documents' sets of shingles, in the parts, are similar."""
    keys = np.concatenate([part.keys for part in parts])
    sets = [one for part in parts if len(part.keys) for one in np.split(part.hashes, np.cumsum(part.lengths)[:-1])]
    return dedup.similar_pairs(pairs, keys, sets, min_similarity)
