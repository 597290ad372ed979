"""Augmentation stage: documents of a corpus to variants of them, as a source that names each variant's parent.

A pool of Ray Data actors takes shards of some hundred documents; each writes one part-*.jsonl and then its counts under
done/. A restart of the same work skips the shards that are counted. Variants depend on the document and the seed only.
It does not clean or deduplicate variants: they are raw documents for prepare_corpus (format jsonl).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import ray

from app import cluster, storage
from app.artifacts import Input, Manifest, clear, find_complete, publish, raw_inputs, read_manifest
from app.augmentation.config import AugmentConfig, Method
from app.augmentation.diversity import diversity_figures
from app.augmentation.similarity import SimilarityFloor
from app.augmentation.synonyms import SynonymReplacer, read_lexicon
from app.augmentation.translation import (
    EndpointTranslator,
    LocalTranslator,
    Translation,
    check_marian,
    translate_in_passages,
)

logger = logging.getLogger(__name__)

PLAN_NAME = "plan.json"  # of which work the shards under done/ are
REPEATED = "repeated"  # the same text was made of this parent before
SAMPLE_CHARACTERS = 10_000  # of a text, for the diversity figures


class Parent(NamedTuple):
    """A document to make variants of."""

    id: str
    text: str


@dataclass(frozen=True)
class Shard:
    """Rows start ≤ row < stop of one corpus file, and the name of what is made of them."""

    name: str
    uri: str
    start: int
    stop: int


@dataclass(frozen=True)
class Work:
    """What every actor is told. The key travels here and is written nowhere."""

    config: AugmentConfig
    api_key: str = field(repr=False)
    sampled_share: float  # of the documents, whose texts go into the diversity figures


def run(config: AugmentConfig) -> Manifest:
    """Make the augmented artifact. Raises ValueError when an input is missing or no variant is left."""
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    uri = config.resolve(config.output_uri)
    draft = Manifest.draft("augmented", uri, config, {"corpus": corpus.as_input(), **_read_inputs(config)})
    if done := find_complete(draft, config.overwrite):
        return done
    shards = plan_shards(corpus.uri, config)
    num_documents = sum(shard.stop - shard.start for shard in shards)
    work = Work(config, read_key(config), min(1.0, 2 * config.diversity.num_documents / num_documents))
    keep_or_clear(draft)
    already = set(storage.list_files(f"{uri}/done"))  # one request, however many shards
    pending = [shard for shard in shards if _done_uri(uri, shard.name) not in already]
    logger.info("%d of %d shards to do, %d documents in all", len(pending), len(shards), num_documents)
    if pending:
        cluster.connect()
        _augment(pending, work)
    figures = summarize([_read_done(uri, shard.name) for shard in shards], config)
    return publish(draft, figures)


def _augment(pending: list[Shard], work: Work) -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    uses_gpu = "local_translation" in work.config.methods and cluster.has_gpu()
    made = ray.data.from_items([asdict(shard) for shard in pending], override_num_blocks=len(pending)).map_batches(
        Augmenter,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(work.config.num_actors, len(pending))),
        fn_constructor_args=(work,),
        num_cpus=1,
        num_gpus=1 if uses_gpu else 0,
    )
    num_written = 0
    for num_shards, row in enumerate(made.iter_rows(), 1):
        num_written += int(row["written"])
        logger.info("%d of %d shards augmented, %d variants written", num_shards, len(pending), num_written)


def read_key(config: AugmentConfig) -> str:
    """The endpoint's key from the environment of the job. Raises ValueError when the variable is not set."""
    name = config.endpoint_translation.api_key_variable
    if "endpoint_translation" not in config.methods or not name:
        return ""
    if not os.environ.get(name):
        raise ValueError(f"endpoint_translation.api_key_variable: {name} is not set in the environment of this job")
    return os.environ[name]


def _read_inputs(config: AugmentConfig) -> dict[str, Input]:
    files = []
    for method, uris in config.inputs().items():
        for uri in uris:
            found = storage.list_files(uri)
            if not found:
                raise ValueError(f"{method}: no file at {uri}; check the URIs of this section")
            files += found
            _check(method, uri, found)
    return raw_inputs(files)


