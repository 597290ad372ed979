"""The language of a text, offline.

Text that is mostly Chinese characters and has no kana and no Hangul is Chinese: no other living language is written so.
Everything else is asked of the model of py3langid, restricted to languages with much text, on the first 1,000
characters. It tells no varieties of Chinese apart, and no simplified from traditional characters.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from app.corpus.characters import CHINESE, LATIN, LETTER, classes

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

JUDGED_CHARACTERS = 1000
UNDETERMINED = "und"
_CODES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja kk km ko lo lt lv mn ms my nl no pl pt ro ru sk sl "
)
_CODES += "sr sv sw ta te th tl tr ug uk ur uz vi zh"
LANGUAGES = tuple(_CODES.split())  # what `language_of` can answer, beside UNDETERMINED
_CHINESE_VARIETIES = {"wuu": "zh", "yue": "zh", "lzh": "zh"}
_NOT_CHINESE = re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\u1100-\u11ff\uac00-\ud7af]")


def language_of(text: str) -> str:
    """ISO 639 code, such as "zh" or "en"; "und" for text without letters."""
    start = text[:JUDGED_CHARACTERS]
    found = classes(start)
    chinese, others = found.count(CHINESE), found.count(LETTER)
    letters = chinese + others + found.count(LATIN)
    if not letters:
        return UNDETERMINED
    if 2 * chinese >= letters and not (others and _NOT_CHINESE.search(start)):
        return "zh"
    code = str(_identifier().classify(start)[0])
    return _CHINESE_VARIETIES.get(code, code)


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([code for code in (*LANGUAGES, *_CHINESE_VARIETIES) if code in identifier.nb_classes])
    return identifier
