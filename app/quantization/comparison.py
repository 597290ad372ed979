"""A quantized model beside its source, on the same held-out text: bits per byte, and the tokens it holds likeliest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from app.models import SCORING_LOGITS, encode, score_documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Cross-entropy in bits over UTF-8 bytes, all texts together."""
    nats = sum(score_documents(model, encode(tokenizer, texts), tokenizer.eos_token_id))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def next_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The id that the model holds likeliest after each token, in the first window of each text: [tokens of all]."""
    import torch

    window_tokens = min(model.config.max_position_embeddings, SCORING_LOGITS // model.config.vocab_size)
    found = []
    for document in encode(tokenizer, texts):
        ids = torch.tensor([[tokenizer.eos_token_id, *document][:window_tokens]], device=model.device)  # [1, T]
        with torch.inference_mode():
            found.append(model(input_ids=ids, use_cache=False).logits[0].argmax(-1).cpu())
    return torch.cat(found)


def same_percent(expected: Tensor, found: Tensor) -> float:
    """How many of the ids are equal, position by position, in percent."""
    return round(100 * (expected == found).double().mean().item(), 2)
