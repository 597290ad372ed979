"""Models and tokenizers in the Hugging Face layout, and the one chat template.

Loads safetensors only and runs no code from a model directory. Training, evaluation and serving share it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # ends every document; also begins a continuation
PADDING = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, TURN_START, TURN_END)

# ChatML (https://github.com/openai/openai-python/blob/release-v0.28.1/chatml.md)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model or tokenizer directory."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    return tokenizer


def load_model(model_dir: Path, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model for inference, in eval mode; quantized directories load as they are."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    model.train(False)
    return model
