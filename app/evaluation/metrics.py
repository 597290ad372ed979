"""Bits per byte of a language model, and of a model that knows byte frequencies only: the number to be below."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross-entropy in bits over UTF-8 bytes; comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def unigram_byte_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """What a model costs that knows only how frequent each byte is: fitted on train with add-one smoothing."""
    counts = Counter(dict.fromkeys(range(256), 1))
    for text in train:
        counts.update(text)
    total = counts.total()
    seen: Counter[int] = Counter()
    for text in held_out:
        seen.update(text)
    bits = sum(number * -math.log2(counts[value] / total) for value, number in seen.items())
    return bits / seen.total()
