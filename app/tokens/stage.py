"""Tokenizer and packing stages: how Ray trains the tokenizer and packs the corpus.

The tokenizer is trained by one Ray task; packing is a task for each corpus file, whose tails the driver joins, so
that a split loses fewer than T tokens, counted.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from app import cluster, storage
from app.artifacts import Manifest, clear, find_complete, publish, read_manifest
from app.models import END_OF_TEXT
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
    for texts in _batches(corpus_uri, "held_out"):
        num_bytes += sum(len(text.encode()) for text in texts)
        num_tokens += sum(len(encoding.ids) for encoding in trained.encode_batch(texts, add_special_tokens=False))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(trained, Path(folder))
        storage.upload(Path(folder), uri)
    figures: dict[str, Any] = {"vocab_size": trained.get_vocab_size()}
    return figures | ({"held_out_bytes_per_token": round(num_bytes / num_tokens, 4)} if num_tokens else {})


def _training_texts(corpus_uri: str, config: TokenizerConfig) -> Iterator[str]:
    left = config.max_training_bytes
    for texts in _batches(corpus_uri, "train"):
        for text in texts:
            left -= len(text.encode())
            if left < 0:
                return
            yield text


def _batches(corpus_uri: str, split: str) -> Iterator[list[str]]:
    for uri in storage.list_files(f"{corpus_uri}/{split}", ".parquet"):
        yield from _file_batches(uri)


def _file_batches(uri: str) -> Iterator[list[str]]:
    with storage.open_file(uri) as file:
        texts: list[str] = []
        characters = 0
        for rows in pq.ParquetFile(file).iter_batches(batch_size=100, columns=["text"]):
            for text in rows.column(0).to_pylist():
                texts.append(text)
                characters += len(text)
                if characters >= BATCH_CHARACTERS:
                    yield texts
                    texts, characters = [], 0
        yield texts


def run(config: PackConfig) -> Manifest:
    """Make the tokens artifact from corpus and tokenizer. Raises ValueError when the corpus fills no block."""
    uri = config.resolve(config.output_uri)
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    vocabulary = read_manifest(config.resolve(config.tokenizer_uri), "tokenizer")
    inputs = {"corpus": corpus.as_input(), "tokenizer": vocabulary.as_input()}
    draft = Manifest.draft("tokens", uri, config, inputs)
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    figures = {split: _pack_split(split, corpus.uri, vocabulary.uri, config) for split in SPLITS}
    if not figures["train"]["blocks"]:
        raise ValueError(f"{corpus.uri}: the train split has fewer than block_tokens={config.block_tokens} tokens")
    return publish(draft, {"vocab_size": vocabulary.figures["vocab_size"], **figures})


def _pack_split(split: str, corpus_uri: str, tokenizer_uri: str, config: PackConfig) -> dict[str, int]:
    pack = ray.remote(pack_file)
    uris = storage.list_files(f"{corpus_uri}/{split}", ".parquet")
    output_uri = f"{config.resolve(config.output_uri)}/{split}"
    pending = [
        pack.remote(uri, f"{output_uri}/part-{index:05d}.parquet", tokenizer_uri, config.block_tokens)
        for index, uri in enumerate(uris)
    ]
    totals = dict.fromkeys(("documents", "bytes", "tokens", "blocks"), 0)
    tails = []
    for index, reference in enumerate(pending):
        counts, tail = ray.get(reference)
        totals = {name: total + counts[name] for name, total in totals.items()}
        tails.append(tail)
        logger.info("%s: %d of %d files packed, %d blocks", split, index + 1, len(pending), totals["blocks"])
    num_blocks, tail = _write_blocks(
        packing.join(tails), f"{output_uri}/part-{len(uris):05d}.parquet", config.block_tokens
    )
    totals["blocks"] += num_blocks
    totals["tail_tokens"] = len(tail.input_ids)
    assert totals["tokens"] == totals["blocks"] * config.block_tokens + totals["tail_tokens"], totals
    return totals


def pack_file(
    uri: str, output_uri: str, tokenizer_uri: str, block_tokens: int
) -> tuple[dict[str, int], packing.Stream]:
    """Pack one corpus file into one file of blocks; counts, and the tail that filled no block."""
    with storage.local_copy(tokenizer_uri) as folder:
        encoder = tokenizer.load(folder)
    end_of_text = encoder.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, f"{tokenizer_uri} has no {END_OF_TEXT}"
    counts = {"documents": 0, "bytes": 0}
    streams = []
    for texts in _file_batches(uri):
        encodings = encoder.encode_batch(texts, add_special_tokens=False)
        streams.append(packing.concatenate_documents([encoding.ids for encoding in encodings], end_of_text))
        counts["documents"] += len(texts)
        counts["bytes"] += sum(len(text.encode()) for text in texts)
    stream = packing.join(streams)
    num_blocks, tail = _write_blocks(stream, output_uri, block_tokens)
    return {**counts, "tokens": len(stream.input_ids), "blocks": num_blocks}, tail


def _write_blocks(stream: packing.Stream, uri: str, block_tokens: int) -> tuple[int, packing.Stream]:
    blocks, starts, tail = packing.cut_blocks(stream, block_tokens)
    if len(blocks):
        table = pa.Table.from_pydict({"input_ids": list(blocks), "document_starts": starts}, TOKEN_BLOCK)
        with storage.open_file(uri, "wb") as target:
            pq.write_table(table, target, compression="zstd")
    return len(blocks), tail
