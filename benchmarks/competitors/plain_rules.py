"""Our five quality rules in plain Python, for tools that take a function and have none of their own for Chinese.

The same words and the same bounds as `RulesConfig` in app/corpus/config.py; straightforward code as a user of such a
tool would write it, with compiled expressions. It imports nothing outside the standard library.
"""

from __future__ import annotations

import re

MIN_CHARACTERS, MAX_CHARACTERS = 8, 1_000_000
MIN_CHINESE_RATIO, MAX_SYMBOL_RATIO, MAX_REPETITION_RATIO = 0.3, 0.4, 0.5
REPETITION_CHARACTERS = 10

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WHITESPACE = re.compile(r"\s")
_SYMBOL = re.compile(r"[^\w\s]|_")
_BLANKS = re.compile("[ \t\u00a0\u3000]+")
_AROUND_NEWLINE = re.compile(" ?\n ?")


def has_good_length(text: str) -> bool:
    """Neither too_short nor too_long."""
    return MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS


def is_chinese(text: str) -> bool:
    """Not low_chinese_ratio: of the characters that are not whitespace."""
    visible = len(text) - len(_WHITESPACE.findall(text))
    return len(_CHINESE.findall(text)) >= MIN_CHINESE_RATIO * visible


def has_few_symbols(text: str) -> bool:
    """Not high_symbol_ratio: of all characters."""
    return len(_SYMBOL.findall(text)) <= MAX_SYMBOL_RATIO * len(text)


def is_not_repetitive(text: str) -> bool:
    """Not high_repetition: windows of 10 characters that were there before in the text."""
    windows = [text[i : i + REPETITION_CHARACTERS] for i in range(len(text) - REPETITION_CHARACTERS + 1)]
    return len(windows) - len(set(windows)) <= MAX_REPETITION_RATIO * len(windows)


def tidy_whitespace(text: str) -> str:
    """One space for a run of blanks, none around line ends."""
    return _AROUND_NEWLINE.sub("\n", _BLANKS.sub(" ", text)).strip()
