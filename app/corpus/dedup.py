"""Identity of documents: exact duplicates by hash, near-duplicates by MinHash, clusters of them, repeated lines.

A document is known by its key: the number of its file, then its position there, so that the order of keys is the order
of reading, whatever the shards. Everything works on arrays of keys and hashes: rows that share a hash meet in one
partition (`partition_of`), and each function does the work of one partition; nothing depends on how many there are.
MinHash LSH after Broder 1997 and Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3; clusters after
Kiveris et al. 2014, Connected components in MapReduce and beyond (large-star, small-star).
It moves no data between machines; stage.py does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

Keys = NDArray[np.uint64]

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"
ID_DIGITS = 32
POSITION_BITS = 40  # a file of a terabyte; 16 million files
NUM_PERMUTATIONS = 128
MAX_PARTNERS = 8  # a document is compared with so many before it in a bucket: chains connect the larger ones
_SEED = 20_261_124
_MULTIPLIER = np.uint64(0x9E37_79B9_7F4A_7C15)


def document_id(text: str) -> str:
    """The first 32 hex digits of the SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:ID_DIGITS]


def split_of(identity: str, held_out_fraction: float) -> str:
    """`held_out` for that fraction of all ids, else `train`; a document's split never changes as a corpus grows."""
    return "held_out" if int(identity[-8:], 16) < held_out_fraction * 16**8 else "train"


def document_keys(file_index: int, positions: NDArray[np.int64]) -> Keys:
    """Keys of the documents of a file. Raises ValueError beyond 2^24 files."""
    if file_index >= 1 << (64 - POSITION_BITS):
        raise ValueError(f"{file_index} files are too many for one corpus; pack them into fewer")
    return positions.astype(np.uint64) | np.uint64(file_index << POSITION_BITS)


def locate(key: int) -> tuple[int, int]:
    """File index and position of a key."""
    return key >> POSITION_BITS, key & ((1 << POSITION_BITS) - 1)


def mix(values: Keys) -> Keys:
    """A bijection that spreads 64-bit values evenly (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    mixed: Keys = values ^ (values >> np.uint64(31))
    return mixed


def partition_of(keys: Keys, num_partitions: int) -> NDArray[np.int64]:
    """For each key the partition in which all that share it meet."""
    return (mix(keys) % np.uint64(num_partitions)).astype(np.int64)


def split_rows(rows: Keys, partitions: NDArray[np.int64], num_partitions: int) -> list[Keys]:
    """The rows of each partition, in their order."""
    order = np.argsort(partitions, kind="stable")
    bounds = np.searchsorted(partitions[order], np.arange(1, num_partitions))
    return np.split(rows[order], bounds)


def identity_rows(identities: Sequence[str], keys: Keys) -> Keys:
    """Rows (first half of the id, second half, key), [N, 3]."""
    halves = np.frombuffer(bytes.fromhex("".join(identities)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return np.column_stack([halves, keys])


def exact_duplicates(rows: Keys) -> Keys:
    """Of identity rows, all but the first document of each id: rows (key, key of the one that stays), [M, 2]."""
    if not len(rows):
        return np.empty((0, 2), np.uint64)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    is_first = np.concatenate([[True], np.any(rows[1:, :2] != rows[:-1, :2], axis=1)])
    kept = rows[is_first, 2][np.cumsum(is_first) - 1]
    pairs: Keys = np.column_stack([rows[:, 2], kept])[~is_first]
    return pairs


def shingle_hashes(texts: Sequence[str], width: int) -> tuple[Keys, NDArray[np.int64]]:
    """64-bit hashes of all runs of `width` characters, whitespace and case aside: flat, and offsets [N + 1].

    A shorter text is one shingle. A polynomial hash over the code points of all texts at once, then mixed.
    """
    folded = ["".join(text.split()).lower().ljust(width, "\0") for text in texts]
    codes = np.frombuffer("".join(folded).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in folded], dtype=np.int64)
    num_windows = len(codes) - width + 1
    if num_windows < 1:
        return np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64)
    hashes = codes[:num_windows].copy()
    for shift in range(1, width):
        hashes *= _MULTIPLIER
        hashes += codes[shift : shift + num_windows]
    offsets = np.concatenate([[0], np.cumsum(lengths - width + 1)])
    # window i of document d starts at character i + d * (width - 1) of the flat text
    crossing = (np.cumsum(lengths)[:-1, None] - np.arange(width - 1, 0, -1)).ravel()
    inside = np.ones(num_windows, dtype=bool)
    inside[crossing] = False
    return mix(hashes[inside]), offsets


def choose_bands(min_similarity: float, min_recall: float = 0.99) -> tuple[int, int]:
    """Bands and rows a band of the signature: as many rows as find a pair at the threshold with that probability.

    >>> choose_bands(0.8)
    (21, 6)
    """
    for num_rows in range(16, 0, -1):
        num_bands = NUM_PERMUTATIONS // num_rows
        if 1 - (1 - min_similarity**num_rows) ** num_bands >= min_recall:
            return num_bands, num_rows
    return NUM_PERMUTATIONS, 1


def band_keys(texts: Sequence[str], shingle_characters: int, min_similarity: float) -> Keys:
    """Bucket keys of each text, [N, bands]: two texts are candidates when a key is equal."""
    num_bands, num_rows = choose_bands(min_similarity)
    if not texts:
        return np.empty((0, num_bands), np.uint64)
    hashes, offsets = shingle_hashes(texts, shingle_characters)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), NUM_PERMUTATIONS, _SEED
    ).to_rows()
    matrix = np.array(digests, dtype=np.uint64)[:, : num_bands * num_rows].reshape(len(texts), num_bands, num_rows)
    keys = np.broadcast_to(np.arange(1, num_bands + 1, dtype=np.uint64), (len(texts), num_bands)).copy()
    for row in range(num_rows):
        keys = mix(keys * _MULTIPLIER + matrix[:, :, row])
    return keys


def candidate_pairs(rows: Keys) -> Keys:
    """Of rows (bucket key, document key), the distinct pairs (later, earlier) that share a bucket, [P, 2]."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    found = [np.empty((0, 2), np.uint64)]
    for distance in range(1, MAX_PARTNERS + 1):
        same = rows[distance:, 0] == rows[:-distance, 0]
        if not same.any():
            break
        found.append(np.column_stack([rows[distance:, 1][same], rows[:-distance, 1][same]]))
    return distinct(np.concatenate(found))


