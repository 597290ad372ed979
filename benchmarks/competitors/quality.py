"""How good a deduplication is: brute-force Jaccard similarity says which documents are one, kept ids say what was done.

All pairs are compared exactly, as a product of sparse document-by-shingle matrices; documents at or above the bound are
joined into clusters, of which one document should be left. It asks for no pairs, which Data-Juicer does not give.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

SHINGLE_CHARACTERS = 5
BLOCK_DOCUMENTS = 1000


class Quality(NamedTuple):
    """Shares of removals; 1 and 1 when each cluster keeps exactly one document."""

    recall: float  # removals that were right, of those that brute force makes
    precision: float  # removals that were right, of those that were made


def clusters(documents: Path, min_similarity: float) -> dict[str, int]:
    """The cluster of each document id, by brute force over all pairs."""
    rows = [json.loads(line) for path in sorted(documents.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    left, right, _ = similar_pairs([row["text"] for row in rows], min_similarity)
    graph = sparse.coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(len(rows), len(rows)))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return {row["id"]: int(label) for row, label in zip(rows, labels, strict=True)}


def similar_pairs(texts: list[str], min_similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of all pairs with at least that Jaccard similarity of shingles, and their similarities."""
    incidence = _incidence(texts)
    sizes = np.diff(incidence.indptr)
    found: list[np.ndarray] = []
    for start in range(0, len(texts), BLOCK_DOCUMENTS):
        shared = (incidence[start : start + BLOCK_DOCUMENTS] @ incidence.T).tocoo()
        left, right = shared.row + start, shared.col
        similarity = shared.data / (sizes[left] + sizes[right] - shared.data)
        wanted = (left < right) & (similarity >= min_similarity)
        found.append(np.stack([left[wanted], right[wanted], similarity[wanted]]))
    left, right, similarity = np.concatenate(found, axis=1)
    return left.astype(np.int64), right.astype(np.int64), similarity


def quality(cluster_of: Mapping[str, int], kept_ids: Iterable[str]) -> Quality:
    """Recall and precision of removals. A cluster that lost all its documents counts one wrong removal.

    >>> quality({"a": 0, "b": 0, "c": 1, "d": 2}, ["a", "c"])
    Quality(recall=1.0, precision=0.5)
    """
    sizes = Counter(cluster_of.values())
    kept = Counter(cluster_of[identity] for identity in kept_ids)
    wanted = sum(size - 1 for size in sizes.values())
    made = sum(size - kept[cluster] for cluster, size in sizes.items())
    right = sum(size - max(kept[cluster], 1) for cluster, size in sizes.items())
    return Quality(right / wanted if wanted else 1.0, right / made if made else 1.0)


def _incidence(texts: list[str]) -> sparse.csr_array:
    """Documents x shingles, 1 where a document has a shingle of five characters, whitespace aside."""
    columns: dict[str, int] = {}
    indices: list[int] = []
    starts = [0]
    for text in texts:
        visible = "".join(text.split())
        windows = max(1, len(visible) - SHINGLE_CHARACTERS + 1)
        shingles = {visible[i : i + SHINGLE_CHARACTERS] for i in range(windows)}
        indices.extend(columns.setdefault(shingle, len(columns)) for shingle in shingles)
        starts.append(len(indices))
    ones = np.ones(len(indices), dtype=np.int32)
    return sparse.csr_array((ones, indices, starts), shape=(len(texts), len(columns)))
