"""Rules on lines, paragraphs, sentences and repetition: whether a text is built like prose.

Shares of lines are asked of documents of four lines and more, properties of prose of documents longer than the bounds
say, because a one-line review has neither. After Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1),
C4 (Raffel et al. 2019, https://arxiv.org/abs/1910.10683) and FineWeb (Penedo et al. 2024, https://arxiv.org/abs/2406.17557).
They drop whole documents, never single lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from app.corpus import repetition
from app.corpus.character_rules import Rule
from app.corpus.characters import LATIN, classes
from app.corpus.lexicon import FUNCTION_WORDS, JAVASCRIPT_LINE

REPETITION_CHARACTERS = 10
SHORT_CHARACTERS = 200  # below that a set of windows is faster than sorting their hashes
MIN_LINES = 4  # shares of lines mean nothing in shorter documents
_BULLET = re.compile(
    "[-*+\u2022\u25cf\u25cb\u25a0\u25a1\u25c6\u25c7\u25b6\u25ba\u25aa\u25ab\u2023\u2043\u00b7\u203b] ?"
)
_ELLIPSIS_ENDS = ("\u2026", "...", "\u3002\u3002\u3002")
_SENTENCE_END = re.compile("[\u3002\uff01\uff1f!?\uff1b;\uff0e\u2026]+|\\.(?![0-9A-Za-z])")
_CLOSING = "\"'\u201d\u2019\u300d\u300f\uff09)\u3011\u300b"
_TERMINALS = (
    "\u3002",
    "\uff01",
    "\uff1f",
    "!",
    "?",
    "\uff1b",
    ";",
    "\uff0e",
    ".",
    "\u2026",
    "\uff1a",
    ":",
    "~",
    "\uff5e",
)


def high_repetition(max_ratio: float) -> Rule:
    """A larger share of the text's windows of 10 characters was there before in the same text."""

    def rule(text: str) -> str | None:
        num_windows = len(text) - REPETITION_CHARACTERS + 1
        bound = max_ratio * num_windows
        if num_windows < 2:
            return None
        if len(text) < SHORT_CHARACTERS:
            if num_windows - len(set(text[:num_windows])) <= bound:
                return None  # windows that begin with different characters differ
            repeated = num_windows - len({text[i : i + REPETITION_CHARACTERS] for i in range(num_windows)})
        else:
            repeated = repetition.repeated_windows(text, REPETITION_CHARACTERS - 2)  # an upper bound, asked for again
            if repeated > bound:
                repeated = repetition.repeated_windows(text, REPETITION_CHARACTERS)
        return "high_repetition" if repeated > bound else None

    return rule


def _line_rule(reason: str, is_bad: Callable[[str], Any], max_ratio: float) -> Rule:
    def rule(text: str) -> str | None:
        if text.count("\n") < MIN_LINES - 1:
            return None
        lines = repetition.lines_of(text)
        return (
            reason if len(lines) >= MIN_LINES and sum(map(bool, map(is_bad, lines))) > max_ratio * len(lines) else None
        )

    return rule


def bullet_lines(max_ratio: float) -> Rule:
    """A larger share of the lines begins with a bullet (Gopher), in documents of four lines and more."""
    return _line_rule("bullet_lines", _BULLET.match, max_ratio)


def ellipsis_lines(max_ratio: float) -> Rule:
    """A larger share of the lines ends with an ellipsis (Gopher), in documents of four lines and more."""
    return _line_rule("ellipsis_lines", lambda line: line.endswith(_ELLIPSIS_ENDS), max_ratio)


def javascript_lines(max_ratio: float) -> Rule:
    """A larger share of the lines is script code or asks for JavaScript or cookies (C4 drops such lines)."""
    judge = _line_rule("javascript_lines", JAVASCRIPT_LINE.search, max_ratio)
    return lambda text: judge(text) if classes(text).count(LATIN) >= MIN_LINES else None


