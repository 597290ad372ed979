"""Qwen3 whose layers see chosen blocks only, as a family of its own for transformers: `block_sparse_qwen3`.

The weights are those of a Qwen3 (Yang et al. 2025, arXiv:2505.09388), and as one they would be read and answer other
things; the name keeps transformers and vLLM from it where this module is not registered. Nothing of it is executed from
a model's folder. What a layer computes is block_attention.py; every `global_every`-th sees all. There is one way to
compute it, whatever `attn_implementation` is asked for. Padding, packed documents and caches of a fixed size are
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from app.block_attention import Blocks, attend

NAME = "chosen_blocks"  # of the attention, as transformers calls it; never in a config.json


class BlockSparseQwen3Config(Qwen3Config):  # type: ignore[misc]
    """Qwen3's, with the tokens of a block, the blocks that a query sees (its own is one), and the layers that see all.

    Raises ValueError without the first two.
    """

    model_type = "block_sparse_qwen3"
    has_no_defaults_at_init = True

    attention_block_tokens: int = 0
    attention_blocks: int = 0
    global_every: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_block_tokens < 1 or self.attention_blocks < 1:
            raise ValueError(f"{self.model_type}: attention_block_tokens and attention_blocks must be set")

    @property
    def _attn_implementation(self) -> str:
        return NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._attn_implementation_internal = NAME

    def sees_all(self, layer: int) -> bool:
        """Whether the layer, counted from 0, is one of every `global_every`."""
        return self.global_every > 0 and (layer + 1) % self.global_every == 0


class BlockSparseQwen3ForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3's modules and names of weights; the config says that they attend to blocks."""

    config_class = BlockSparseQwen3Config
    _supports_attention_backend = False  # vLLM would put its own attention, which sees all, into transformers' model


def register() -> None:
    """Make the family known to transformers, in this process; again is no harm."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    AutoConfig.register(BlockSparseQwen3Config.model_type, BlockSparseQwen3Config, exist_ok=True)
    AutoModelForCausalLM.register(BlockSparseQwen3Config, BlockSparseQwen3ForCausalLM, exist_ok=True)


def _mask(**asked: Any) -> None:
    """What transformers calls once a forward pass: the layers need no mask, or there is something that they would not
    see to.
    """
    padding = asked.get("attention_mask")
    if (padding is not None and not bool(padding.all())) or not asked.get("allow_is_causal_skip", True):
        raise ValueError(
            f"{BlockSparseQwen3Config.model_type}: padding, packed documents (document_masking) and caches of a fixed "
            "size are not supported; give whole sequences of equal length"
        )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """A layer's attention, [B, T, H, D]."""
    if attention_mask is not None or options.get("dropout"):
        raise ValueError(f"{BlockSparseQwen3Config.model_type}: masks and attention_dropout are not supported")
    config: Any = module.config
    tokens = config.attention_block_tokens
    blocks = -(-key.shape[2] // tokens) if config.sees_all(module.layer_idx) else config.attention_blocks
    out = attend(query, key, value, Blocks(tokens, blocks, options["scaling"]))
    return out.transpose(1, 2).contiguous(), None
