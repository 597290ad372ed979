"""The Qwen3 whose layers see chosen blocks, for vLLM on CPUs: its dense model with another attention in those layers.

Keys and values stay in vLLM's paged cache, one after the other for each token. For each sequence of a step they are
gathered through its block table, and the queries of the step choose among all blocks so far as in training, so that
chunks of a prompt, cached prefixes and single tokens give one answer. A block of the model need not be one of the
cache. It is made to be right: a step reads all earlier keys of its sequences. It knows no GPU and no quantized cache.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from app.block_attention import Blocks, attend


class BlockAttentionImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Of one layer; `blocks` is set by the model."""

    blocks: Blocks

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key and value [tokens, K, D] to their slots of the cache [pages, K, page size, 2 D]."""
        places = (slot_mapping >= 0).nonzero()[:, 0]
        slots, size = slot_mapping[places], kv_cache.shape[2]
        kv_cache[slots // size, :, slots % size] = torch.cat([key[places], value[places]], -1)

    def forward(
        self, layer: torch.nn.Module, query: torch.Tensor, *rest: Any, output: torch.Tensor, **scales: None
    ) -> torch.Tensor:
        """Fill the output [tokens, H, D]; `rest` are key and value, in the cache by now, the cache, and metadata."""
        kv_cache, metadata = rest[2:]
        if metadata is None:  # vLLM warms up
            return output.zero_()
        ends, size = metadata.query_start_loc.tolist(), kv_cache.shape[2]
        for index, length in enumerate(metadata.seq_lens.tolist()):
            rows = slice(ends[index], ends[index + 1])
            pages = metadata.block_table[index, : -(-length // size)]
            known = kv_cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :length]  # [1, K, S, 2 D]
            keys, values = known.chunk(2, -1)
            found = attend(query[rows].transpose(0, 1)[None], keys, values, self.blocks)
            output[rows] = found[0].transpose(0, 1)
        return output


class BlockAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's on CPUs, with its cache and its metadata."""

    @staticmethod
    def get_impl_cls() -> type[BlockAttentionImpl]:
        """What computes."""
        return BlockAttentionImpl


class BlockSparseQwen3ForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """Raises ValueError on anything but a CPU, or with a quantized cache."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if not current_platform.is_cpu():
            raise ValueError(f"{config.model_type}: served on CPUs only, so far")
        if vllm_config.cache_config.cache_dtype.startswith("fp8"):
            raise ValueError(f"{config.model_type}: kv_cache_dtype {vllm_config.cache_config.cache_dtype} is not known")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for index, layer in enumerate(self.model.layers):
            if not config.sees_all(index) and hasattr(layer, "self_attn"):  # other stages' layers are empty
                _choose_blocks(layer.self_attn.attn, config)


def _choose_blocks(attention: Any, config: Any) -> None:
    """Have a layer's attention of vLLM computed by blocks."""
    heads = (attention.num_heads, attention.head_size, attention.impl.scale, attention.num_kv_heads)
    attention.attn_backend = BlockAttentionBackend
    attention.impl = BlockAttentionImpl(*heads, None, None, attention.kv_cache_dtype)
    attention.impl.blocks = Blocks(config.attention_block_tokens, config.attention_blocks, attention.impl.scale)
