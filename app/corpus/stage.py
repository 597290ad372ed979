"""Corpus stage: raw files to clean, held-out and rejected documents, streamed through Ray Data.

Files are read, normalised and judged in parallel; documents meet by hash partition, where duplicates fall and each
partition writes its own parquet files. Text passes through the object store once and is never held whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from app import cluster, storage
from app.artifacts import Manifest, clear, find_complete, publish, raw_inputs
from app.corpus.config import CorpusConfig
from app.corpus.dedup import DUPLICATE, document_id, mark_duplicates, partition_of, split_of
from app.corpus.normalize import normalize
from app.corpus.rules import Rule, build_rules, first_reason
from app.corpus.sources import EXCERPT_CHARACTERS, RawFile, Record, find_files, read_records
from app.records import CLEAN_DOCUMENT, REJECTED_DOCUMENT, SPLITS

logger = logging.getLogger(__name__)

_UNREADABLE = "unreadable_file"  # travels as a row, so that all damaged files are named at once, without a traceback
_END_OF_FILE = "end_of_file"  # a row too; its position is the number of records read, to count against what arrives
BATCH_DOCUMENTS = 2000
BATCH_CHARACTERS = 8_000_000
_PLACE = (("file", pa.int32()), ("position", pa.int64()), ("partition", pa.int32()))
_JUDGED = pa.schema([*REJECTED_DOCUMENT, ("text", pa.string()), *_PLACE])


def run(config: CorpusConfig) -> Manifest:
    """Make the corpus artifact. Raises ValueError for missing or damaged files and when no document is left."""
    uri = config.resolve(config.output_uri)
    files = find_files(config)
    draft = Manifest.draft("corpus", uri, config, raw_inputs([file.uri for file in files]))
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    ray.data.DataContext.get_current().enable_progress_bars = False
    logger.info("reading %d files of %d sources", len(files), len(config.sources))

    def judge(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for index in batch["item"]:
            yield from judged_documents(files[int(index)], config)

    def write(group: pa.Table) -> pa.Table:
        return write_partition(group, config)

    counts: Counter[str] = Counter()
    written = (
        ray.data.from_items([file.index for file in files], override_num_blocks=len(files))
        .map_batches(judge, batch_size=1)
        .groupby("partition", num_partitions=config.num_partitions)
        .map_groups(write, batch_format="pyarrow")
    )
    for row in written.iter_rows():
        counts[row["counter"]] += row["count"]
        if row["counter"] == "train.documents":
            logger.info("%d documents written to the train split", counts["train.documents"])
    if damaged := sorted(name.removeprefix(f"{_UNREADABLE} ") for name in counts if name.startswith(_UNREADABLE)):
        raise ValueError("\n".join(damaged))
    assert counts["files"] == len(files), (counts, "a file was lost")
    return publish(draft, summarize(counts, config))


def judged_documents(file: RawFile, config: CorpusConfig) -> Iterator[pa.Table]:
    """The documents of a file, normalised and judged, as tables of some thousand rows; rule is "" for clean ones."""
    rules = build_rules(config.rules)
    rows: list[dict[str, Any]] = []
    position, characters = -1, 0
    for position, record in enumerate(_records_and_damage(file, config.max_line_bytes)):
        row = _judge(record, rules)
        row |= {"source": file.source, "file": file.index, "position": position}
        row["partition"] = partition_of(row["id"], config.num_partitions)
        rows.append(row)
        characters += len(row["text"])
        if len(rows) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield pa.Table.from_pylist(rows, _JUDGED)
            rows, characters = [], 0
    end = {"id": "", "rule": _END_OF_FILE, "source": file.source, "excerpt": "", "text": "", "file": file.index}
    rows.append(end | {"position": position + 1, "partition": file.index % config.num_partitions})
    yield pa.Table.from_pylist(rows, _JUDGED)


def _records_and_damage(file: RawFile, max_line_bytes: int) -> Iterator[Record]:
    try:
        yield from read_records(file, max_line_bytes)
    except ValueError as error:
        yield Record(str(error), _UNREADABLE)


def _judge(record: Record, rules: list[Rule]) -> dict[str, Any]:
    text, reason = record.text, record.reason
    if reason is None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            reason = "invalid_utf8"
        else:
            text = normalize(text)
            reason = first_reason(rules, text)
    if reason is None:
        return {"id": document_id(text), "rule": "", "excerpt": "", "text": text}
    readable = text.encode("utf-8", "replace").decode("utf-8")
    excerpt = readable if reason == _UNREADABLE else readable[:EXCERPT_CHARACTERS]
    return {"id": document_id(readable), "rule": reason, "excerpt": excerpt, "text": ""}


def write_partition(group: pa.Table, config: CorpusConfig) -> pa.Table:
    """Drop duplicates, write the partition's train, held-out and rejected files, return (counter, count) rows."""
    group = group.sort_by([("rule", "ascending"), ("file", "ascending"), ("position", "ascending")])
    rows = group.to_pylist()
    clean = [row for row in rows if not row["rule"]]
    ends = [row for row in rows if row["rule"] == _END_OF_FILE]
    rejected = [row for row in rows if row["rule"] and row["rule"] != _END_OF_FILE]
    outputs: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": [], "rejected": rejected}
    for row, duplicate in zip(clean, mark_duplicates(row["id"] for row in clean), strict=True):
        if duplicate:
            rejected.append(row | {"rule": DUPLICATE, "excerpt": row["text"][:EXCERPT_CHARACTERS]})
        else:
            outputs[split_of(row["id"], config.held_out_fraction)].append(row)
    uri = config.resolve(config.output_uri)
    for name, documents in outputs.items():
        schema = REJECTED_DOCUMENT if name == "rejected" else CLEAN_DOCUMENT
        documents.sort(key=lambda row: (row["id"], row["file"], row["position"]))
        path = f"{uri}/{name}/part-{group['partition'][0].as_py():05d}.parquet"
        with storage.open_file(path, "wb") as target:
            pq.write_table(pa.Table.from_pylist(documents, schema), target, compression="zstd")
    return _count(outputs, [row["position"] for row in ends])