def _pieces_rule(reason: str, separator: str, ratio: Callable[[Any], float], max_ratio: float) -> Rule:
    split = repetition.lines_of if separator == "\n" else repetition.paragraphs_of

    def rule(text: str) -> str | None:
        if text.count(separator) < MIN_LINES - 1:
            return None
        return reason if ratio(split(text)) > max_ratio else None

    return rule


def duplicate_lines(max_ratio: float) -> Rule:
    """A larger share of the lines was there before (Gopher), in documents of four lines and more."""
    return _pieces_rule("duplicate_lines", "\n", repetition.duplicate_ratio, max_ratio)


def duplicate_line_characters(max_ratio: float) -> Rule:
    """A larger share of the characters lies in lines that were there before (Gopher)."""
    return _pieces_rule("duplicate_line_characters", "\n", repetition.duplicate_character_ratio, max_ratio)


def duplicate_paragraphs(max_ratio: float) -> Rule:
    """A larger share of the paragraphs was there before (Gopher), in documents of four paragraphs and more."""
    return _pieces_rule("duplicate_paragraphs", "\n\n", repetition.duplicate_ratio, max_ratio)


def duplicate_paragraph_characters(max_ratio: float) -> Rule:
    """A larger share of the characters lies in paragraphs that were there before (Gopher)."""
    return _pieces_rule("duplicate_paragraph_characters", "\n\n", repetition.duplicate_character_ratio, max_ratio)


def few_function_words(min_words: int, min_characters: int) -> Rule:
    """A longer document has fewer different function words, modern or classical (Gopher's stop words): no prose."""

    def rule(text: str) -> str | None:
        if len(text) < min_characters:
            return None
        return "few_function_words" if sum(word in text for word in FUNCTION_WORDS) < min_words else None

    return rule


def few_sentences(min_sentences: int, min_characters: int) -> Rule:
    """A longer document has fewer ends of sentences (C4)."""

    def rule(text: str) -> str | None:
        if len(text) < min_characters:
            return None
        ends = _SENTENCE_END.finditer(text)
        return (
            "few_sentences"
            if sum(1 for _, _ in zip(range(min_sentences), ends, strict=False)) < min_sentences
            else None
        )

    return rule


def low_terminal_punctuation(min_ratio: float, min_characters: int) -> Rule:
    """Fewer lines of a longer document end as sentences do (C4 drops such lines; FineWeb such pages)."""

    def rule(text: str) -> str | None:
        if len(text) < min_characters or text.count("\n") < MIN_LINES - 1:
            return None
        lines = repetition.lines_of(text)
        ended = sum(line.rstrip(_CLOSING).endswith(_TERMINALS) for line in lines)
        return "low_terminal_punctuation" if ended < min_ratio * len(lines) else None

    return rule


def top_ngram(max_ratios: Mapping[int, float], min_characters: int) -> Rule:
    """The most frequent n-gram of some length makes up more than its share of a longer document (Gopher)."""
    shortest = min(max_ratios)

    def rule(text: str) -> str | None:
        if len(text) < min_characters:
            return None
        most = repetition.top_ngram_count(text, shortest)
        if all(most * length <= share * len(text) for length, share in max_ratios.items()):
            return None
        if any(repetition.top_ngram_ratio(text, length) > share for length, share in max_ratios.items()):
            return "top_ngram"
        return None

    return rule


def duplicate_ngrams(max_ratios: Mapping[int, float], min_characters: int) -> Rule:
    """More than its share of a longer document lies in n-grams that were there before (Gopher)."""
    shortest = min(max_ratios)

    def rule(text: str) -> str | None:
        if len(text) < min_characters:
            return None
        repeated = repetition.repeated_windows(text, shortest)
        if all(repeated * length <= share * len(text) for length, share in max_ratios.items()):
            return None
        if any(repetition.duplicate_ngram_ratio(text, length) > share for length, share in max_ratios.items()):
            return "duplicate_ngrams"
        return None

    return rule