def _check(method: Method, uri: str, files: list[str]) -> None:
    """Find a wrong lexicon or model here: an actor that fails to start says less, and later."""
    if method == "local_translation":
        check_marian(uri, {name.rsplit("/", 1)[-1] for name in files})
        return
    try:
        with storage.open_file(uri, "r", encoding="utf-8") as lines:
            read_lexicon(lines)
    except ValueError as error:  # another layout, or not UTF-8
        raise ValueError(f"synonyms.lexicon_uri: {uri}: {error}") from None


def plan_shards(corpus_uri: str, config: AugmentConfig) -> list[Shard]:
    """The train split in shards of at most shard_documents rows. Raises ValueError when there is no document."""
    shards = []
    for index, uri in enumerate(storage.list_files(f"{corpus_uri}/train", ".parquet")):
        with storage.open_file(uri) as file:
            num_rows = pq.ParquetFile(file).metadata.num_rows
        for number, start in enumerate(range(0, num_rows, config.shard_documents)):
            stop = min(num_rows, start + config.shard_documents)
            shards.append(Shard(f"part-{index:05d}-{number:05d}", uri, start, stop))
    if not shards:
        raise ValueError(f"{corpus_uri}/train: no documents to augment")
    return shards


def keep_or_clear(draft: Manifest) -> None:
    """Leave the shards of an interrupted run of this very work; remove those of any other."""
    content = draft.model_dump(mode="json", include={"config", "inputs"})
    for where_not_what in ("storage_uri", "overwrite", "num_actors"):
        content["config"].pop(where_not_what)
    plan = json.dumps(content, sort_keys=True).encode()
    path = f"{draft.uri}/{PLAN_NAME}"
    if storage.exists(path):
        with storage.open_file(path) as file:
            if file.read() == plan:
                storage.delete_partial(draft.uri)
                return
    clear(draft.uri)
    storage.write_atomic(path, plan)


def _done_uri(uri: str, name: str) -> str:
    return f"{uri}/done/{name}.json"


def _read_done(uri: str, name: str) -> dict[str, Any]:
    with storage.open_file(_done_uri(uri, name)) as file:
        content: dict[str, Any] = json.loads(file.read())
    return content


