"""How surprising a text is to a small character n-gram model of text that is known to be good.

Trained in memory from a reference text in seconds, with Witten-Bell interpolation (Chen and Goodman 1998,
https://arxiv.org/abs/cmp-lg/9606011), which needs no held-out text. An n-gram is the number of the n-gram before it and
a character, packed into 64 bits, in a sorted array. Used as CCNet uses its model (Wenzek et al. 2019,
https://arxiv.org/abs/1911.00359), with characters for word pieces.
It is neither saved nor loaded: the reference file is the artifact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from app.corpus.characters import codes

MAX_ORDER = 5
CHARACTER_BITS = 16
MAX_CHARACTERS = 1 << CHARACTER_BITS
_Numbers = npt.NDArray[np.int64]  # of n-grams of one length, from 1; 0 is one that the reference does not have
_Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length; how often each context comes before something, and before how many kinds."""

    keys: _Numbers  # sorted; the number of an n-gram is its place here and one
    counts: _Values  # by number of the n-gram
    totals: _Values  # by number of the context, an n-gram of the length below
    kinds: _Values


class CharacterModel:
    """Interpolated probabilities of a character after the ones before it."""

    def __init__(self, numbers: npt.NDArray[np.uint16], unigrams: _Values, levels: list[_Level]) -> None:
        self._numbers, self._unigrams, self._levels = numbers, unigrams, levels

    @classmethod
    def train(cls, text: str, order: int = 3) -> Self:
        """The model of a text with histories of up to `order - 1` characters.

        Raises ValueError for an empty text, one with too many different characters, and an order out of bounds.
        """
        if not text:
            raise ValueError("the reference text of the perplexity model is empty")
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"the order of the perplexity model must be from 1 to {MAX_ORDER}, not {order}")
        values, inverse, counts = np.unique(codes(text), return_inverse=True, return_counts=True)
        if len(values) >= MAX_CHARACTERS:
            raise ValueError(f"the reference text has {len(values)} different characters; {MAX_CHARACTERS - 1} is most")
        numbers = np.zeros(0x110000, np.uint16)
        numbers[values] = np.arange(1, len(values) + 1)
        unseen = len(values) / (len(values) + 1)  # what Witten-Bell keeps for new ones, spread evenly over all
        unigrams = (np.concatenate([[0], counts]) + unseen) / (len(text) + len(values))
        sequence = inverse.astype(np.int64) + 1
        levels, contexts, num_contexts = [], sequence, len(values)
        for length in range(2, order + 1):
            level, contexts = _count(contexts[:-1], sequence[length - 1 :], num_contexts)
            levels.append(level)
            num_contexts = len(level.keys)
        return cls(numbers, unigrams, levels)

    def probabilities(self, text: str) -> _Values:
        """Of each character after up to `order - 1` before it; the first ones have shorter histories. float64 [len]."""
        sequence = self._numbers[codes(text)].astype(np.int64)
        result = self._unigrams[sequence]
        contexts = sequence
        for length, level in enumerate(self._levels, start=2):
            contexts = contexts[:-1]
            if not len(contexts):
                break
            numbers = _find(level.keys, (contexts << CHARACTER_BITS) | sequence[length - 1 :])
            totals, kinds, shorter = level.totals[contexts], level.kinds[contexts], result[length - 1 :]
            mixed = (level.counts[numbers] + kinds * shorter) / np.maximum(totals + kinds, 1.0)
            result[length - 1 :] = np.where(totals > 0, mixed, shorter)
            contexts = numbers
        return result

    def perplexity(self, text: str) -> float:
        """The inverse of the geometric mean of the probabilities of the characters; 1.0 for an empty text."""
        return math.exp(-float(np.log(self.probabilities(text)).mean())) if text else 1.0


def _count(contexts: _Numbers, characters: _Numbers, num_contexts: int) -> tuple[_Level, _Numbers]:
    """The level of these pairs, and the number of the n-gram that each pair is."""
    keys, inverse, counts = np.unique(
        (contexts << CHARACTER_BITS) | characters, return_inverse=True, return_counts=True
    )
    totals = np.bincount(contexts, minlength=num_contexts + 1).astype(float)
    kinds = np.bincount(keys >> CHARACTER_BITS, minlength=num_contexts + 1).astype(float)
    return _Level(keys, np.concatenate([[0.0], counts]), totals, kinds), inverse.astype(np.int64) + 1


def _find(keys: _Numbers, wanted: _Numbers) -> _Numbers:
    if not len(keys):
        return np.zeros_like(wanted)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places + 1, 0)
