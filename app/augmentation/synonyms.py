"""Synonym replacement: some Chinese words of a text replaced by words of the same meaning.

jieba cuts words; a lexicon in the layout of Cilin (https://www.ltp-cloud.com/download) gives synonyms; a seed chooses.
Only whole Chinese words of two characters or more with one meaning in the lexicon change, and only to a word that
jieba knows as the same part of speech. Latin letters, digits, punctuation and placeholders stay as they are.
It does not look at the context of a word: the similarity floor does, roughly.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache

import jieba

from app.augmentation.config import SynonymsConfig

_GROUP = re.compile(r"[A-Z][a-z]\d{2}[A-Z]\d{2}(?P<relation>[=#@])(?P<words>(?:\s+\S+)*)")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
MIN_CHARACTERS = 2  # a single character means too many things


class SynonymReplacer:
    """A lexicon beside jieba's dictionary. Raises ValueError for a lexicon of another layout."""

    def __init__(self, lexicon_lines: Iterable[str], config: SynonymsConfig) -> None:
        self._share = config.replaced_share
        lexicon = read_lexicon(lexicon_lines)
        self._segmenter, speech = _dictionary()
        self._choices = {
            word: chosen
            for word, synonyms in lexicon.items()
            if (chosen := _alike(word, synonyms, speech, config.max_length_difference))
        }

    def replace(self, text: str, seed: str) -> str:
        """The text with that share of its Chinese words replaced, or as many as have synonyms; the same for a seed."""
        choose = random.Random(seed)
        words = list(self._segmenter.cut(text))
        places = [place for place, word in enumerate(words) if word in self._choices]
        num_words = sum(1 for word in words if _CHINESE.fullmatch(word))
        wanted = min(len(places), max(1, round(self._share * num_words)))
        for place in choose.sample(places, wanted):
            synonyms = self._choices[words[place]]
            weights = [self._segmenter.FREQ[word] for word in synonyms]  # common words first: 平民, seldom 黔首
            words[place] = choose.choices(synonyms, weights)[0]
        return "".join(words)


@cache
def _dictionary() -> tuple[jieba.Tokenizer, dict[str, str]]:
    """The segmenter and the first letter of each word's tag (n noun, v verb, a adjective …), once per process (1 s)."""
    segmenter = jieba.Tokenizer()
    # Not `initialize`: it reads and writes a cache file in /tmp, where anybody may have put one.
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    with segmenter.get_dict_file() as file:
        tags = {word: sys.intern(tag[0]) for word, _, tag in (line.decode("utf-8").split() for line in file)}
    return segmenter, tags


def read_lexicon(lines: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Word -> its synonyms, for words that stand in one group only, a group of synonyms (`=`).

    `#` (related words) and `@` (words by themselves) give no synonyms but count as meanings. Raises ValueError for a
    line of another layout, and when there is no group of synonyms.
    """
    groups: list[tuple[str, ...]] = []
    meanings: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        if not (content := line.strip().strip("\ufeff")):
            continue
        match = _GROUP.fullmatch(content)
        if not match:
            raise ValueError(f"lexicon, line {number}: expected `Aa01A01= word word …`, got {content[:40]!r}")
        words = tuple(dict.fromkeys(match["words"].split()))
        meanings.update(words)
        if match["relation"] == "=" and len(words) > 1:
            groups.append(words)
    if not groups:
        raise ValueError("lexicon: no group of synonyms (a line with `=` and two words)")
    return {
        word: tuple(other for other in words if other != word)
        for words in groups
        for word in words
        if meanings[word] == 1
    }


def _alike(word: str, synonyms: Iterable[str], speech: dict[str, str], max_difference: int) -> list[str]:
    if len(word) < MIN_CHARACTERS or not _CHINESE.fullmatch(word):
        return []
    return [
        other
        for other in synonyms
        if len(other) >= MIN_CHARACTERS
        and abs(len(other) - len(word)) <= max_difference
        and _CHINESE.fullmatch(other)
        and speech.get(word) is not None
        and speech.get(other) == speech.get(word)
    ]
