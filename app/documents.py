"""The clean documents of a corpus artifact: all of a file in order, or one of each file in turn.

The corpus stage writes files in the order of its sources, so whoever wants some documents of all sources (to train a
tokenizer, to calibrate, to compare) takes them in turn. It reads batches, never a whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import pyarrow.parquet as pq

from app import storage

BATCH_ROWS = 100  # a row may be a whole book
MAX_FILES = 256  # open at a time; of more, so many are taken at even distances


class Document(NamedTuple):
    """One clean document."""

    id: str
    text: str
    source: str


def read_file(uri: str) -> Iterator[Document]:
    """The documents of one parquet file, in its order."""
    with storage.open_file(uri) as file:
        for rows in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS, columns=list(Document._fields)):
            yield from map(Document, *(rows.column(name).to_pylist() for name in Document._fields))


def take_in_turn(corpus_uri: str, split: str) -> Iterator[Document]:
    """Documents of a split, one of each file in turn until all files have ended."""
    files = storage.list_files(f"{corpus_uri}/{split}", ".parquet")
    files = [files[index * len(files) // MAX_FILES] for index in range(MAX_FILES)] if len(files) > MAX_FILES else files
    readers = [read_file(uri) for uri in files]
    while readers:
        going = []
        for reader in readers:
            if document := next(reader, None):
                yield document
                going.append(reader)
        readers = going


def sample_texts(corpus_uri: str, split: str, max_documents: int) -> list[str]:
    """At most so many texts of a split, from all of its files. Raises ValueError when there is none."""
    texts = [document.text for document in islice(take_in_turn(corpus_uri, split), max_documents)]
    if not texts:
        raise ValueError(f"{corpus_uri}/{split}: no documents; set held_out_fraction or sources in prepare_corpus")
    return texts
