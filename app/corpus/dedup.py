"""Identity of documents: their hash, the split it puts them in, and exact duplicates.

Near-duplicates are not looked for.
"""

import hashlib
from collections.abc import Iterable

DUPLICATE = "duplicate"
ID_DIGITS = 32


def document_id(text: str) -> str:
    """The first 32 hex digits of the SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:ID_DIGITS]


def split_of(identity: str, held_out_fraction: float) -> str:
    """`held_out` for that fraction of all ids, else `train`; a document's split never changes as a corpus grows."""
    return "held_out" if int(identity[-8:], 16) < held_out_fraction * 16**8 else "train"


def partition_of(identity: str, num_partitions: int) -> int:
    """Which hash partition holds all documents with this id."""
    return int(identity[:8], 16) % num_partitions


def mark_duplicates(identities: Iterable[str]) -> list[bool]:
    """For each id whether it came before in the sequence: the first copy is kept.

    >>> mark_duplicates(["a", "b", "a"])
    [False, False, True]
    """
    seen: set[str] = set()
    marks = []
    for identity in identities:
        marks.append(identity in seen)
        seen.add(identity)
    return marks
