"""Quality rules: each names what it rejects, and that word is its reason, its counter and its test.

A Rule is a plain callable from normalised text to that reason or None. Ratios count characters, which suits text
without spaces between words; after the heuristics of Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446, A1.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from app.corpus.config import RulesConfig

Rule = Callable[[str], str | None]

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WHITESPACE = re.compile(r"\s")
_SYMBOL = re.compile(r"[^\w\s]|_")
REPETITION_CHARACTERS = 10


def build_rules(bounds: RulesConfig) -> list[Rule]:
    """The rules in the order they are asked; cheap ones first, the first reason wins."""
    return [
        too_short(bounds.min_characters),
        too_long(bounds.max_characters),
        low_chinese_ratio(bounds.min_chinese_ratio),
        high_symbol_ratio(bounds.max_symbol_ratio),
        high_repetition(bounds.max_repetition_ratio),
    ]


def first_reason(rules: list[Rule], text: str) -> str | None:
    """The reason of the first rule that rejects the text, or None."""
    return next((reason for rule in rules if (reason := rule(text))), None)


def too_short(min_characters: int) -> Rule:
    """Fewer characters than that."""
    return lambda text: "too_short" if len(text) < min_characters else None


def too_long(max_characters: int) -> Rule:
    """More characters than that."""
    return lambda text: "too_long" if len(text) > max_characters else None


def low_chinese_ratio(min_ratio: float) -> Rule:
    """Chinese characters are a smaller share of all that are not whitespace."""

    def rule(text: str) -> str | None:
        visible = len(text) - len(_WHITESPACE.findall(text))
        return "low_chinese_ratio" if len(_CHINESE.findall(text)) < min_ratio * visible else None

    return rule


def high_symbol_ratio(max_ratio: float) -> Rule:
    """Punctuation and symbols (neither letters, digits nor whitespace) are a larger share of all characters."""
    return lambda text: "high_symbol_ratio" if len(_SYMBOL.findall(text)) > max_ratio * len(text) else None


def high_repetition(max_ratio: float) -> Rule:
    """A larger share of the text's windows of 10 characters was there before in the same text."""

    def rule(text: str) -> str | None:
        windows = [text[i : i + REPETITION_CHARACTERS] for i in range(len(text) - REPETITION_CHARACTERS + 1)]
        repeated = len(windows) - len(set(windows))
        return "high_repetition" if repeated > max_ratio * len(windows) else None

    return rule
