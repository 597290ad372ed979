"""A tokenizer and token blocks that a tiny model learns within some steps, and the settings of a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.artifacts import Input, Manifest, publish
from app.config import RunConfig
from app.records import TOKEN_BLOCK

VOCAB_SIZE, BLOCK_TOKENS, HELD_OUT_BYTES = 300, 32, 1000
TRAIN_BLOCKS, HELD_OUT_BLOCKS = 96, 7
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
    "num_steps": 60,
    "global_batch_sequences": 8,
    "micro_batch_sequences": 2,
    "checkpoint_interval_steps": 10,
    "evaluation_interval_steps": 30,
    "wandb_mode": "disabled",
}


def walks(seed: int, num_blocks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random walks through the ids [N, T]: the next token is near the last one."""
    return np.random.default_rng(seed).integers(0, 3, (num_blocks, BLOCK_TOKENS)).cumsum(1) % VOCAB_SIZE


def write_tokenizer(root: Path) -> Manifest:
    """`tokenizer` under root."""
    from app.tokens import tokenizer as bpe

    (root / "tokenizer").mkdir(parents=True)
    bpe.save(bpe.train(["却说刘备引兵南下。"] * 3, VOCAB_SIZE, 2), root / "tokenizer")
    return publish(Manifest.draft("tokenizer", str(root / "tokenizer"), RunConfig(), {}), {})


def write_tokens(uri: Path, tokenizer: Manifest, train: Any, held_out: Any) -> None:
    """A tokens artifact of blocks [N, T], each one document; the held-out ones fill no whole batch."""
    for split, blocks in (("train", train), ("held_out", held_out)):
        rows = [{"input_ids": block.tolist(), "document_starts": [0]} for block in blocks]
        (uri / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, TOKEN_BLOCK), uri / split / "0.parquet")
    count = len(held_out)
    figures = {"blocks": count, "tokens": count * BLOCK_TOKENS + 5, "tail_tokens": 5, "bytes": HELD_OUT_BYTES}
    inputs: dict[str, Input] = {"tokenizer": tokenizer.as_input()}
    draft = Manifest.draft("tokens", str(uri), RunConfig(), inputs)
    draft = draft.model_copy(update={"config": draft.config | {"block_tokens": BLOCK_TOKENS}})
    publish(draft, {"vocab_size": VOCAB_SIZE, "train": {"blocks": len(train)}, "held_out": figures})


def write_inputs(root: Path) -> None:
    """`tokenizer` and `tokens` under root."""
    blocks = walks(0, TRAIN_BLOCKS + HELD_OUT_BLOCKS)
    write_tokens(root / "tokens", write_tokenizer(root), blocks[:TRAIN_BLOCKS], blocks[TRAIN_BLOCKS:])


def config_of(inputs: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run in `root` on the inputs of another folder."""
    uris = {"tokens_uri": f"{inputs}/tokens", "tokenizer_uri": f"{inputs}/tokenizer", "storage_uri": str(root)}
    return {**SETTINGS, **uris, "cache_dir": f"{inputs}/cache", **changes}


def log_of(root: Path) -> list[dict[str, Any]]:
    """The lines of a finished run."""
    return [json.loads(line) for line in (root / "model" / "training_log.jsonl").read_text().splitlines()]


def trajectory(root: Path) -> list[tuple[Any, ...]]:
    """What of each step must not depend on what befell the run."""
    return [
        tuple(line[name] for name in ("step", "loss", "learning_rate", "grad_norm", "rows")) for line in log_of(root)
    ]
