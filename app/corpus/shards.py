"""The files of shards: judged documents with their counts, read in batches.

Each file appears whole or not at all and carries its counts in its metadata, so that an interrupted run knows what is
done. `Counts` are figures that add up over shards. It judges nothing; judge.py does.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app import storage
from app.corpus.config import CorpusConfig
from app.corpus.dedup import Keys, band_keys, document_keys
from app.corpus.language import language_of
from app.corpus.sources import Shard
from app.records import SPLITS

JUDGED = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "rule", "detail", "excerpt", "text")),
        ("position", pa.int64()),
        ("bands", pa.list_(pa.uint64())),
    ]
)
EXCERPTS_A_RULE = 10
BATCH_DOCUMENTS = 1000
_SAMPLED = ("00", "40", "80", "c0")  # last digits of one id in 64
_METADATA_KEY = "zero_to_one"


@dataclass
class Counts:
    """Figures of a shard that add up: counters, seconds by step, and some excerpts of each rejection."""

    counters: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    excerpts: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)  # rule -> (shard, position, excerpt)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of the block to that step."""
        start = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - start  # type: ignore[assignment]  # a Counter of floats

    def add(self, other: Counts) -> None:
        """Take over what another shard counted."""
        self.counters.update(other.counters)
        self.seconds.update(other.seconds)
        for rule, excerpts in other.excerpts.items():
            self.excerpts[rule] = sorted([*self.excerpts.get(rule, []), *excerpts])[:EXCERPTS_A_RULE]

    def describe(self, stage: str, texts: Sequence[str], identities: Sequence[str]) -> None:
        """Count documents in the histograms of length and, one in 64, of language."""
        for bits, number in Counter(len(text).bit_length() for text in texts).items():
            self.counters[f"{stage}.length.{bits}"] += number
        for text, identity in zip(texts, identities, strict=True):
            if identity.endswith(_SAMPLED):
                self.counters[f"{stage}.language.{language_of(text)}"] += 1

    @property
    def num_documents(self) -> int:
        """Documents written if there are any, else records judged."""
        written = sum(self.counters[f"{split}.documents"] for split in SPLITS)
        return written or self.counters["raw"]

    def to_json(self) -> str:
        """The counts as the text that files carry."""
        return json.dumps([self.counters, self.seconds, self.excerpts], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """The counts in such a text."""
        counters, seconds, excerpts = json.loads(text)
        return cls(
            Counter(counters), Counter(seconds), {}, {rule: [tuple(e) for e in es] for rule, es in excerpts.items()}
        )


@dataclass(frozen=True)
class Work:
    """A shard, where its judged documents go, and the number of its output files."""

    shard: Shard
    judged_uri: str
    index: int
    is_seen: bool = False  # a file of an earlier corpus, all of it clean

    def keys(self, positions: npt.ArrayLike) -> Keys:
        """Keys of the documents at these positions."""
        return document_keys(self.shard.file.index, np.asarray(positions, dtype=np.int64))


def read_counts(uri: str, run: str = "") -> Counts | None:
    """The counts that a file of ours carries; None if it is not there or a different run wrote it."""
    if not storage.exists(uri):
        return None
    with storage.open_file(uri) as file:
        metadata = pq.ParquetFile(file).metadata.metadata
    written = json.loads(metadata[_METADATA_KEY.encode()])
    return Counts.from_json(written["counts"]) if written["run"] == run else None


@contextmanager
def open_writer(uri: str, schema: pa.Schema, counts: Counts, run: str = "") -> Iterator[pq.ParquetWriter]:
    """A parquet file with these counts, whole when the block ends without an error, else absent."""
    with storage.open_atomic(uri) as target, pq.ParquetWriter(target, schema, compression="zstd") as writer:
        yield writer
        writer.add_key_value_metadata({_METADATA_KEY: json.dumps({"run": run, "counts": counts.to_json()})})


def read_judged(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a file of judged documents with these columns."""
    with storage.open_file(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(BATCH_DOCUMENTS, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def read_clean(work: Work, columns: Sequence[str]) -> Iterator[tuple[Keys, pa.Table]]:
    """Keys and columns of a shard's documents that no rule rejected, batch by batch."""
    row = 0
    needed = list(columns) if work.is_seen else [*columns, "rule", "position"]
    for table in read_judged(work.judged_uri, needed):
        if work.is_seen:
            positions = np.arange(row, row + len(table))
        else:
            table = table.filter(pc.equal(table["rule"], ""))
            positions = table["position"].to_numpy()
        row += len(table)
        yield work.keys(positions), table


def read_bands(work: Work, config: CorpusConfig) -> Iterator[tuple[Keys, Keys]]:
    """Keys [N] and band keys [N, bands] of a shard's clean documents; for an earlier corpus they are made anew."""
    for keys, table in read_clean(work, ["text" if work.is_seen else "bands"]):
        if work.is_seen:
            yield keys, fingerprints(table["text"].to_pylist(), config)
        else:
            flat = table["bands"].combine_chunks().flatten().to_numpy().astype(np.uint64)
            yield keys, flat.reshape(len(keys), -1 if len(keys) else 0)


def fingerprints(texts: Sequence[str], config: CorpusConfig) -> Keys:
    """Band keys of the texts, [N, bands]."""
    return band_keys(texts, config.dedup.shingle_characters, config.dedup.min_similarity)
