"""Evaluation items that must not be trained on, found in documents by shared character n-grams.

An item is a row of a csv or jsonl file: its question, or all its text if that is too short. Items and documents are
folded to letters, digits and Chinese characters in lower case; an item counts as found in a document that holds more
than a share of its n-grams (after GPT-3's 13-grams, Brown et al. 2020, appendix C). Answers alone are not looked for,
and items shorter than one n-gram cannot be checked: they are counted.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app import storage
from app.corpus.dedup import Keys, shingle_hashes

CONTAMINATED = "contaminated"
_NOT_A_LETTER = re.compile(r"[\W_]+")
_QUESTION_FIELDS = ("question", "prompt", "problem", "query", "input", "text")
_OTHER_FIELDS = {"answer", "explanation", "id", "idx", "", "subject"}  # of CMMLU and C-Eval: nothing that was asked


@dataclass(frozen=True)
class EvaluationItems:
    """Names of the items and their n-grams: `hashes` sorted, `owners` the item of each, `sizes` n-grams an item."""

    names: list[str]
    hashes: Keys
    owners: NDArray[np.int64]
    sizes: NDArray[np.int64]
    num_too_short: int
    ngram_characters: int

    def find(self, texts: Sequence[str], max_overlap: float) -> list[str]:
        """For each text the name of the item most of which it holds beyond `max_overlap`, else ""."""
        if not len(self.hashes) or not texts:
            return [""] * len(texts)
        hashes, offsets = shingle_hashes([fold(text) for text in texts], self.ngram_characters)
        first = np.searchsorted(self.hashes, hashes, side="left")
        is_hit = self.hashes[np.minimum(first, len(self.hashes) - 1)] == hashes
        found = [""] * len(texts)
        documents = np.searchsorted(offsets, np.flatnonzero(is_hit), side="right") - 1
        for document in np.unique(documents):
            found[document] = self._largest(np.unique(hashes[offsets[document] : offsets[document + 1]]), max_overlap)
        return found

    def _largest(self, hashes: Keys, max_overlap: float) -> str:
        items = self.owners[np.isin(self.hashes, hashes)]
        shares = np.bincount(items, minlength=len(self.names)) / self.sizes
        best = int(np.argmax(shares))
        return self.names[best] if shares[best] > max_overlap else ""


def fold(text: str) -> str:
    """Letters, digits and Chinese characters only, in lower case."""
    return _NOT_A_LETTER.sub("", text).lower()


def load_items(uris: Sequence[str], ngram_characters: int) -> EvaluationItems:
    """The items of all files. Raises ValueError for a file that is missing or is neither csv nor jsonl."""
    names, texts = [], []
    for uri in uris:
        files = storage.list_files(uri)
        if not files:
            raise ValueError(f"decontamination.uris: no file at {uri}; check the path")
        for file in files:
            for number, row in enumerate(_read(file), start=1):
                names.append(f"{file.rsplit('/', 1)[-1]}#{number}")
                texts.append(_text_of(row, ngram_characters))
    is_long = [len(text) >= ngram_characters for text in texts]
    names = [name for name, long in zip(names, is_long, strict=True) if long]
    hashes, offsets = shingle_hashes([text for text in texts if len(text) >= ngram_characters], ngram_characters)
    sets = [np.unique(hashes[start:end]) for start, end in itertools.pairwise(offsets)]
    sizes = np.array([len(one) for one in sets], dtype=np.int64)
    flat = np.concatenate(sets) if sets else np.empty(0, np.uint64)
    order = np.argsort(flat, kind="stable")
    owners = np.repeat(np.arange(len(sets)), sizes)[order]
    return EvaluationItems(names, flat[order], owners, sizes, len(is_long) - sum(is_long), ngram_characters)


def _text_of(row: dict[str, str], ngram_characters: int) -> str:
    question = fold(next((row[name] for name in _QUESTION_FIELDS if name in row), ""))
    if len(question) >= ngram_characters:
        return question
    return fold("".join(text for name, text in row.items() if name not in _OTHER_FIELDS))


def _read(uri: str) -> Iterator[dict[str, str]]:
    with storage.open_file(uri) as file:
        content = file.read()
    try:
        for row in _rows(uri, content.decode("utf-8-sig")):
            yield {str(name).lower(): str(value or "") for name, value in row.items()}
    except (ValueError, AttributeError, csv.Error) as error:
        raise ValueError(f"{uri}: cannot be read as evaluation items ({error}); give .csv or .jsonl in UTF-8") from None


def _rows(uri: str, text: str) -> Iterator[dict[str, object]]:
    if uri.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif uri.endswith((".jsonl", ".json")):
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
    else:
        raise ValueError("unknown format")
