"""Forbidden phrases: word files, the automaton that finds them in any spelling, and what may still become one.

Aho-Corasick runs over folded letters (spelling.py); what it finds is then checked: Latin words stand at word borders,
digits stand for letters only inside words, and what separates letters looks like a trick and not like prose.
It does not know contexts: a phrase is forbidden or it is not. Meaning is semantics.py's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import ahocorasick_rs

from app import storage
from app.serving.spelling import (
    BREAK,
    INVISIBLE,
    MAX_GAP,
    MAX_INVISIBLE_GAP,
    STOP,
    SYMBOL,
    VISIBLE,
    Letter,
    compact,
    fold,
    fold_character,
    invisible_runs,
    is_latin,
)

HIDDEN_TEXT = "hidden_text"  # a category without terms: long runs of invisible characters
CUSTOM = "custom"  # of the terms of a word file that stand before any header
OWN_WORDS = Path(__file__).parent / "wordlists" / "terms.txt"
MIN_TERM, MAX_TERM = 2, 64  # folded letters; the longest decides how much a stream may have to hold back


class Match(NamedTuple):
    """text[start:end] is a phrase of that category."""

    category: str
    start: int
    end: int


@dataclass(frozen=True)
class Term:
    """A forbidden phrase."""

    category: str
    text: str

    @cached_property
    def letters(self) -> list[Letter]:
        return fold(self.text).letters

    @cached_property
    def folded(self) -> str:
        return compact(self.text)


def read_terms(uri: str) -> list[Term]:
    """The terms of a UTF-8 word file: one a line, `# comments`, `category: name` above or `term<TAB>name` beside them.

    Raises ValueError naming file and line.
    """
    try:
        with storage.open_file(uri) as source:
            lines = source.read().decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"word list {uri} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"word list {uri} is not UTF-8 text: {error}; convert it") from None
    terms, category = [], CUSTOM
    for number, line in enumerate(lines, 1):
        line = line.split("#", 1)[0].strip()
        head, colon, name = line.partition(":")
        if head.strip().lower() == "category" and colon:
            category = _category(name, f"{uri}:{number}")
        elif line:
            text, tab, name = line.partition("\t")
            terms.append(_term(_category(name, f"{uri}:{number}") if tab else category, text, f"{uri}:{number}"))
    if not terms:
        raise ValueError(f"word list {uri} holds no terms")
    return terms


def _category(name: str, where: str) -> str:
    name = name.strip()
    if not name.isidentifier():
        raise ValueError(f"{where}: {name!r} is no name for a category: letters, digits and _ only")
    return name


def _term(category: str, text: str, where: str) -> Term:
    term = Term(category, text.strip())
    if BREAK in "".join(letter.folded for letter in term.letters):
        raise ValueError(f"{where}: {term.text!r} has too many separators in a row")
    if not MIN_TERM <= len(term.letters) <= MAX_TERM:
        raise ValueError(f"{where}: {term.text!r} has {len(term.letters)} letters, not {MIN_TERM} to {MAX_TERM}")
    return term


class Lexicon:
    """Finds terms in texts and, at the end of an unfinished text, what may become one."""

    def __init__(self, terms: Iterable[Term], hidden_text: bool = True) -> None:
        self.hidden_text = hidden_text
        self.terms = list(dict.fromkeys(terms))
        folded = [term.folded for term in self.terms]
        self._automaton = ahocorasick_rs.AhoCorasick(folded)
        self._beginnings = {text[:length] for text in folded for length in range(1, len(text))}
        self._open_ended = {term.folded for term in self.terms if is_latin(term.letters[-1].plain)}
        self._alive = self._beginnings | self._open_ended
        self._longest = max(map(len, folded), default=0)

    def only(self, categories: Sequence[str]) -> Lexicon:
        """The lexicon of these categories alone."""
        terms = [term for term in self.terms if term.category in categories]
        return Lexicon(terms, self.hidden_text and HIDDEN_TEXT in categories)

    @cached_property
    def categories(self) -> frozenset[str]:
        return frozenset(term.category for term in self.terms) | ({HIDDEN_TEXT} if self.hidden_text else set())

    def find(self, text: str) -> list[Match]:
        """All phrases, in order; they may overlap."""
        matches = []
        if self._automaton.find_matches_as_indexes(compact(text)):  # few texts go further
            letters = (folded := fold(text)).letters
            for number, start, end in self._automaton.find_matches_as_indexes(folded.text, overlapping=True):
                term = self.terms[number]
                if _is_spelled(term.letters, letters, start) and not _runs_on(letters, end):
                    matches.append(Match(term.category, letters[start].start, letters[end - 1].start + 1))
        if self.hidden_text:
            matches += [Match(HIDDEN_TEXT, *run) for run in invisible_runs(text)]
        return sorted(matches, key=lambda match: match[1:])

    def alive_from(self, text: str) -> int:
        """Where the longest end of the text begins that could still become a phrase; its length if there is none."""
        tail = compact(text)[-self._longest :] if self._longest else ""
        alive = next((len(tail) - i for i in range(len(tail)) if tail[i:] in self._alive), 0)
        start = self._alive_letters(text, alive) if alive else len(text)
        run = len(text)
        if self.hidden_text:
            while run > max(0, len(text) - MAX_INVISIBLE_GAP) and fold_character(text[run - 1])[1] == INVISIBLE:
                run -= 1
        return min(start, run)

    def _alive_letters(self, text: str, num_letters: int) -> int:
        """The same, where at most so many letters from the end may be alive."""
        begin = len(text)
        while begin and num_letters > 0:
            begin -= 1
            num_letters -= len(fold_character(text[begin])[0])
        begin = max(0, begin - MAX_GAP - 1)  # and the letter before them
        folded = fold(text[begin:])
        letters, is_open = folded.letters, not folded.gap & VISIBLE
        tail = folded.text
        for i in range(max(0, len(tail) - self._longest), len(tail)):
            may_become = tail[i:] in self._beginnings or (is_open and tail[i:] in self._open_ended)
            if may_become and _starts_word(letters, i):
                return begin + letters[i].start
        return len(text)


def _starts_word(letters: Sequence[Letter], start: int) -> bool:
    """Whether no Latin letter stands right before a Latin one."""
    return not (start and is_latin(letters[start].plain)) or not _runs_on(letters, start)


def _runs_on(letters: Sequence[Letter], border: int) -> bool:
    """Whether letters before and after this place belong to one Latin word."""
    if not 0 < border < len(letters) or letters[border].gap & VISIBLE:
        return False
    return is_latin(letters[border - 1].plain) and is_latin(letters[border].plain)


def _is_spelled(term: Sequence[Letter], letters: Sequence[Letter], start: int) -> bool:
    """Whether the letters from start on spell the term, and do not just happen to follow one another."""
    if not _starts_word(letters, start):
        return False
    spelled = letters[start : start + len(term)]
    is_regular = len(term) > 2 and all(letter.gap & VISIBLE for letter in spelled[1:])  # p-h-r-a-s-e
    if is_regular and is_latin(spelled[0].plain) and _is_lone(letters, start):
        return False  # the end of a longer word that is spelled out as well
    if not _is_lettered(term, spelled):
        return False
    word = 0
    for i in range(1, len(term) + 1):
        ends = i == len(term) or not _is_inside(term, i)
        if ends and not (is_regular or _is_joined(spelled[word:i])):
            return False
        if ends and i < len(term) and not _may_separate(term, spelled, i, is_regular):
            return False
        word = i if ends else word
    return True


def _is_inside(term: Sequence[Letter], i: int) -> bool:
    """Whether letter i goes on with a Latin word of the term."""
    return not term[i].gap and is_latin(term[i - 1].plain) and is_latin(term[i].plain)


def _is_lettered(term: Sequence[Letter], spelled: Sequence[Letter]) -> bool:
    """Whether digits stand for letters in words only that have letters as well, and for no digit of the term."""
    num_letters = in_word = 0
    for i, (wanted, got) in enumerate(zip(term, spelled, strict=True)):
        if wanted.plain != got.plain and not wanted.plain.isalpha():
            return False
        is_letter = wanted.plain == got.plain or got.plain.isalpha()
        num_letters += is_letter
        in_word = is_letter + (in_word if i and _is_inside(term, i) else 0)
        if not in_word and (i + 1 == len(term) or not _is_inside(term, i + 1)):
            return False
    return num_letters >= max(2, len(term) / 3)


def _is_joined(word: Sequence[Letter]) -> bool:
    """Whether nothing separates the letters, or the same all over, or a symbol that no prose puts inside a word."""
    gaps = [letter.gap & VISIBLE for letter in word[1:]]
    if not any(gaps) or (len(gaps) > 1 and all(gaps)):
        return True
    return len(word) > 3 and all(gap in (0, SYMBOL) for gap in gaps)


def _may_separate(term: Sequence[Letter], spelled: Sequence[Letter], i: int, is_regular: bool) -> bool:
    """Whether the gap before letter i, between two words or beside a Chinese character, is one of this phrase's."""
    gap = spelled[i].gap & VISIBLE
    if is_latin(term[i - 1].plain) and is_latin(term[i].plain):
        return bool(gap)
    return is_regular or not gap & STOP


def _is_lone(letters: Sequence[Letter], start: int) -> bool:
    """Whether the letter before start is Latin, and alone between gaps like that after start."""
    if not start or letters[start].gap & VISIBLE != letters[start + 1].gap & VISIBLE:
        return False
    stands_alone = start == 1 or bool(letters[start - 1].gap & VISIBLE) or not is_latin(letters[start - 2].plain)
    return is_latin(letters[start - 1].plain) and stands_alone
