"""Rules on length, shares of characters, language and single words; every one says None in microseconds for good text.

Character classes are looked up once a document (app.corpus.characters) and counted by each rule that asks. After Gopher
(Rae et al. 2021, https://arxiv.org/abs/2112.11446, A1.1) and C4 (Raffel et al. 2019, https://arxiv.org/abs/1910.10683),
with characters where they count words. They see no lines and no repetition: that is app.corpus.structure_rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from app.corpus.characters import CHINESE, DIGIT, PUNCTUATION, SPACE, SYMBOL, classes
from app.corpus.language import LANGUAGES, UNDETERMINED, language_of
from app.corpus.lexicon import advertisement_automaton

Rule = Callable[[str], str | None]

MIN_ADVERTISEMENT_TERMS = 2  # different ones: a review may mention a coupon
_LINK = re.compile(r"(?:https?://|www\.)[!-~]+", re.IGNORECASE)
_HASH_OR_ELLIPSIS = re.compile("\u2026+|\\.{3,}|\u3002{3,}|#")


def too_short(min_characters: int) -> Rule:
    """Fewer characters than that."""
    return lambda text: "too_short" if len(text) < min_characters else None


def too_long(max_characters: int) -> Rule:
    """More characters than that."""
    return lambda text: "too_long" if len(text) > max_characters else None


def low_chinese_ratio(min_ratio: float) -> Rule:
    """Chinese characters are a smaller share of all that are not whitespace."""

    def rule(text: str) -> str | None:
        found = classes(text)
        visible = len(text) - found.count(SPACE)
        return "low_chinese_ratio" if found.count(CHINESE) < min_ratio * visible else None

    return rule


def high_symbol_ratio(max_ratio: float) -> Rule:
    """Punctuation and symbols (neither letters, digits nor whitespace) are a larger share of all characters."""

    def rule(text: str) -> str | None:
        found = classes(text)
        symbols = found.count(PUNCTUATION) + found.count(SYMBOL)
        return "high_symbol_ratio" if symbols > max_ratio * len(text) else None

    return rule


def high_punctuation_ratio(max_ratio: float) -> Rule:
    """Punctuation is a larger share of all characters."""
    return lambda text: "high_punctuation_ratio" if classes(text).count(PUNCTUATION) > max_ratio * len(text) else None


def high_digit_ratio(max_ratio: float) -> Rule:
    """Digits and other numerals are a larger share of all characters."""
    return lambda text: "high_digit_ratio" if classes(text).count(DIGIT) > max_ratio * len(text) else None


def other_language(languages: tuple[str, ...]) -> Rule:
    """The language of the first 1,000 characters is none of these; text without letters is left to other rules.

    Raises ValueError for a code that is never found.
    """
    if unknown := sorted(set(languages) - set(LANGUAGES)):
        raise ValueError(f"rules.languages: {', '.join(unknown)} is not among {' '.join(LANGUAGES)}")
    allowed = {*languages, UNDETERMINED}
    return lambda text: None if language_of(text) in allowed else "other_language"


def high_hash_or_ellipsis_ratio(max_ratio: float) -> Rule:
    """Hash marks and ellipses, each counted once, are more than that share of the characters (Gopher: of the words)."""

    def rule(text: str) -> str | None:
        if "\u2026" not in text and "..." not in text and "\u3002\u3002\u3002" not in text and "#" not in text:
            return None
        return "high_hash_or_ellipsis_ratio" if len(_HASH_OR_ELLIPSIS.findall(text)) > max_ratio * len(text) else None

    return rule


def curly_bracket(max_ratio: float) -> Rule:
    """Curly brackets are a larger share of the characters: code. C4 drops a page with a single one, a ratio of 0."""
    return lambda text: "curly_bracket" if text.count("{") + text.count("}") > max_ratio * len(text) else None


def high_link_ratio(max_ratio: float) -> Rule:
    """A larger share of the characters lies in web addresses."""

    def rule(text: str) -> str | None:
        if "://" not in text and "www." not in text:
            return None
        return "high_link_ratio" if sum(map(len, _LINK.findall(text))) > max_ratio * len(text) else None

    return rule


def high_advertisement(max_terms: float) -> Rule:
    """More terms of advertisements for 1,000 characters, and at least two different ones."""
    find = advertisement_automaton().find_matches_as_indexes

    def rule(text: str) -> str | None:
        found = find(text)
        if len(found) < MIN_ADVERTISEMENT_TERMS or len(found) * 1000 <= max_terms * len(text):
            return None
        return "high_advertisement" if len({term for term, _, _ in found}) >= MIN_ADVERTISEMENT_TERMS else None

    return rule


def lorem_ipsum() -> Rule:
    """Placeholder text (C4)."""

    def rule(text: str) -> str | None:
        has_word = "ipsum" in text or "Ipsum" in text or "IPSUM" in text
        return "lorem_ipsum" if has_word and "lorem ipsum" in text.lower() else None

    return rule
