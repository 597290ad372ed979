"""Text normalisation: NFC, control characters out, whitespace made regular.

Changes no punctuation and no letters; full-width forms stay as they are.
"""

import re
import unicodedata

_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_BLANKS = re.compile("[ \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_AROUND_NEWLINE = re.compile(" ?\n ?")
_NEWLINES = re.compile("\n{3,}")


def normalize(text: str) -> str:
    """NFC text with one space for runs of blanks, at most one empty line between lines, none at the ends.

    >>> normalize("\ufeff  刘备\u3000\u3000关羽 \r\n\r\n\r\n\r\n张飞")
    '刘备 关羽\\n\\n张飞'
    """
    text = unicodedata.normalize("NFC", _CONTROL.sub("", _LINE_ENDS.sub("\n", text)))
    text = _AROUND_NEWLINE.sub("\n", _BLANKS.sub(" ", text))
    return _NEWLINES.sub("\n\n", text).strip()
