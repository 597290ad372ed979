"""How much of a text says again what it said before: character n-grams, lines and paragraphs.

Hashes of all windows are sorted, so that equal ones lie side by side. What short windows show bounds what longer ones
can, which spares a good text most of the sorting. After Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446,
table A1), whose n-grams are words. Chinese words have about 1.7 characters, so its 2, 3 and 4 words are 3, 5 and 7
characters, and its 5 to 10 words are 8 to 17. It decides nothing: the thresholds are in the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from app.corpus.characters import codes, windows


@lru_cache(maxsize=4)
def repeated_windows(text: str, length: int) -> int:
    """Number of windows of that many characters that were there before, overlapping ones counted.

    It is no larger for longer windows: the first characters of a window that was there before were there before.
    """
    hashes = np.sort(windows(codes(text), length))
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


@lru_cache(maxsize=4)
def top_ngram_count(text: str, length: int) -> int:
    """How often the most frequent n-gram comes, overlapping ones counted. It is no larger for longer n-grams."""
    hashes = np.sort(windows(codes(text), length))
    if not len(hashes):
        return 0
    ends = np.flatnonzero(hashes[1:] != hashes[:-1])
    return int(np.diff(ends, prepend=-1, append=len(hashes) - 1).max())


def top_ngram_ratio(text: str, length: int) -> float:
    """Share of the characters that the most frequent n-gram makes up; 0.0 if none comes twice."""
    most = top_ngram_count(text, length)
    return min(most * length / len(text), 1.0) if most > 1 else 0.0


def duplicate_ngram_ratio(text: str, length: int) -> float:
    """Share of the characters that lie in an n-gram that was there before; each counts once, the first n-gram not."""
    hashes = windows(codes(text), length)
    if len(hashes) < 2:
        return 0.0
    order = np.argsort(hashes, kind="stable")
    later = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    edges = np.zeros(len(text) + 1, np.int32)
    np.add.at(edges, later, 1)
    np.add.at(edges, later + length, -1)
    return int(np.count_nonzero(np.cumsum(edges))) / len(text)


@lru_cache(maxsize=1)
def lines_of(text: str) -> tuple[str, ...]:
    """The lines that are not empty."""
    return tuple(line for line in text.split("\n") if line)


def paragraphs_of(text: str) -> list[str]:
    """What empty lines separate."""
    return [paragraph for paragraph in text.split("\n\n") if paragraph]


def duplicate_ratio(pieces: Sequence[str]) -> float:
    """Share of the lines or paragraphs that were there before."""
    return (len(pieces) - len(set(pieces))) / len(pieces) if pieces else 0.0


def duplicate_character_ratio(pieces: Sequence[str]) -> float:
    """Share of their characters that lie in lines or paragraphs that were there before."""
    total = sum(map(len, pieces))
    return (total - sum(map(len, set(pieces)))) / total if total else 0.0
