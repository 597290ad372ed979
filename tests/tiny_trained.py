"""A small corpus and a tiny Llama that has learned it, as artifacts: enough for a loss that quantization can hurt.

Imports torch and transformers only when it writes, so that collecting the tests stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from app.artifacts import Manifest, publish
from app.config import RunConfig
from app.records import CLEAN_DOCUMENT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SURNAMES, VERBS = "刘关张赵曹孙周诸", ["引兵南下", "问计于众", "大败而走", "置酒高会"]
VOCAB_SIZE, CONTEXT_TOKENS, END_OF_TEXT_ID = 400, 48, 0
STEPS = 60
UNTRAINED_BITS_PER_BYTE = 1.145  # of the held-out texts, when all tokens are equally likely


def write_texts() -> tuple[list[str], list[str]]:
    """Train and held-out documents; a few held-out ones are longer than the model's context."""
    texts = [
        f"却说{a}将军{verb}，{b}军师曰：第{number}回合，不可轻敌。众皆称善，于是各引本部人马而去。" * (1 + number % 3)
        for number in range(10)
        for a, b in zip(SURNAMES, reversed(SURNAMES), strict=True)
        for verb in VERBS
    ]
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def write_artifacts(root: Path) -> None:
    """`corpus` and `model` under root, both with manifests."""
    from app.tokens import tokenizer as bpe

    train, held_out = write_texts()
    for split, texts in (("train", train), ("held_out", held_out)):
        rows = [{"id": f"{split}{index}", "text": text, "source": "novel"} for index, text in enumerate(texts)]
        (root / "corpus" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, CLEAN_DOCUMENT), root / "corpus" / split / "0.parquet")
    publish(Manifest.draft("corpus", str(root / "corpus"), RunConfig(), {}), {"raw": len(train) + len(held_out)})
    tokenizer = bpe.train(train, VOCAB_SIZE, 2)
    documents = [[END_OF_TEXT_ID, *encoding.ids] for encoding in tokenizer.encode_batch(train)]
    _train([token for document in documents for token in document]).save_pretrained(root / "model")
    bpe.save(tokenizer, root / "model")
    publish(Manifest.draft("model", str(root / "model"), RunConfig(), {}), {})


def _train(stream: list[int]) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    learn(model, stream, batch=16, steps=STEPS)
    return model.eval()


def learn(model: LlamaForCausalLM, stream: list[int], batch: int, steps: int) -> None:
    """Train on random windows of the stream, each as long as the model's context."""
    import torch

    length = model.config.max_position_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.tensor(stream)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,))
        windows = torch.stack([tokens[start : start + length] for start in starts])  # [B, T]
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
