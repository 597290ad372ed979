"""A shard's part of the corpus: train, held-out and rejected documents, when it is known which are duplicates.

It decides nothing but the split; rules and duplicates were found before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.corpus.config import CorpusConfig
from app.corpus.decontaminate import CONTAMINATED
from app.corpus.dedup import DUPLICATE, NEAR_DUPLICATE, Keys, locate, split_of
from app.corpus.shards import EXCERPTS_A_RULE, JUDGED, Counts, Work, open_writer, read_judged
from app.corpus.sources import EXCERPT_CHARACTERS
from app.records import CLEAN_DOCUMENT, REJECTED_DOCUMENT, SPLITS


@dataclass(frozen=True)
class Duplicates:
    """Documents that fall: sorted keys, the keys of those that stay in their stead, whether they are near only."""

    rows: Keys  # [N, 3]: key, kept key, 1 if near
    files: Sequence[str]  # names by file index

    def of(self, keys: Keys) -> dict[int, tuple[str, str]]:
        """Which of these documents fall: index in `keys` -> (rule, file name and position of the one that stays)."""
        if not len(self.rows) or not len(keys):
            return {}
        places = np.minimum(np.searchsorted(self.rows[:, 0], keys), len(self.rows) - 1)
        hits = np.flatnonzero(self.rows[places, 0] == keys)
        return {int(hit): self._explain(*self.rows[places[hit], 1:].tolist()) for hit in hits}

    def _explain(self, kept: int, is_near: int) -> tuple[str, str]:
        file, position = locate(kept)
        return NEAR_DUPLICATE if is_near else DUPLICATE, f"{self.files[file]}:{position}"


def write_shard(work: Work, uri: str, config: CorpusConfig, duplicates: Duplicates, run: str) -> Counts:
    """Write the shard's part of the corpus: train, held-out and, last, rejected documents with the counts."""
    counts = Counts()
    source = work.shard.file.source
    paths = {name: f"{uri}/{name}/part-{work.index:05d}.parquet" for name in (*SPLITS, "rejected")}
    with (
        open_writer(paths["rejected"], REJECTED_DOCUMENT, counts, run) as rejected,
        open_writer(paths["held_out"], CLEAN_DOCUMENT, counts, run) as held_out,
        open_writer(paths["train"], CLEAN_DOCUMENT, counts, run) as train,
    ):
        for table in read_judged(work.judged_uri, [name for name in JUDGED.names if name != "bands"]):
            table = _with_duplicates(table, work, duplicates)
            is_rejected = pc.not_equal(table["rule"], "")
            clean = table.filter(pc.invert(is_rejected)).select(CLEAN_DOCUMENT.names)
            is_held_out = [split_of(one, config.held_out_fraction) == "held_out" for one in clean["id"].to_pylist()]
            parts = {"train": clean.filter(pc.invert(pa.array(is_held_out, pa.bool_())))}
            parts["held_out"] = clean.filter(pa.array(is_held_out, pa.bool_()))
            _count_clean(parts, counts, source)
            table = table.filter(is_rejected)
            _count_rejected(table, counts, work)
            train.write_table(parts["train"].cast(CLEAN_DOCUMENT))
            held_out.write_table(parts["held_out"].cast(CLEAN_DOCUMENT))
            rejected.write_table(table.select(REJECTED_DOCUMENT.names).cast(REJECTED_DOCUMENT))
    return counts


def _with_duplicates(table: pa.Table, work: Work, duplicates: Duplicates) -> pa.Table:
    """The judged documents with their source, and with rule, detail and excerpt of those that are duplicates."""
    columns = {name: table[name].to_pylist() for name in ("rule", "detail", "excerpt")}
    texts = table["text"]
    for index, (rule, detail) in duplicates.of(work.keys(table["position"].to_numpy())).items():
        if not columns["rule"][index]:
            columns["rule"][index], columns["detail"][index] = rule, detail
            columns["excerpt"][index] = texts[index].as_py()[:EXCERPT_CHARACTERS]
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
    return table.append_column("source", pa.array([work.shard.file.source] * len(table), pa.string()))


def _count_clean(parts: dict[str, pa.Table], counts: Counts, source: str) -> None:
    for split, table in parts.items():
        num_bytes = pc.sum(pc.binary_length(table["text"])).as_py() or 0
        counts.counters[f"{split}.documents"] += len(table)
        counts.counters[f"{split}.bytes"] += num_bytes
        counts.counters[f"source.{source}.{split}"] += len(table)
        counts.counters[f"source.{source}.{split}_bytes"] += num_bytes
        counts.describe("after", table["text"].to_pylist(), table["id"].to_pylist())


def _count_rejected(table: pa.Table, counts: Counts, work: Work) -> None:
    rows = zip(*(table[name].to_pylist() for name in ("rule", "position", "excerpt", "detail")), strict=True)
    for rule, position, excerpt, detail in rows:
        if rule == CONTAMINATED:
            counts.counters[f"found.{detail} in {work.shard.file.source}"] += 1
        counts.counters[f"rejected.{rule}"] += 1
        counts.counters[f"source.{work.shard.file.source}.rejected.{rule}"] += 1
        excerpts = counts.excerpts.setdefault(rule, [])
        if len(excerpts) < EXCERPTS_A_RULE:
            excerpts.append((work.index, position, excerpt))
