"""Corpus stage: raw files to clean, held-out and rejected documents, shard by shard over Ray.

Ray tasks judge and write a shard each, into files of its own, so that only counts travel (Ray Data would add 3.4 s of
start to do the same); in between, hashes (never texts, save the shingles of candidates) meet by partition and say which
documents are duplicates. What is judged stays in a work folder until the manifest is there: an interrupted run goes on
with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray

from app import cluster, storage
from app.artifacts import EVALUATION, Input, Manifest, find_complete, publish, raw_inputs, read_manifest
from app.corpus import dedup, judge, outputs, partitions, report
from app.corpus.config import CorpusConfig
from app.corpus.decontaminate import EvaluationItems, load_items
from app.corpus.dedup import Keys
from app.corpus.outputs import Duplicates
from app.corpus.partitions import Layout
from app.corpus.rules import build_rules
from app.corpus.shards import Counts, Work, read_counts
from app.corpus.sources import RawFile, Shard, find_files, find_shards
from app.records import SPLITS

logger = logging.getLogger(__name__)

DOCUMENTS_A_PARTITION = 34_000  # of 21 buckets of 16 bytes each: sorting them stays below what a worker's imports take
CHARACTERS_A_PARTITION = 16 << 20  # of 8 bytes a shingle, should all be candidates
MAX_PARTITIONS = 1024  # they exchange their square in objects
REPORT_SECONDS = 10


def run(config: CorpusConfig) -> Manifest:
    """Make the corpus artifact. Raises ValueError for missing or damaged files and when no document is left."""
    uri = config.resolve(config.output_uri)
    files = find_files(config)
    evaluation_uris = [config.resolve(one) for one in config.decontamination.uris]
    evaluation_files = [file for one in evaluation_uris for file in storage.list_files(one)]
    rule_files = _rule_files(config)
    inputs = raw_inputs([*(file.uri for file in files), *rule_files])
    inputs |= {f"{EVALUATION} {uri}": found for uri, found in raw_inputs(evaluation_files).items()}
    seen = read_manifest(config.resolve(config.dedup.index_uri), "corpus") if config.dedup.index_uri else None
    draft = Manifest.draft("corpus", uri, config, inputs | ({"index": seen.as_input()} if seen else {}))
    if done := find_complete(draft, config.overwrite):
        return done
    items = load_items(evaluation_uris, config.decontamination.ngram_characters)
    cluster.connect()
    seen_works = _seen_works(seen)
    files = [replace(file, index=file.index + len(seen_works)) for file in files]  # what was seen comes first
    works = _plan_works(find_shards(files, config.shard_bytes), config, inputs, rule_files)
    total = Counts()
    with _phase(total, "judging", f"{len(files)} files in {len(works)} shards"):
        total.add(_map(works, _judging(config, items)))
    if config.dedup.max_line_documents is not None:
        with _phase(total, "boilerplate", f"lines found in {config.dedup.max_line_documents} documents or more"):
            works = _strip_boilerplate(works, config, total)
    documents, characters = total.counters["clean_so_far"], total.counters["clean_characters"]
    for split in (seen.figures[split] for split in SPLITS) if seen else ():
        assert isinstance(split, dict)
        documents, characters = documents + int(split["documents"]), characters + int(split["bytes"]) // 3
    layout = Layout.of([*seen_works, *works], _num_partitions(config, documents, characters))
    name = _digest([layout.num_blocks, [work.judged_uri for work in works], draft.config, [*draft.inputs.items()]])
    with _phase(total, "deduplication", f"{total.counters['clean_so_far']} documents"):
        _find_duplicates(layout, config, f"{uri}/work/duplicates-{name}")
    names = [work.judged_uri.rsplit("/", 1)[-1] for work in seen_works] + [
        file.uri.rsplit("/", 1)[-1] for file in files
    ]
    with _phase(total, "writing", uri):
        total.add(_map(works, _writing(config, layout, names, name)))
    figures = summarize(total, config)
    if config.decontamination.uris:
        figures |= {"evaluation_items": len(items.names), "evaluation_items_too_short": items.num_too_short}
    report.write(uri, figures, total)
    _clean_up(uri, works)
    return publish(draft, figures)


@contextmanager
def _phase(total: Counts, name: str, what: str) -> Iterator[None]:
    logger.info("%s: %s", name, what)
    start = time.perf_counter()
    yield
    total.wall_seconds[name] = time.perf_counter() - start


def _plan_works(
    shards: Sequence[Shard], config: CorpusConfig, inputs: dict[str, Input], rule_files: list[str]
) -> list[Work]:
    """The shards and where each is judged: a name made of all that its judged documents depend on."""
    folder = f"{config.resolve(config.output_uri)}/work"
    storage.delete_partial(folder)
    fields = {"normalize", "pii", "dedup", "decontamination", "max_line_bytes"}
    settings = config.model_dump(mode="json", include=fields)
    settings["evaluation"] = {name: found.digest for name, found in inputs.items() if name.startswith(EVALUATION)}
    settings["rule_files"] = [inputs[uri].digest for uri in rule_files]
    rules = {source.name: config.rules_of(source).model_dump(mode="json") for source in config.sources}
    works = []
    for index, shard in enumerate(shards):
        file = shard.file
        what = [file.uri, inputs[file.uri].digest, file.source, file.format, file.text_key, shard.start, shard.end]
        works.append(Work(shard, f"{folder}/judged-{_digest([what, settings, rules[file.source]])}.parquet", index))
    return works


def _rule_files(config: CorpusConfig) -> list[str]:
    bounds = [judge.rules_of(config, source.name) for source in config.sources]
    found = {uri for one in bounds for uri in (*one.sensitive_word_uris, one.perplexity_reference_uri) if uri}
    if missing := sorted(uri for uri in found if not storage.exists(uri)):
        raise ValueError(f"rules: no file at {', '.join(missing)}; check sensitive_word_uris, perplexity_reference_uri")
    for one in bounds:
        build_rules(one)  # a bad file or function is an error now, not in the middle of the work
    return sorted(found)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _seen_works(seen: Manifest | None) -> list[Work]:
    """The clean files of an earlier corpus, to compare with: nothing of them is written again."""
    names = (
        [name for name in sorted(seen.files) if name.startswith(tuple(f"{split}/" for split in SPLITS))] if seen else []
    )
    works = []
    for index, name in enumerate(names):
        assert seen is not None
        file = RawFile(index, f"{seen.uri}/{name}", "index", "parquet", "text")
        works.append(Work(Shard(file, 0, None), file.uri, index, is_seen=True))
    return works


def _judging(config: CorpusConfig, items: EvaluationItems) -> Callable[[Work], Counts]:
    return lambda work: read_counts(work.judged_uri) or judge.judge_shard(work, config, items)


def _writing(config: CorpusConfig, layout: Layout, names: list[str], run: str) -> Callable[[Work], Counts]:
    uri = config.resolve(config.output_uri)
    blocks = {work.index: index for index, block in enumerate(layout.blocks) for work in block if not work.is_seen}

    def write(work: Work) -> Counts:
        done = read_counts(f"{uri}/rejected/part-{work.index:05d}.parquet", run)
        if done is None:
            rows = _load(f"{uri}/work/duplicates-{run}-{blocks[work.index]:05d}.npy")
            done = outputs.write_shard(work, uri, config, Duplicates(rows, names), run)
        return done

    return write


def _map(works: Sequence[Work], function: Callable[[Work], Counts]) -> Counts:
    """The sum of what the function counts for each shard, in parallel. Raises ValueError naming all damaged files."""

    def count(work: Work) -> Counts | ValueError:
        try:
            return function(work)
        except ValueError as error:  # a result, so that the other shards are done and all damaged files are named
            return error

    total, errors = Counts(), set()
    reported = time.monotonic()
    for done, found in enumerate(cluster.map_tasks(count, works), start=1):
        if isinstance(found, ValueError):
            errors.add(str(found))
        else:
            total.add(found)
        if time.monotonic() - reported > REPORT_SECONDS or done == len(works):
            reported = time.monotonic()
            logger.info("%d of %d shards, %d documents", done, len(works), total.num_documents)
    if errors:
        raise ValueError("\n".join(sorted(errors)))
    return total


def _strip_boilerplate(works: list[Work], config: CorpusConfig, total: Counts) -> list[Work]:
    """Count lines over all documents, take the frequent ones out of every shard: the shards after that."""
    num_partitions = _num_partitions(config, total.counters["clean_so_far"], total.counters["clean_characters"])
    blocks = [list(block) for block in np.array_split(np.array(works, dtype=object), num_partitions)]
    min_count = config.dedup.max_line_documents or 0

    def split(block: list[Work]) -> list[Keys]:
        hashes = np.concatenate(
            [np.empty(0, np.uint64), *(judge.count_lines(work.judged_uri, config) for work in block)]
        )
        return dedup.split_rows(hashes, dedup.partition_of(hashes, num_partitions), num_partitions)

    def merge(parts: list[Keys]) -> Keys:
        return dedup.frequent(np.concatenate(parts), min_count)

    found = ray.get(cluster.exchange([(block,) for block in blocks], split, merge, num_partitions))
    lines = np.sort(np.concatenate(found))
    logger.info("%d lines are boilerplate", len(lines))
    folder = f"{config.resolve(config.output_uri)}/work"
    lines_uri = f"{folder}/boilerplate-{_digest(lines.tolist())}.npy"
    _save(lines_uri, lines)

    def strip(work: Work) -> Counts:
        source = works[work.index]
        return read_counts(work.judged_uri) or judge.strip_shard(source, work.judged_uri, config, _load(lines_uri))

    name = _digest(lines_uri)
    stripped = [
        replace(work, judged_uri=f"{work.judged_uri.removesuffix('.parquet')}-{name}.parquet") for work in works
    ]
    total.add(_map(stripped, strip))
    return stripped


def _num_partitions(config: CorpusConfig, documents: int, characters: int) -> int:
    needed = max(1, math.ceil(documents / DOCUMENTS_A_PARTITION), math.ceil(characters / CHARACTERS_A_PARTITION))
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return config.num_partitions or min(MAX_PARTITIONS, max(needed, min(cpus, documents // 20_000 + 1)))


def _find_duplicates(layout: Layout, config: CorpusConfig, prefix: str) -> None:
    """Write for each block the documents that fall: sorted rows (key, kept key, is near)."""
    uris = [f"{prefix}-{index:05d}.npy" for index in range(layout.num_blocks)]
    if all(storage.exists(uri) for uri in uris):
        return
    exact = cluster.exchange(
        [(block, layout) for block in layout.blocks],
        partitions.split_identities,
        lambda parts: dedup.exact_duplicates(np.concatenate(parts)),
        layout.num_partitions,
    )
    falling = [(rows, 0) for rows in exact]
    if config.dedup.near:
        fallen = cluster.exchange(
            [(rows, layout) for rows in exact], partitions.split_to_blocks, np.concatenate, layout.num_blocks
        )
        falling += [(rows, 1) for rows in _near_duplicates(layout, config, fallen)]

    def split(rows: Keys, is_near: int) -> list[Keys]:
        return layout.by_block(np.column_stack([rows, np.full(len(rows), is_near, np.uint64)]))

    def merge(parts: list[Keys], uri: str) -> int:
        _save(uri, dedup.distinct(np.concatenate(parts)))
        return 1

    ray.get(cluster.exchange(falling, split, merge, layout.num_blocks, uris))


def _near_duplicates(layout: Layout, config: CorpusConfig, fallen: Sequence[Any]) -> list[Any]:
    """References to rows (key, key of the first document of its cluster), by partition."""
    num_partitions = layout.num_partitions
    buckets = [(block, rows, layout, config) for block, rows in zip(layout.blocks, fallen, strict=True)]
    candidates = cluster.exchange(
        buckets, partitions.split_buckets, lambda parts: dedup.candidate_pairs(np.concatenate(parts)), num_partitions
    )
    pairs = cluster.exchange(
        [(rows, layout, 1) for rows in candidates], partitions.split_rows, partitions.join, num_partitions
    )
    needs = cluster.exchange(
        [(rows, index, layout) for index, rows in enumerate(pairs)],
        partitions.split_needs,
        partitions.join,
        layout.num_blocks,
    )
    wanted = [(block, rows, layout, config) for block, rows in zip(layout.blocks, needs, strict=True)]
    verify = partial(partitions.verify, min_similarity=config.dedup.min_similarity)
    return _clusters(cluster.exchange(wanted, partitions.split_shingles, verify, num_partitions, pairs), layout)


def _clusters(edges: list[Any], layout: Layout) -> list[Any]:
    """Large-star and small-star in turn until each document is tied to the first of its cluster."""
    before = None
    for round_number in range(64):
        now = np.sum([*cluster.map_tasks(partitions.checksum, edges)], axis=0).tolist()
        if now == before:
            logger.info("near-duplicates: %d documents fall, found in %d rounds", now[0], round_number)
            return edges
        before = now
        large = cluster.exchange(
            [(rows, layout) for rows in edges], partitions.split_both, partitions.large_star, layout.num_partitions
        )
        edges = cluster.exchange(
            [(rows, layout, 0) for rows in large], partitions.split_rows, partitions.small_star, layout.num_partitions
        )
    raise AssertionError("clusters of near-duplicates did not settle in 64 rounds")


def _save(uri: str, rows: Keys) -> None:
    with storage.open_atomic(uri) as target:
        np.save(target, rows, allow_pickle=False)


def _load(uri: str) -> Keys:
    with storage.open_file(uri) as file:
        rows: Keys = np.load(file, allow_pickle=False)
    return rows


def _clean_up(uri: str, works: Sequence[Work]) -> None:
    """Remove the work folder and what an earlier, interrupted run left."""
    storage.delete(f"{uri}/work")
    parts = {f"{name}/part-{work.index:05d}.parquet" for name in (*SPLITS, "rejected") for work in works}
    for name in set(storage.file_sizes(uri)) - parts - {"report.html", "report.json"}:
        storage.delete(f"{uri}/{name}")


def summarize(total: Counts, config: CorpusConfig) -> dict[str, Any]:
    """The figures of the manifest. Raises ValueError when no document is left to train on."""
    counters = total.counters
    rejected = {
        name.removeprefix("rejected."): counters[name] for name in sorted(counters) if name.startswith("rejected.")
    }
    splits = {split: {key: counters[f"{split}.{key}"] for key in ("documents", "bytes")} for split in SPLITS}
    num_clean = sum(split["documents"] for split in splits.values())
    num_rejected = sum(rejected.values())
    assert num_clean + num_rejected == counters["raw"], (counters, "a document was lost")
    if not splits["train"]["documents"]:
        names = ", ".join(source.name for source in config.sources)
        raise ValueError(f"sources {names}: no document left of {counters['raw']} (rejected: {rejected or 'none'})")
    figures = {"raw": counters["raw"], "clean": num_clean, "rejected": num_rejected, "by_rule": rejected, **splits}
    return figures | {"upsampling": _upsampling(counters, config)}


def _upsampling(counters: Counter[str], config: CorpusConfig) -> dict[str, float]:
    """How often each source's documents are packed; by weight, the least upsampled source counts once."""
    sizes = {source.name: counters[f"source.{source.name}.train_bytes"] for source in config.sources}
    factors = {
        source.name: source.weight / sizes[source.name] if source.weight and sizes[source.name] else source.upsampling
        for source in config.sources
    }
    least = min(factors.values()) if config.sources[0].weight is not None else 1.0
    return {name: round(factor / least, 4) for name, factor in factors.items()}