class Augmenter:
    """The Ray Data actor: it loads what its methods need once, then makes shard after shard."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._floor = SimilarityFloor(work.config.min_similarity)
        self._methods = {method: _load(method, work) for method in work.config.methods}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of a batch of their fields; the number of variants written of each."""
        names = ("name", "uri", "start", "stop")
        rows = zip(*(batch[name].tolist() for name in names), strict=True)
        return {"written": np.array([self.make(Shard(*row)) for row in rows], dtype=np.int64)}

    def make(self, shard: Shard) -> int:
        """Write the shard's variants, then its counts: the second says that the first is whole."""
        config = self._work.config
        parents = [one for one in read_parents(shard) if rank(one.id, config.seed) < config.document_fraction]
        counts = Counter({"documents": len(parents)})
        families: dict[str, list[str]] = {parent.id: [] for parent in parents}
        lines = []
        for method, make_variants in self._methods.items():
            for row in self._kept(parents, make_variants(parents), method, counts):
                if row["text"] in families[row["parent_id"]]:
                    counts[f"dropped {method} {REPEATED}"] += 1
                    continue
                counts[f"written {method}"] += 1
                families[row["parent_id"]].append(row["text"])
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        sample = [
            (rank(one.id, config.seed), one.text[:SAMPLE_CHARACTERS], [v[:SAMPLE_CHARACTERS] for v in families[one.id]])
            for one in parents
            if rank(one.id, config.seed) < self._work.sampled_share
        ]
        uri = config.resolve(config.output_uri)
        storage.write_atomic(f"{uri}/{shard.name}.jsonl", "".join(lines).encode())
        done = json.dumps({"counts": counts, "sample": sample}, ensure_ascii=False)
        storage.write_atomic(_done_uri(uri, shard.name), done.encode())
        return len(lines)

    def _kept(
        self, parents: list[Parent], variants: list[tuple[int, Translation]], method: Method, counts: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        counts[f"tried {method}"] += len(variants)
        counts.update(f"dropped {method} {one.failure}" for _, one in variants if one.failure)
        made = [(parents[index], one.text) for index, one in variants if not one.failure]
        verdicts = self._floor.judge([parent.text for parent, _ in made], [text for _, text in made])
        for (parent, text), (similarity, reason) in zip(made, verdicts, strict=True):
            if reason:
                counts[f"dropped {method} {reason}"] += 1
            else:
                yield {"text": text, "parent_id": parent.id, "method": method, "similarity": similarity}


def read_parents(shard: Shard) -> Iterator[Parent]:
    """The documents of a shard, in order; what lies before them in the file is skipped without being decoded."""
    position = 0
    with storage.open_file(shard.uri) as file:
        for rows in pq.ParquetFile(file).iter_batches(batch_size=shard.stop - shard.start, columns=["id", "text"]):
            wanted = rows.slice(max(0, shard.start - position), max(0, shard.stop - max(position, shard.start)))
            position += rows.num_rows
            if position > shard.start:
                yield from map(Parent, wanted.column("id").to_pylist(), wanted.column("text").to_pylist())
            if position >= shard.stop:
                return


def rank(identity: str, seed: int) -> float:
    """A number from 0 to 1 that the id and the seed decide: documents are chosen by it."""
    return int(hashlib.sha256(f"{seed}:{identity}".encode()).hexdigest()[:13], 16) / 16**13


def _load(method: Method, work: Work) -> Callable[[list[Parent]], list[tuple[int, Translation]]]:
    """What makes variants: (index of the parent, the variant or why there is none)."""
    config = work.config
    if method == "synonyms":
        (uri,) = config.inputs()[method]
        with storage.open_file(uri, "r", encoding="utf-8") as lines:
            replacer = SynonymReplacer(lines, config.synonyms)
        return lambda parents: [
            (index, Translation(replacer.replace(parent.text, f"{config.seed}:{parent.id}:{number}")))
            for index, parent in enumerate(parents)
            for number in range(config.variants_per_method)
        ]
    if method == "local_translation":
        to_english, to_chinese = config.inputs()[method]
        with storage.local_copy(to_english) as english_dir, storage.local_copy(to_chinese) as chinese_dir:
            translate = LocalTranslator(english_dir, chinese_dir, config.local_translation).back_translate
    else:
        translate = EndpointTranslator(config.endpoint_translation, work.api_key).back_translate
    return lambda parents: list(
        enumerate(translate_in_passages([one.text for one in parents], config.passage_characters, translate))
    )


def summarize(shards: list[dict[str, Any]], config: AugmentConfig) -> dict[str, Any]:
    """The figures of the manifest. Raises ValueError when no variant is left."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard["counts"])
    by_reason: Counter[str] = Counter()
    by_method: Counter[str] = Counter()
    for name, number in sorted(counts.items()):
        outcome, method, reason = [*name.split(" "), "", ""][:3]
        if method:
            by_method[f"{method}.{outcome}"] += number
        if reason:
            by_reason[reason] += number
    totals = {word: sum(by_method[f"{method}.{word}"] for method in config.methods) for word in ("tried", "written")}
    dropped = by_reason.total()
    assert totals["written"] + dropped == totals["tried"], (counts, "a variant was lost")
    if not totals["written"]:
        raise ValueError(f"no variant left of {totals['tried']} tried (dropped: {dict(by_reason) or 'none'})")
    ranked = (row for shard in shards for row in shard["sample"])
    families = [(text, variants) for _, text, variants in heapq.nsmallest(config.diversity.num_documents, ranked)]
    diversity = diversity_figures(families, config.diversity)
    logger.info("diversity: %s", diversity)
    return {
        "documents": counts["documents"],
        **totals,
        "dropped": dropped,
        "by_reason": dict(by_reason),
        "by_method": dict(by_method),
        "diversity": diversity,
    }
