"""Ours: the corpus stage on a local Ray cluster of its own. In the project's environment: DOCUMENTS OUTPUT --task TASK.

TASK is cleaning (five rules, mojibake repair, exact duplicates) or near_duplicates (no rule, MinHash and true Jaccard).
In both, what the others do not do is switched off: markup, personal data, width of letters, further rules. The third
TASK, everything, is the stage as it comes.
The stage keeps no ids of its input: documents are found again by their text, which the corpus has in normal form.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import report

from app.cluster import PRIVATE, LocalClusterConfig, connect, start_local, stop_local
from app.corpus.config import CorpusConfig, RulesConfig
from app.records import SPLITS

CHANGED = "changed"
NOTHING_CHANGED = {"repair_mojibake": False, "half_width": False, "to_simplified": False, "strip_markup": False}
ALL_PASS = {
    "min_characters": 1,
    "max_characters": 1_000_000,
    "min_chinese_ratio": 0.0,
    "max_symbol_ratio": 1.0,
    "max_repetition_ratio": 1.0,
}
FIVE_RULES = {
    "min_characters": 8,
    "max_characters": 1_000_000,
    "min_chinese_ratio": 0.3,
    "max_symbol_ratio": 0.4,
    "max_repetition_ratio": 0.5,
}
TASKS: dict[str, dict[str, Any]] = {
    "everything": {},
    "cleaning": {
        "normalize": NOTHING_CHANGED | {"repair_mojibake": True},
        "rules": FIVE_RULES,
        "dedup": {"near": False},
    },
    "near_duplicates": {
        "normalize": NOTHING_CHANGED,
        "rules": {},
        "dedup": {"near": True, "min_similarity": 0.8, "shingle_characters": 5},
    },
}


def config_of(task: str, documents: Path, output: Path) -> CorpusConfig:
    """The stage's settings for a task."""
    settings: dict[str, Any] = dict(TASKS[task])
    if settings:  # "everything" keeps the stage's defaults
        settings |= {"rules": rules_off() | settings["rules"], "pii": {"action": "keep"}}
    common = {"storage_uri": str(output), "held_out_fraction": 0.0}
    sources = [{"name": "documents", "uri": str(documents / "*.jsonl")}]
    return CorpusConfig.model_validate(common | settings | {"sources": sources})


def rules_off() -> dict[str, Any]:
    """All rules switched off that can be, also those that are added later; the rest at bounds that let all pass."""
    fields = RulesConfig.model_fields.items()
    optional = {name: None for name, field in fields if type(None) in typing.get_args(field.annotation)}
    return ALL_PASS | optional | {name: False for name, field in fields if field.annotation is bool}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    given = parser.parse_args()
    config = config_of(given.task, given.documents, given.output)
    os.environ.update(PRIVATE)  # before the first import of ray, which the stage does
    import ray

    from app.corpus import stage

    folder = given.output / "cluster"
    cluster = start_local(LocalClusterConfig(folder=str(folder), num_cpus=given.workers))
    os.environ.update(cluster.environment)
    try:
        connect()
        report.measure(
            lambda: stage.run(config),
            given.documents,
            given.output,
            lambda: kept_ids(given.documents, Path(config.resolve(config.output_uri))),
        )
    finally:
        ray.shutdown()  # before its cluster goes, else the driver waits for it for minutes
        ray.shutdown()  # first: a driver whose cluster goes away is ended by Ray without a word
        stop_local(folder)


def kept_ids(documents: Path, corpus: Path) -> Iterator[str]:
    """The id of the first document with each kept text; CHANGED where cleaning has changed it."""
    ids: dict[str, str] = {}
    for path in sorted(documents.glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            ids.setdefault(row["text"], row["id"])
    for split in SPLITS:
        for file in sorted((corpus / split).glob("*.parquet")):
            yield from (ids.get(text, CHANGED) for text in pq.read_table(file, columns=["text"])["text"].to_pylist())


if __name__ == "__main__":
    main()
