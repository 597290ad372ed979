"""Character classes of a text, looked up once for all rules that count.

The UTF-32 codes index a table of classes; the result is a byte string, so that counting a class is one `bytes.count`.
The last texts are remembered: the rules of one document share one lookup (3 us for 40 characters, 18 us for 4,000).
It judges nothing.
"""

from __future__ import annotations

import unicodedata
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]

SPACE, CHINESE, LATIN, LETTER, DIGIT, PUNCTUATION, SYMBOL = b" ", b"c", b"a", b"l", b"0", b"p", b"s"
_CHINESE_RANGES = ((0x3007, 0x3008), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x323B0))
_BASE = 0x9E3779B97F4A7C15
_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_PLANES_WITH_LETTERS = 0x20000  # beyond: Chinese characters, tags and private use


def _class_of(code: int) -> bytes:
    character = chr(code)
    if character.isspace():
        return SPACE
    if character.isascii() and character.isalpha():
        return LATIN
    by_category = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION}
    return by_category.get(unicodedata.category(character)[0], SYMBOL)


def _class_table() -> npt.NDArray[np.uint8]:
    table = np.full(0x110000, ord(SYMBOL), np.uint8)
    table[:_PLANES_WITH_LETTERS] = [ord(_class_of(code)) for code in range(_PLANES_WITH_LETTERS)]
    for start, end in _CHINESE_RANGES:
        table[start:end] = ord(CHINESE)
    return table


_CLASSES = _class_table()


@lru_cache(maxsize=2)
def codes(text: str) -> Codes:
    """Unicode code points of the text, uint32 [len(text)]; read-only, shared between callers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@lru_cache(maxsize=2)
def classes(text: str) -> bytes:
    """A byte a character: SPACE, CHINESE, LATIN (ASCII letters), LETTER (others), DIGIT, PUNCTUATION or SYMBOL."""
    return _CLASSES.take(codes(text)).tobytes()


def windows(values: npt.NDArray[Any], length: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every window of that many values, uint64 [len(values) - length + 1].

    Polynomial hashes of windows twice as long are made of two of the shorter ones, so the cost grows with log(length).
    """
    size = len(values) - length + 1
    if size < 1:
        return np.zeros(0, np.uint64)
    block, block_length, done = values * _SPREAD, 1, 0
    result: npt.NDArray[np.uint64] | None = None
    while True:
        if length & block_length:  # the bits of `length`, lowest first
            part = block[done : done + size]
            result = part if result is None else result * _power(block_length) + part
            done += block_length
        if 2 * block_length > length:
            break
        block = block[:-block_length] * _power(block_length) + block[block_length:]
        block_length *= 2
    assert result is not None
    return result


@cache
def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))
