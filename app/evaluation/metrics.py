"""Bits per byte of a language model, and of models that know frequencies only: the numbers to be below."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross-entropy in bits over UTF-8 bytes; comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def unigram_bits(train: Iterable[Iterable[int]], held_out: Iterable[Iterable[int]], num_symbols: int) -> float:
    """What held_out costs under a model that knows only how frequent each symbol is, in bits.

    Symbols are 0 ≤ symbol < num_symbols: bytes or token ids; frequencies are those of train with add-one smoothing.
    """
    counts = Counter(dict.fromkeys(range(num_symbols), 1))
    for sequence in train:
        counts.update(sequence)
    total = counts.total()
    seen: Counter[int] = Counter()
    for sequence in held_out:
        seen.update(sequence)
    return sum(number * -math.log2(counts[symbol] / total) for symbol, number in seen.items())
