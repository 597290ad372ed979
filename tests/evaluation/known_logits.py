"""A model directory whose next-token logits are a table that depends on the last token only: answers known exactly.

Embeddings are one-hot, attention and feed-forward add nothing, so the head reads the table's row of the last token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.artifacts import Manifest, publish
from app.config import RunConfig

CONTEXT_TOKENS = 256
LETTERS = "ABCD"


def write(root: Path, preferred: str) -> NDArray[np.float64]:
    """`model` under root, with a manifest; log-probabilities [V, V] by last token.

    Whatever was last, the letter `preferred` is the likeliest of the four.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.tokens import tokenizer as bpe

    tokenizer = bpe.train([f"答案： {letter}" for letter in LETTERS] * 3, 300, 2)
    size = -(-tokenizer.get_vocab_size() // 4) * 4
    rng = np.random.default_rng(0)
    table = rng.normal(size=(size, size))
    for name, token in tokenizer.get_vocab().items():
        if name[-1:] in LETTERS:
            table[:, token] = 5.0 if name[-1] == preferred else -5.0
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.tensor(table.T / np.sqrt(size)))  # the norm makes sqrt(V) of a one
    model.save_pretrained(root / "model")
    bpe.save(tokenizer, root / "model")
    publish(Manifest.draft("model", str(root / "model"), RunConfig(), {}), {})
    normalised: NDArray[np.float64] = table - np.log(np.exp(table).sum(1, keepdims=True))
    return normalised
