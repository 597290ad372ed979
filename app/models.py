"""Models and tokenizers in the Hugging Face layout, and the one chat template.

Loads safetensors only and runs no code from a model directory. Training, evaluation and serving share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # ends every document; also begins a continuation
PADDING = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SCORING_SEQUENCES = 16
SCORING_LOGITS = 1 << 28  # of a batch at most, 1 GiB in float32: vocabularies and contexts multiply
DEEPSEEK_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # vLLM asks for it; transformers has no other
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, TURN_START, TURN_END)

# ChatML (https://github.com/openai/openai-python/blob/release-v0.28.1/chatml.md); tools and calls of them as JSON
# between tags, in the convention that vLLM's parser "hermes" reads.
CHAT_TEMPLATE = (
    "{% set first = messages[0] if messages and messages[0]['role'] == 'system' else none %}"
    "{% if tools %}"
    "{{ '<|im_start|>system\n' + (first['content'] + '\n\n' if first else '') }}"
    "{{ 'You may call these functions, described in JSON:\n<tools>\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '</tools>\nA call is a JSON object of name and arguments between <tool_call> and </tool_call>.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if not (tools and first and loop.first) %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n' if message['content'] or not loop.first else '' }}"
    "{{ '<tool_call>\n' + ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) }}"
    "{{ '\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model or tokenizer directory."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are: no special token is added, and one spelt out in a text is plain characters."""
    encoded: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return encoded


def load_model(model_dir: Path, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model for inference, in eval mode; quantized directories load as they are."""
    import torch
    from transformers import AutoModelForCausalLM

    from app import block_qwen3

    block_qwen3.register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model.train(False)
    return model


def score_documents(model: PreTrainedModel, documents: Sequence[Sequence[int]], end_of_text_id: int) -> list[float]:
    """Negative log-likelihood of each document's tokens, in nats; bits per byte = nats / ln 2 / UTF-8 bytes.

    A document is read after an end-of-text token, which is not scored. One longer than C tokens is cut into windows of
    C - 1 scored tokens, each after the token before it; C is the model's context, but not above SCORING_LOGITS over
    the vocabulary.
    """
    vocab_size = model.config.vocab_size
    context_tokens = min(model.config.max_position_embeddings, SCORING_LOGITS // vocab_size)
    windows: list[tuple[int, list[int]]] = []
    for index, document in enumerate(documents):
        sequence = [end_of_text_id, *document]
        for start in range(0, len(document), context_tokens - 1):
            windows.append((index, sequence[start : start + context_tokens]))
    windows.sort(key=lambda window: len(window[1]))  # little padding
    nats = [0.0] * len(documents)
    while windows:
        size = SCORING_LOGITS // (
            vocab_size * len(windows[-1][1])
        )  # the longest first: what memory lacks shows at once
        batch = windows[-min(SCORING_SEQUENCES, size) :]
        del windows[-len(batch) :]
        for (index, _), value in zip(batch, _window_nats(model, [tokens for _, tokens in batch]), strict=True):
            nats[index] += value
    return nats


def _window_nats(model: PreTrainedModel, windows: list[list[int]]) -> list[float]:
    import torch

    ignored = -100
    length = max(map(len, windows))
    input_ids = torch.tensor(
        [window + [0] * (length - len(window)) for window in windows], device=model.device
    )  # [B, T]
    targets = torch.tensor([window[1:] + [ignored] * (length - len(window)) for window in windows], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # [B, T-1, V]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=ignored, reduction="none"
        )
    sums: list[float] = losses.double().sum(1).tolist()
    return sums
