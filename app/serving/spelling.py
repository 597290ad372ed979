"""One spelling for text that was spelled to slip through a filter, with a map back to the original.

Each character alone is folded: compatibility and full-width forms, case, accents, traditional Chinese, look-alikes of
other scripts, digits for letters. What separates letters is left out but remembered, as a gap before the next letter.
It does not read homophones, pinyin, mirrored words or characters taken apart, and it does not know words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

MAX_VISIBLE_GAP = 8  # separators between two letters of a phrase; behind more of them a new phrase begins
MAX_INVISIBLE_GAP = 32  # the same for what nobody sees; a longer run is a finding itself: hidden_text
MAX_GAP = MAX_VISIBLE_GAP + MAX_INVISIBLE_GAP
BREAK = "\0"  # in folded letters: no phrase goes on across it
INVISIBLE, SPACE, SYMBOL, STOP = 1, 2, 4, 8  # bits of a gap: what stands in it
VISIBLE = SPACE | SYMBOL | STOP

_CACHED = 65536  # characters; who sends all of Unicode does not fill the memory
_STOPS = frozenset("。！？；，、：…“”‘’「」『』《》〈〉【】（）()?!;,:\"'\n\r\x0b\x0c\x85\u2028\u2029")
_INVISIBLE_CATEGORIES = frozenset(("Cf", "Mn", "Me", "Cc", "Cs", "Cn"))
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul fillers and the empty Braille cell
_ACCENTED = re.compile("[\u00c0-\u052f\u1d00-\u1fff]")
_UNUSUAL_RUN = re.compile(
    f"[^\t\n\r -~\u00a1-\u00ac\u00ae-\u02ff\u0391-\u0482\u2010-\u2027\u3001-\u3029\u3041-\u3096\u30a1-\u30ff"
    f"\u3400-\u9fff\uac00-\ud7a3\uff01-\uff9f]{{{MAX_INVISIBLE_GAP + 1},}}"
)
_LEET = dict(zip("0134578@$l", "oieastbasi", strict=True))  # l, I and 1 look alike: all of them are i
_CYRILLIC = "аaбbвbгrеeёeзeкkмmнhоoрpсcтtуyхxцuьbіiјjѕsһhԁdԛqԝwӏi"
_GREEK = "αaβbεeηnιiκkνvοoρpτtυuχxωwγy"
_LATIN = "ıiłløođdħhɑaɡgɩiɪiʟlʀrɴnᴀaʙbᴄcᴅdᴇeɢgʜhᴊjᴋkᴍmᴏoᴘpᴛtᴜuᴠvᴡwᴢz"
_CONFUSABLE: dict[str, str] = dict(zip(*[iter(_CYRILLIC + _GREEK + _LATIN)] * 2, strict=True))
_CONFUSABLE_HAN = dict(zip("毐睹搏榨掸巳已末曰囗衤", "毒赌博炸弹己己未日口礻", strict=True))
_ENCLOSED = ((0x1F1E6, 26), (0x1F150, 26), (0x1F170, 26))  # regional indicators, negative circled, negative squared


class Letter(NamedTuple):
    """A folded letter: what is matched, what it was before digits became letters, where, and the gap before it."""

    folded: str
    plain: str
    start: int
    gap: int


@dataclass
class Folded:
    """Letters of a text, and the gap behind the last one."""

    letters: list[Letter] = field(default_factory=list)
    gap: int = 0

    @property
    def text(self) -> str:
        return "".join(letter.folded for letter in self.letters)


class _Table(dict[int, str]):
    """For str.translate: a character code -> its folded letters, "" for a separator. Fills itself."""

    def __missing__(self, code: int) -> str:
        plain, _ = fold_character(chr(code))
        folded = "".join(_LEET.get(one, one) for one in plain)
        if len(self) < _CACHED:
            self[code] = folded
        return folded


_TABLE = _Table()


def compact(text: str) -> str:
    """The folded letters alone, without breaks: for a first look, at the speed of str.translate.

    >>> compact("Ｈ·е-r 0 ïn 毒\u200b 品，槍")
    'heroin毒品枪'
    """
    return text.translate(_TABLE)


def fold(text: str) -> Folded:
    """The letters with their places. A break stands in for a gap that is too long."""
    found = Folded()
    letters, gap, num_visible, num_invisible = found.letters, 0, 0, 0
    for index, character in enumerate(text):
        plain, kind = fold_character(character)
        if kind:
            gap |= kind
            num_visible, num_invisible = num_visible + (kind != INVISIBLE), num_invisible + (kind == INVISIBLE)
            is_long = num_visible > MAX_VISIBLE_GAP or num_invisible > MAX_INVISIBLE_GAP
            if is_long and letters and letters[-1].folded != BREAK:
                letters.append(Letter(BREAK, BREAK, index, VISIBLE))
            continue
        for one in plain:
            letters.append(Letter(_LEET.get(one, one), one, index, gap))
            gap = num_visible = num_invisible = 0
    found.gap = gap
    return found


@lru_cache(_CACHED)
def fold_character(character: str) -> tuple[str, int]:
    """The letters of a character, digits still digits, and 0; or "" and what sort of separator it is."""
    if kind := _separator(character):
        return "", kind
    plain = "".join(map(_fold_letter, unicodedata.normalize("NFKC", character).casefold()))
    return (plain, 0) if plain else ("", SYMBOL)


def is_latin(letter: str) -> bool:
    """Whether words of such letters end at borders: ASCII letters and digits, and @ and $ that stand in for some."""
    return letter.isascii() and (letter.isalnum() or letter in "@$")


def _separator(character: str) -> int:
    category = unicodedata.category(character)
    if character in _BLANK_LETTERS or (category in _INVISIBLE_CATEGORIES and character not in "\t\n\r"):
        return INVISIBLE
    if character in _STOPS:
        return STOP
    if character == "\t" or category[0] == "Z":
        return SPACE
    is_letter = category[0] in "LNM" or character in "@＠$＄" or _enclosed(character)
    return 0 if is_letter or unicodedata.normalize("NFKC", character)[0].isalnum() else SYMBOL


def _enclosed(character: str) -> str:
    return next((chr(97 + ord(character) - a) for a, n in _ENCLOSED if a <= ord(character) < a + n), "")


def _fold_letter(letter: str) -> str:
    """One letter as its ASCII or simplified look-alike; "" for what is none."""
    if letter.isascii():
        return letter if is_latin(letter) else ""
    if enclosed := _enclosed(letter):
        return enclosed
    if letter in _CONFUSABLE:
        return _CONFUSABLE[letter]
    if _ACCENTED.match(letter):
        letter = unicodedata.normalize("NFD", letter)[0]
        return _CONFUSABLE.get(letter, letter)
    if "\u3400" <= letter <= "\u9fff" or letter >= "\U00020000":
        letter = _simplified(letter)
        return _CONFUSABLE_HAN.get(letter, letter)
    return letter if unicodedata.category(letter)[0] in "LN" else ""


def _simplified(character: str) -> str:
    converted: str = _converter().convert(character)
    return converted


@cache
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def invisible_runs(text: str) -> Iterator[tuple[int, int]]:
    """Where more invisible characters stand in a row than any writing needs; also tags that smuggle hidden ASCII."""
    for unusual in _UNUSUAL_RUN.finditer(text):
        start = unusual.start()
        for index in range(start, unusual.end() + 1):
            if index < unusual.end() and fold_character(text[index])[1] == INVISIBLE:
                continue
            if index - start > MAX_INVISIBLE_GAP:
                yield start, index
            start = index + 1
