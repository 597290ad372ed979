"""Quality rules: each names what it rejects, and that word is its reason, its counter and its test.

A Rule is a plain callable from normalised text to that reason or None; `build_rules` makes those that the bounds ask.
Ratios count characters, which suits text without spaces between words. Methods: Gopher, C4 and FineWeb in the modules
of the rules; CCNet (Wenzek et al. 2019, https://arxiv.org/abs/1911.00359) for perplexity.
Rules change no text and know no other document: duplicates and evaluation items are found elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from app.corpus import character_rules, structure_rules
from app.corpus.character_rules import Rule
from app.corpus.config import RulesConfig
from app.corpus.lexicon import load_words, read_text
from app.corpus.perplexity import CharacterModel

__all__ = ["Rule", "build_rules", "first_reason", "high_perplexity", "import_rule", "reference_model", "sensitive_word"]


def build_rules(bounds: RulesConfig) -> list[Rule]:
    """The rules in the order they are asked; cheap ones first, the first reason wins.

    Raises ValueError for files and functions that are named in the bounds and cannot be read or imported.
    """
    return [*_length_and_ratio_rules(bounds), *_page_rules(bounds), *_prose_rules(bounds), *_named_rules(bounds)]


def first_reason(rules: list[Rule], text: str) -> str | None:
    """The reason of the first rule that rejects the text, or None."""
    for rule in rules:
        if reason := rule(text):
            return reason
    return None


def _length_and_ratio_rules(bounds: RulesConfig) -> Iterator[Rule]:
    factories: list[tuple[Callable[[Any], Rule], Any]] = [
        (character_rules.too_short, bounds.min_characters),
        (character_rules.too_long, bounds.max_characters),
        (character_rules.low_chinese_ratio, bounds.min_chinese_ratio),
        (character_rules.high_symbol_ratio, bounds.max_symbol_ratio),
        (character_rules.high_punctuation_ratio, bounds.max_punctuation_ratio),
        (character_rules.high_digit_ratio, bounds.max_digit_ratio),
        (character_rules.other_language, bounds.languages),
        (character_rules.high_hash_or_ellipsis_ratio, bounds.max_hash_or_ellipsis_ratio),
        (character_rules.curly_bracket, bounds.max_curly_bracket_ratio),
        (character_rules.high_link_ratio, bounds.max_link_ratio),
        (character_rules.high_advertisement, bounds.max_advertisement_terms),
    ]
    yield from (factory(bound) for factory, bound in factories if bound is not None)
    if bounds.reject_lorem_ipsum:
        yield character_rules.lorem_ipsum()


def _page_rules(bounds: RulesConfig) -> Iterator[Rule]:
    factories: list[tuple[Callable[[float], Rule], float | None]] = [
        (structure_rules.high_repetition, bounds.max_repetition_ratio),
        (structure_rules.bullet_lines, bounds.max_bullet_line_ratio),
        (structure_rules.ellipsis_lines, bounds.max_ellipsis_line_ratio),
        (structure_rules.javascript_lines, bounds.max_javascript_line_ratio),
        (structure_rules.duplicate_lines, bounds.max_duplicate_line_ratio),
        (structure_rules.duplicate_line_characters, bounds.max_duplicate_line_character_ratio),
        (structure_rules.duplicate_paragraphs, bounds.max_duplicate_paragraph_ratio),
        (structure_rules.duplicate_paragraph_characters, bounds.max_duplicate_paragraph_character_ratio),
    ]
    yield from (factory(bound) for factory, bound in factories if bound is not None)


def _prose_rules(bounds: RulesConfig) -> Iterator[Rule]:
    least = bounds.prose_characters
    if bounds.min_function_words is not None:
        yield structure_rules.few_function_words(bounds.min_function_words, least)
    if bounds.min_sentences is not None:
        yield structure_rules.few_sentences(bounds.min_sentences, least)
    if bounds.min_terminal_punctuation_ratio is not None:
        yield structure_rules.low_terminal_punctuation(bounds.min_terminal_punctuation_ratio, least)
    if bounds.max_top_ngram_ratios:
        yield structure_rules.top_ngram(bounds.max_top_ngram_ratios, least)
    if bounds.max_duplicate_ngram_ratios:
        yield structure_rules.duplicate_ngrams(bounds.max_duplicate_ngram_ratios, least)


def _named_rules(bounds: RulesConfig) -> Iterator[Rule]:
    if bounds.sensitive_word_uris:
        yield sensitive_word(bounds.sensitive_word_uris, bounds.min_sensitive_hits)
    if bounds.max_perplexity is not None:
        model = reference_model(bounds.perplexity_reference_uri, bounds.perplexity_order)
        yield high_perplexity(bounds.max_perplexity, model)
    yield from (import_rule(name) for name in bounds.functions)


def sensitive_word(uris: Sequence[str], min_hits: int) -> Rule:
    """So many occurrences of words of these files, in any case and width. Raises ValueError for a missing file."""
    words = load_words(tuple(uris))
    return lambda text: "sensitive_word" if words.count(text) >= min_hits else None


def high_perplexity(max_perplexity: float, model: CharacterModel) -> Rule:
    """The text surprises a character model of good text more than that (CCNet), geometric mean over characters."""
    return lambda text: "high_perplexity" if model.perplexity(text) > max_perplexity else None


@lru_cache(maxsize=2)
def reference_model(uri: str, order: int) -> CharacterModel:
    """The model of the text in a file. Raises ValueError for a missing or empty file."""
    return CharacterModel.train(read_text(uri), order)


def import_rule(name: str) -> Rule:
    """The function `module:function` as a rule. Raises ValueError saying which part of the name is wrong."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"rules.functions: {name!r} must have the form module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"rules.functions: {name!r}: module {module!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"rules.functions: {name!r}: module {module!r} has no function {function!r}")
    rule: Rule = found
    return rule
