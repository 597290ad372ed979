"""A shard's part of the corpus: train, held-out and rejected documents, when it is known which are duplicates.

It decides nothing but the split; rules and duplicates were found before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from app.corpus.config import CorpusConfig
from app.corpus.dedup import DUPLICATE, NEAR_DUPLICATE, Keys, locate, split_of
from app.corpus.shards import EXCERPT_CHARACTERS, EXCERPTS_A_RULE, JUDGED, Counts, Work, open_writer, read_judged
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
            outputs = _sort_out(table, work, config, duplicates)
            for writer, name in ((train, "train"), (held_out, "held_out"), (rejected, "rejected")):
                schema = REJECTED_DOCUMENT if name == "rejected" else CLEAN_DOCUMENT
                if outputs[name]:
                    writer.write_table(pa.Table.from_pylist(outputs[name], schema))
            _count(outputs, counts, source, work.index)
    return counts


def _sort_out(
    table: pa.Table, work: Work, config: CorpusConfig, duplicates: Duplicates
) -> dict[str, list[dict[str, Any]]]:
    outputs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, "rejected")}
    falling = duplicates.of(work.keys(table["position"].to_pylist()))
    for index, row in enumerate(table.to_pylist()):
        row["source"] = work.shard.file.source
        if not row["rule"] and index in falling:
            row["rule"], row["detail"] = falling[index]
            row["excerpt"] = row["text"][:EXCERPT_CHARACTERS]
        name = "rejected" if row["rule"] else split_of(row["id"], config.held_out_fraction)
        outputs[name].append(row)
    return outputs


def _count(outputs: dict[str, list[dict[str, Any]]], counts: Counts, source: str, index: int) -> None:
    for split in SPLITS:
        counts.counters[f"{split}.documents"] += len(outputs[split])
        counts.counters[f"source.{source}.{split}"] += len(outputs[split])
        for row in outputs[split]:
            num_bytes = len(row["text"].encode())
            counts.counters[f"{split}.bytes"] += num_bytes
            counts.counters[f"source.{source}.{split}_bytes"] += num_bytes
            counts.describe("after", row["text"], row["id"])
    for row in outputs["rejected"]:
        counts.counters[f"rejected.{row['rule']}"] += 1
        counts.counters[f"source.{source}.rejected.{row['rule']}"] += 1
        excerpts = counts.excerpts.setdefault(row["rule"], [])
        if len(excerpts) < EXCERPTS_A_RULE:
            excerpts.append((index, row["position"], row["excerpt"]))