def distinct(rows: Keys) -> Keys:
    """Sorted rows without repetition."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows.T[::-1])]
    unique: Keys = rows[np.concatenate([[True], np.any(rows[1:] != rows[:-1], axis=1)])]
    return unique


def sorted_set(values: Keys) -> Keys:
    """Distinct values in order; for short arrays faster than numpy's own."""
    values = np.sort(values)
    return values if len(values) < 2 else values[np.concatenate([[True], values[1:] != values[:-1]])]


def similar_pairs(pairs: Keys, keys: Keys, shingles: Sequence[Keys], min_similarity: float) -> Keys:
    """Those pairs whose sets of shingles have at least that Jaccard similarity; `shingles` are sorted sets, by key."""
    order = np.argsort(keys)
    places = order[np.searchsorted(keys[order], pairs)]
    keep = [jaccard(shingles[later], shingles[earlier]) >= min_similarity for later, earlier in places]
    similar: Keys = pairs[np.array(keep, dtype=bool)]
    return similar


def jaccard(left: Keys, right: Keys) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    both = np.sort(np.concatenate([left, right]), kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def both_directions(edges: Keys) -> Keys:
    """Each edge as seen from either end: rows (node, neighbour)."""
    return np.concatenate([edges, edges[:, ::-1]])


def large_star(rows: Keys) -> Keys:
    """Of (node, neighbour) in both directions: every larger neighbour is tied to the node's smallest one or itself."""
    if not len(rows):
        return rows
    nodes, neighbours, smallest = _by_node(rows)
    larger = neighbours > nodes
    return distinct(np.column_stack([neighbours, np.minimum(smallest, nodes)])[larger])


def small_star(edges: Keys) -> Keys:
    """Of (node, smaller neighbour): the node and its neighbours are tied to the smallest one."""
    if not len(edges):
        return edges
    nodes, neighbours, smallest = _by_node(edges)
    tied = np.concatenate([np.column_stack([neighbours, smallest]), np.column_stack([nodes, smallest])])
    return distinct(tied[tied[:, 0] != tied[:, 1]])


def _by_node(rows: Keys) -> tuple[Keys, Keys, Keys]:
    rows = distinct(rows)
    nodes, neighbours = rows[:, 0], rows[:, 1]
    starts = np.flatnonzero(np.concatenate([[True], nodes[1:] != nodes[:-1]]))
    counts = np.diff(np.append(starts, len(nodes)))
    return nodes, neighbours, np.repeat(neighbours[starts], counts)  # sorted: the first is the smallest


def line_hashes(text: str, min_characters: int) -> Keys:
    """Hashes of the distinct lines of at least that length in a text of more than one line."""
    lines = {line for line in text.split("\n") if len(line) >= min_characters}
    return np.sort(_hashes(list(lines))) if "\n" in text else np.empty(0, np.uint64)


def frequent(hashes: Keys, min_count: int) -> Keys:
    """Sorted hashes that occur at least so often."""
    values, counts = np.unique(hashes, return_counts=True)
    return values[counts >= min_count]


def drop_lines(text: str, boilerplate: Keys, min_characters: int) -> str:
    """The text without the lines whose hashes are in `boilerplate` (sorted); a text of one line stays."""
    lines = text.split("\n")
    if len(lines) == 1 or not len(boilerplate):
        return text
    hashes = _hashes(lines)
    found = boilerplate[np.minimum(np.searchsorted(boilerplate, hashes), len(boilerplate) - 1)] == hashes
    kept = [line for line, known in zip(lines, found, strict=True) if not known or len(line) < min_characters]
    return re.sub("\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


def _hashes(lines: Sequence[str]) -> Keys:
    digests = b"".join(hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
