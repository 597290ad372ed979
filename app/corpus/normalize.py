"""Text normalisation: one spelling for one text, whatever file and web page it came from.

Mojibake, line ends, invisible characters, width forms, NFC, blanks, then markup leftovers and Chinese variants, again
until nothing changes: applying it twice is applying it once. One scan tells whether a text needs most of it.
Chinese punctuation and full-width punctuation stay as they are; no boilerplate lines are taken out here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from app.corpus.config import NormalizeConfig
from app.corpus.leftovers import strip_leftovers

Normalizer = Callable[[str], str]

_ODD_LINE_ENDS = "\r\x0b\x0c\x85\u2028\u2029"
_INVISIBLE = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
_INVISIBLE += "\u2066-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"  # U+200C and U+200D stay: they shape scripts and emoji
_WIDE_BLANKS = "\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_WIDE = "\uff10-\uff19\uff21-\uff3a\uff41-\uff5a"  # full-width digits and letters
_COMPATIBLE = "\u2e9f\u2ef3\u2f00-\u2fd5\uff66-\uff9f"  # Kangxi radicals, half-width katakana
_MOJIBAKE = "\u0080-\u00b6\u00b8-\u04ff"  # every sort of it leaves some of these; the middle dot is good Chinese

_UNUSUAL = re.compile(f"[{_ODD_LINE_ENDS}{_INVISIBLE}{_WIDE_BLANKS}{_WIDE}{_COMPATIBLE}{_MOJIBAKE}]")
_LINE_ENDS = re.compile(f"\r\n|[{_ODD_LINE_ENDS}]")
_INVISIBLES = re.compile(f"[{_INVISIBLE}]+")
_BLANKS = re.compile(f"[ {_WIDE_BLANKS}]+")
_NEWLINES = re.compile("\n{3,}")
_WIDE_RUN = re.compile(f"[{_WIDE}]+")
_COMPATIBLE_RUN = re.compile(f"[{_COMPATIBLE}\uff9e\uff9f]+")
_MOJIBAKE_LETTER = re.compile(f"[{_MOJIBAKE}]")
_HALF_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
MAX_ROUNDS = 8  # two are the rule for a text that needs something, three for escaped markup


def build_normalizer(config: NormalizeConfig) -> Normalizer:
    """The function from raw to normalised text, `f(f(x)) == f(x)`.

    >>> build_normalizer(NormalizeConfig())("  \uff21&amp;\uff22\\r\\n\\r\\n\\r\\n\\r\\n<b>C</b> ")
    'A&B\\n\\nC'
    """

    def once(text: str) -> str:
        if _UNUSUAL.search(text):
            found = "".join(set(_UNUSUAL.findall(text)))  # a scan of a long text costs as much as a step
            if config.repair_mojibake and _MOJIBAKE_LETTER.search(found):
                text = repair_mojibake(text)
                found = "".join(set(_UNUSUAL.findall(text)))
            text = _regular_characters(text, found, config.half_width)
        text = _regular_blanks(unicodedata.normalize("NFC", text))
        if config.strip_markup:
            text = strip_leftovers(text)
        return to_simplified(text) if config.to_simplified else text

    def normalize(text: str) -> str:
        for _ in range(MAX_ROUNDS):
            before, text = text, once(text)
            if text == before:
                break
        return text

    return normalize


def _regular_characters(text: str, found: str, half_width: bool) -> str:
    """Newlines the only line ends, spaces the only blanks, nothing invisible; letters and digits in half width."""
    if _LINE_ENDS.search(found):
        text = _LINE_ENDS.sub("\n", text)
    if _INVISIBLES.search(found):
        text = _INVISIBLES.sub("", text)
    if _BLANKS.search(found):
        text = _BLANKS.sub(" ", text)
    if half_width and _WIDE_RUN.search(found):
        text = _WIDE_RUN.sub(lambda run: run[0].translate(_HALF_WIDTH), text)
    if half_width and _COMPATIBLE_RUN.search(found):
        text = _COMPATIBLE_RUN.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return text


def _regular_blanks(text: str) -> str:
    """One space for runs of spaces, none around newlines, at most one empty line, nothing at the ends."""
    if "  " in text:
        text = _BLANKS.sub(" ", text)
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    if "\n\n\n" in text:
        text = _NEWLINES.sub("\n\n", text)
    return text.strip()


def repair_mojibake(text: str) -> str:
    """Text that was decoded with the wrong Western character set, decoded again; everything else as it was.

    Only lines that ftfy calls bad are touched, and only their encoding: its other repairs rewrite Chinese punctuation.
    """
    import ftfy  # 65 ms, and most texts need none of it
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(fix_c1_controls=False)  # U+0085 alone is a line end, not an ellipsis
    return "\n".join(ftfy.fix_encoding(line, config) if is_bad(line) else line for line in text.split("\n"))


def to_simplified(text: str) -> str:
    """Traditional Chinese characters as simplified ones (OpenCC, t2s)."""
    return _converter()(text)


@cache
def _converter() -> Normalizer:
    import opencc

    convert: Normalizer = opencc.OpenCC("t2s").convert
    return convert
