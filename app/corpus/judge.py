"""What happens to the records of one shard: normalised, judged, freed of personal data, fingerprinted.

`judge_shard` turns raw records into a file of judged documents; `strip_shard` takes lines that are boilerplate out of
one. Batches bound the memory, whatever the shard. It starts nothing in parallel; stage.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from app.corpus.config import CorpusConfig, NormalizeConfig, RulesConfig
from app.corpus.decontaminate import CONTAMINATED, EvaluationItems
from app.corpus.dedup import Keys, document_id, drop_lines, line_hashes
from app.corpus.normalize import build_normalizer
from app.corpus.readers import read_records
from app.corpus.rules import Rule, build_rules, first_reason
from app.corpus.shards import (
    BATCH_DOCUMENTS,
    JUDGED,
    Counts,
    Work,
    fingerprints,
    open_writer,
    read_judged,
)
from app.corpus.sources import EXCERPT_CHARACTERS, Record
from app.privacy import mask_pii

PERSONAL_DATA = "personal_data"
BATCH_CHARACTERS = 4_000_000


def judge_shard(work: Work, config: CorpusConfig, items: EvaluationItems) -> Counts:
    """Judge the records of a shard. Raises ValueError naming its file when it is damaged."""
    counts = Counts()
    with open_writer(work.judged_uri, JUDGED, counts) as writer:
        for records in _batches(read_records(work.shard, config.max_line_bytes), counts):
            writer.write_table(judge(records, config, work.shard.file.source, items, counts))
    return counts


def _batches(records: Iterator[Record], counts: Counts) -> Iterator[list[Record]]:
    while True:
        batch: list[Record] = []
        characters = 0
        with counts.timed("read"):
            for record in records:
                batch.append(record)
                characters += len(record.text)
                if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
                    break
        if not batch:
            return
        counts.counters["raw"] += len(batch)
        counts.counters["raw_characters"] += characters
        yield batch


def judge(
    records: Sequence[Record], config: CorpusConfig, source: str, items: EvaluationItems, counts: Counts
) -> pa.Table:
    """The records as rows of JUDGED; `rule` is "" for those that are clean so far."""
    readable = [record.reason is None for record in records]
    with counts.timed("normalize"):
        normalize = _normalizer(config.normalize.model_dump_json())
        texts = [normalize(one.text) if fine else one.text for one, fine in zip(records, readable, strict=True)]
    with counts.timed("rules"):
        rules = _rules(rules_of(config, source).model_dump_json())
        reasons = [one.reason or first_reason(rules, text) or "" for one, text in zip(records, texts, strict=True)]
    counts.counters.update(f"source.{source}.raw" for _ in records)
    details = [""] * len(records)
    with counts.timed("decontaminate"):
        clean = [index for index, reason in enumerate(reasons) if not reason]
        found = items.find([texts[index] for index in clean], config.decontamination.max_overlap)
        for index, item in zip(clean, found, strict=True):
            if item:
                reasons[index], details[index] = CONTAMINATED, item
    with counts.timed("personal_data"):
        _free_of_personal_data(texts, reasons, details, config, counts)
    with counts.timed("hash"):
        ids = [document_id(text) for text in texts]
    with counts.timed("describe"):
        described = [index for index, fine in enumerate(readable) if fine]
        counts.describe("before", [texts[index] for index in described], [ids[index] for index in described])
    rows: dict[str, list[Any]] = {
        "id": ids,
        "rule": reasons,
        "detail": details,
        "position": [record.position for record in records],
    }
    rows["excerpt"] = [text[:EXCERPT_CHARACTERS] if rule else "" for text, rule in zip(texts, reasons, strict=True)]
    rows["text"] = ["" if rule else text for text, rule in zip(texts, reasons, strict=True)]
    clean = [index for index, rule in enumerate(reasons) if not rule]
    counts.counters["clean_so_far"] += len(clean)
    counts.counters["clean_characters"] += sum(len(texts[index]) for index in clean)
    with counts.timed("fingerprint"):
        return _with_bands(rows, config)


def _free_of_personal_data(
    texts: list[str], reasons: list[str], details: list[str], config: CorpusConfig, counts: Counts
) -> None:
    if config.pii.action == "keep":
        return
    for index, text in enumerate(texts):
        if reasons[index]:  # nobody reads more of it than the excerpt
            texts[index] = mask_pii(text[:EXCERPT_CHARACTERS], config.pii.kinds)[0]
            continue
        masked, found = mask_pii(text, config.pii.kinds)
        if found:
            counts.counters.update({f"personal_data.{kind}": number for kind, number in found.items()})
            texts[index] = masked
            if config.pii.action == "drop":
                reasons[index], details[index] = PERSONAL_DATA, ", ".join(sorted(found))


def _with_bands(rows: dict[str, list[Any]], config: CorpusConfig) -> pa.Table:
    rows["bands"] = [[]] * len(rows["id"])
    if config.dedup.near and config.dedup.max_line_documents is None:
        clean = [index for index, rule in enumerate(rows["rule"]) if not rule]
        keys = fingerprints([rows["text"][index] for index in clean], config)
        for index, bands in zip(clean, keys, strict=True):
            rows["bands"][index] = bands
    return pa.table(rows, JUDGED)


def count_lines(uri: str, config: CorpusConfig) -> Keys:
    """Hashes of the lines of a shard's clean documents, each once a document."""
    found = [np.empty(0, np.uint64)]
    for table in read_judged(uri, ["text"]):
        found += [line_hashes(text, config.dedup.min_line_characters) for text in table["text"].to_pylist()]
    return np.concatenate(found)


def strip_shard(work: Work, output_uri: str, config: CorpusConfig, boilerplate: Keys) -> Counts:
    """Take the boilerplate lines out of a shard's judged documents, ask the rules again, add fingerprints."""
    counts = Counts()
    without_lines = config.model_copy(update={"dedup": config.dedup.model_copy(update={"max_line_documents": None})})
    rules = _rules(rules_of(config, work.shard.file.source).model_dump_json())
    with open_writer(output_uri, JUDGED, counts) as writer, counts.timed("boilerplate"):
        for table in read_judged(work.judged_uri, JUDGED.names):
            rows = table.to_pydict()
            for index, text in enumerate(rows["text"]):
                stripped = drop_lines(text, boilerplate, config.dedup.min_line_characters)
                if stripped != text:
                    counts.counters["boilerplate_characters"] += len(text) - len(stripped)
                    reason = first_reason(rules, stripped) or ""
                    rows["rule"][index], rows["id"][index] = reason, document_id(stripped)
                    rows["excerpt"][index] = stripped[:EXCERPT_CHARACTERS] if reason else ""
                    rows["text"][index] = "" if reason else stripped
            writer.write_table(_with_bands(rows, without_lines))
    return counts


def rules_of(config: CorpusConfig, source: str) -> RulesConfig:
    """The rules for documents of a source, with full URIs."""
    (settings,) = (one for one in config.sources if one.name == source)
    bounds = config.rules_of(settings)
    words = [config.resolve(uri) for uri in bounds.sensitive_word_uris]
    reference = bounds.perplexity_reference_uri and config.resolve(bounds.perplexity_reference_uri)
    return bounds.model_copy(update={"sensitive_word_uris": words, "perplexity_reference_uri": reference})


@lru_cache(maxsize=16)
def _rules(bounds: str) -> list[Rule]:
    return build_rules(RulesConfig.model_validate_json(bounds))


@lru_cache(maxsize=4)
def _normalizer(settings: str) -> Any:
    return build_normalizer(NormalizeConfig.model_validate_json(settings))
