"""Tokenizer and packing stages: how Ray trains the tokenizer and packs the corpus.

The tokenizer is trained by one Ray task; packing is a task for each corpus file, whose tails the driver joins, so
that a split loses fewer than T tokens, counted.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from app import cluster, storage
from app.artifacts import Manifest, clear, find_complete, folder_input, publish, read_manifest
from app.documents import Document, read_file, take_in_turn
from app.records import SPLITS, TOKEN_BLOCK
from app.tokens import packing, tokenizer
from app.tokens.config import PackConfig, TokenizerConfig

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 2_000_000  # of text encoded at a time, whether reviews or books


def run_tokenizer(config: TokenizerConfig) -> Manifest:
    """Make the tokenizer artifact from the train split. Raises ValueError when the corpus is not there."""
    uri = config.resolve(config.output_uri)
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    draft = Manifest.draft("tokenizer", uri, config, {"corpus": corpus.as_input()})
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    figures = ray.get(ray.remote(_train_tokenizer).remote(corpus.uri, uri, config))
    if figures["vocab_size"] < config.vocab_size:
        logger.warning("the corpus gives %d tokens, fewer than vocab_size", figures["vocab_size"])
    return publish(draft, figures)


def _train_tokenizer(corpus_uri: str, uri: str, config: TokenizerConfig) -> dict[str, Any]:
    trained = tokenizer.train(_training_texts(corpus_uri, config), config.vocab_size, config.min_frequency)
    num_bytes = num_tokens = 0
    for texts in _batches(take_in_turn(corpus_uri, "held_out")):
        num_bytes += sum(len(text.encode()) for text in texts)
        num_tokens += sum(len(encoding.ids) for encoding in trained.encode_batch(texts, add_special_tokens=False))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(trained, Path(folder))
        storage.upload(Path(folder), uri)
    figures: dict[str, Any] = {"vocab_size": trained.get_vocab_size()}
    return figures | ({"held_out_bytes_per_token": round(num_bytes / num_tokens, 4)} if num_tokens else {})


def _training_texts(corpus_uri: str, config: TokenizerConfig) -> Iterator[str]:
    left = config.max_training_bytes
    for document in take_in_turn(corpus_uri, "train"):
        left -= len(document.text.encode())
        if left < 0:
            return
        yield document.text


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    yield texts


def run(config: PackConfig) -> Manifest:
    """Make the tokens artifact from corpus and tokenizer.

    Raises ValueError when the corpus fills no block, or the tokenizer has nothing to put between documents.
    """
    uri = config.resolve(config.output_uri)
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    vocabulary = folder_input(config.resolve(config.tokenizer_uri), ("tokenizer", "model"), "tokenizer.json")
    draft = Manifest.draft("tokens", uri, config, {"corpus": corpus.as_input(), "tokenizer": vocabulary})
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    with storage.local_copy(vocabulary.uri) as folder:
        encoder = tokenizer.load(folder)
        tokenizer.end_of_text_id(folder, encoder)  # without one it is an error now, not in the middle of the work
    cluster.connect()
    figures = {split: _pack_split(split, corpus, vocabulary.uri, config) for split in SPLITS}
    if not figures["train"]["blocks"]:
        raise ValueError(f"{corpus.uri}: the train split has fewer than block_tokens={config.block_tokens} tokens")
    return publish(draft, {"vocab_size": encoder.get_vocab_size(), **figures})


def _pack_split(split: str, corpus: Manifest, tokenizer_uri: str, config: PackConfig) -> dict[str, int]:
    pack = ray.remote(pack_file)
    uris = storage.list_files(f"{corpus.uri}/{split}", ".parquet")
    output_uri = f"{config.resolve(config.output_uri)}/{split}"
    upsampling = corpus.figures.get("upsampling", {}) if split == "train" else {}
    pending = [
        pack.remote((uri, f"{output_uri}/part-{index:05d}.parquet"), tokenizer_uri, config.block_tokens, upsampling)
        for index, uri in enumerate(uris)
    ]
    totals = dict.fromkeys(("documents", "bytes", "tokens", "blocks"), 0)
    tails = []
    for index, reference in enumerate(pending):
        counts, tail = ray.get(reference)
        totals = {name: total + counts[name] for name, total in totals.items()}
        tails.append(tail)
        logger.info("%s: %d of %d files packed, %d blocks", split, index + 1, len(pending), totals["blocks"])
    with _BlockFile(f"{output_uri}/part-{len(uris):05d}.parquet", config.block_tokens) as blocks:
        blocks.add(packing.join(tails))
    totals["blocks"] += blocks.num_blocks
    totals["tail_tokens"] = len(blocks.tail.input_ids)
    assert totals["tokens"] == totals["blocks"] * config.block_tokens + totals["tail_tokens"], totals
    return totals


def pack_file(
    uris: tuple[str, str], tokenizer_uri: str, block_tokens: int, upsampling: Mapping[str, float]
) -> tuple[dict[str, int], packing.Stream]:
    """Pack a corpus file into a file of blocks (its two URIs); counts, and the tail that filled no block.

    Documents of upsampled sources come once in each pass over the file, so that copies lie far apart.
    """
    with storage.local_copy(tokenizer_uri) as folder:
        encoder = tokenizer.load(folder)
        end_of_text = tokenizer.end_of_text_id(folder, encoder)
    counts = {"documents": 0, "bytes": 0, "tokens": 0}
    with _BlockFile(uris[1], block_tokens) as blocks:
        for texts in _batches(_passes(uris[0], upsampling)):
            encodings = encoder.encode_batch(texts, add_special_tokens=False)
            stream = packing.concatenate_documents([encoding.ids for encoding in encodings], end_of_text)
            blocks.add(stream)
            counts["documents"] += len(texts)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            counts["tokens"] += len(stream.input_ids)
    return {**counts, "blocks": blocks.num_blocks}, blocks.tail


def _passes(uri: str, upsampling: Mapping[str, float]) -> Iterator[Document]:
    for number in range(math.ceil(max(upsampling.values(), default=1.0))):
        for document in read_file(uri):
            if packing.num_copies(document.id, upsampling.get(document.source, 1.0)) > number:
                yield document


class _BlockFile:
    """A parquet file of token blocks, written as they fill; without any there is no file."""

    def __init__(self, uri: str, block_tokens: int) -> None:
        self.uri, self.block_tokens = uri, block_tokens
        self.num_blocks, self.tail = 0, packing.Stream()
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, stream: packing.Stream) -> None:
        """Append tokens; those that fill no block wait in `tail`."""
        blocks, starts, self.tail = packing.cut_blocks(packing.join([self.tail, stream]), self.block_tokens)
        if not len(blocks):
            return
        if self._writer is None:
            target = self._open.enter_context(storage.open_file(self.uri, "wb"))
            self._writer = self._open.enter_context(pq.ParquetWriter(target, TOKEN_BLOCK, compression="zstd"))
        self._writer.write_table(
            pa.Table.from_pydict({"input_ids": list(blocks), "document_starts": starts}, TOKEN_BLOCK)
        )
        self.num_blocks += len(blocks)
