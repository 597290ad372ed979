"""Conversation stages: Ray tasks render chunks of lines, the driver splits and packs them into token blocks.

The result is a tokens artifact with one more column, the tokens that are learned; pairs of answers are packed side by
side. All of it passes through the driver's memory: for some millions of conversations, not for a pretraining corpus.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app import cluster, storage
from app.artifacts import Input, Manifest, clear, find_complete, folder_input, publish, raw_inputs
from app.conversations import statistics
from app.conversations.config import CheckConversationsConfig, ConversationsConfig, PackConversationsConfig
from app.conversations.examples import Example, Rejected, is_held_out, read_example
from app.conversations.packing import Block, assign, fill
from app.conversations.rendering import load_chat_tokenizer
from app.records import CONVERSATION_BLOCK, SPLITS

logger = logging.getLogger(__name__)

CHUNK_LINES = 500  # rendered by one task
ROWS = 1024  # blocks written at a time

Chunk = tuple[int, list[str]]
Outcomes = list[Example | Rejected]


def run(config: PackConversationsConfig) -> Manifest:
    """Make the tokens artifact. Raises ValueError when sources or tokenizer are missing, or too much is malformed."""
    uri = config.resolve(config.output_uri)
    files = _files(config)
    tokenizer = _tokenizer(config)
    draft = Manifest.draft("tokens", uri, config, {"tokenizer": tokenizer, **raw_inputs(files)})
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    examples, rejected = _read(files, tokenizer.uri, config)
    with storage.local_copy(tokenizer.uri) as folder:
        chat = load_chat_tokenizer(folder)
    padding = chat.pad_token_id if chat.pad_token_id is not None else chat.eos_token_id
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        parts[SPLITS[is_held_out(example, config.held_out_fraction)]].append(example)
    if not parts["train"]:
        raise ValueError(f"{', '.join(files)}: nothing to train on is left; run check_conversations to see why")
    figures: dict[str, Any] = {"vocab_size": len(chat), "kind": "pairs" if examples[0].is_pair else "conversations"}
    figures["records"] = len(examples) + len(rejected)
    figures |= {"rejected": dict(Counter(one.reason for one in rejected))}
    for split, part in parts.items():
        figures[split] = _pack(part, f"{uri}/{split}/part-00000.parquet", config.block_tokens, padding)
        logger.info("%s: %d conversations in %d blocks", split, len(part), figures[split]["blocks"])
    return publish(draft, figures)


def check(config: CheckConversationsConfig) -> str:
    """Lengths, truncations, duplicates, personal data and renderings of what would be packed, as text."""
    files, tokenizer = _files(config), _tokenizer(config)
    cluster.connect()
    examples, rejected = _read(files, tokenizer.uri, config.with_overrides({"max_malformed_percent": 100}))
    with storage.local_copy(tokenizer.uri) as folder:
        chat = load_chat_tokenizer(folder)
    shown = [f"\n--- as the model reads it\n{statistics.show(one, chat)}" for one in examples[: config.examples]]
    return "\n".join([statistics.describe(examples, rejected, config.block_tokens), *shown])


def _files(config: ConversationsConfig) -> list[str]:
    files = []
    for uri in config.source_uris():
        found = storage.list_files(uri)
        if not found:
            raise ValueError(f"sources: {uri} does not exist; name jsonl files or a glob")
        files += found
    return files


def _tokenizer(config: ConversationsConfig) -> Input:
    return folder_input(config.resolve(config.tokenizer_uri), ("tokenizer", "model"), "tokenizer.json")


def _read(
    files: Sequence[str], tokenizer_uri: str, config: ConversationsConfig
) -> tuple[list[Example], list[Rejected]]:
    """All lines, in their order; of equal ones the first stays."""

    def render(chunk: Chunk) -> tuple[int, Outcomes]:
        return _render_chunk(chunk, tokenizer_uri, config)

    done: dict[int, Outcomes] = dict(cluster.map_tasks(render, list(_chunks(files))))
    examples: list[Example] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    for outcome in (one for index in sorted(done) for one in done[index]):
        if isinstance(outcome, Rejected):
            rejected.append(outcome)
        elif outcome.identity in seen:
            rejected.append(Rejected("duplicate"))
        else:
            seen.add(outcome.identity)
            examples.append(outcome)
    _refuse_what_does_not_fit(examples, rejected, files, config.max_malformed_percent)
    return examples, rejected


def _refuse_what_does_not_fit(
    examples: Sequence[Example], rejected: Sequence[Rejected], files: Sequence[str], max_percent: float
) -> None:
    malformed = [one.detail for one in rejected if one.reason == "malformed"]
    if len(malformed) * 100 > max_percent * (len(examples) + len(rejected)):
        (most, _), *_ = Counter(malformed).most_common(1)
        raise ValueError(
            f"{', '.join(files)}: {len(malformed)} of {len(examples) + len(rejected)} records cannot be used "
            f"(max_malformed_percent {max_percent:g}), most often: {most}"
        )
    if len({example.is_pair for example in examples}) > 1:
        raise ValueError(f"{', '.join(files)}: conversations and preference pairs; pack them one by one")


def _chunks(files: Sequence[str]) -> Iterator[Chunk]:
    index, lines = 0, list[str]()
    for uri in files:
        with storage.open_file(uri, "rt", encoding="utf-8", compression="infer") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                if len(lines) == CHUNK_LINES:
                    yield index, lines
                    index, lines = index + 1, []
    yield index, lines


def _render_chunk(chunk: Chunk, tokenizer_uri: str, config: ConversationsConfig) -> tuple[int, Outcomes]:
    index, lines = chunk
    with storage.local_copy(tokenizer_uri) as folder:
        tokenizer = load_chat_tokenizer(folder)
    return index, [read_example(line, tokenizer, config) for line in lines]


def _pack(examples: Sequence[Example], uri: str, block_tokens: int, padding: int) -> dict[str, int]:
    """Write the blocks of a split; its figures. What has no example has no file."""
    blocks = [
        fill([piece for index in chosen for piece in examples[index].pieces], block_tokens, padding)
        for chosen in assign([example.packed_tokens for example in examples], block_tokens)
    ]
    if blocks:
        with (
            storage.open_file(uri, "wb") as target,
            pq.ParquetWriter(target, CONVERSATION_BLOCK, compression="zstd") as writer,
        ):
            for start in range(0, len(blocks), ROWS):
                writer.write_table(_table(blocks[start : start + ROWS]))
    tokens = sum(example.packed_tokens for example in examples)
    return {
        "documents": len(examples),
        "bytes": sum(example.answer_bytes for example in examples),
        "tokens": tokens,
        "blocks": len(blocks),
        "labels": sum(int(block.loss_mask.sum()) for block in blocks),
        "truncated": sum(example.truncated for example in examples),
        "padding_tokens": len(blocks) * block_tokens - tokens,
    }


def _table(blocks: Sequence[Block]) -> pa.Table:
    names = ("input_ids", "document_starts", "loss_mask")
    return pa.Table.from_pydict({name: [getattr(one, name) for one in blocks] for name in names}, CONVERSATION_BLOCK)