def _count(outputs: dict[str, list[dict[str, Any]]], records_of_files: list[int]) -> pa.Table:
    counts: Counter[str] = Counter({"files": len(records_of_files), "raw": sum(records_of_files)})
    for split in SPLITS:
        counts[f"{split}.documents"] = len(outputs[split])
        counts[f"{split}.bytes"] = sum(len(row["text"].encode("utf-8")) for row in outputs[split])
    for row in outputs["rejected"]:
        counts[f"{_UNREADABLE} {row['excerpt']}" if row["rule"] == _UNREADABLE else f"rejected.{row['rule']}"] += 1
    return pa.table({"counter": list(counts), "count": list(counts.values())})


def summarize(counts: Counter[str], config: CorpusConfig) -> dict[str, Any]:
    """The figures of the manifest. Raises ValueError when no document is left to train on."""
    rejected = {name.removeprefix("rejected."): counts[name] for name in sorted(counts) if name.startswith("rejected.")}
    splits = {split: {key: counts[f"{split}.{key}"] for key in ("documents", "bytes")} for split in SPLITS}
    num_clean = sum(split["documents"] for split in splits.values())
    num_rejected = sum(rejected.values())
    assert num_clean + num_rejected == counts["raw"], (counts, "a document was lost")
    if not splits["train"]["documents"]:
        names = ", ".join(source.name for source in config.sources)
        raise ValueError(f"sources {names}: no document left of {counts['raw']} (rejected: {rejected or 'none'})")
    return {"raw": counts["raw"], "clean": num_clean, "rejected": num_rejected, "by_rule": rejected, **splits}
