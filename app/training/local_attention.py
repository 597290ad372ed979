"""Attention to a window of the last tokens, at a cost that grows with the length and not with its square.

Queries are cut into chunks; each chunk meets only the keys that its window reaches, its own and those right before. All
chunks are one batch of scaled_dot_product_attention, after Beltagy et al. 2020 (Longformer, arXiv:2004.05150, 3.1).
Which token sees which is transformers' own rule, evaluated for those pairs alone, so that documents of a block are told
apart as in the full matrix. Layers that see all go to SDPA as they would.

It is for forward passes over whole blocks: with a key-value cache or with padding the full matrix is masked. On a GPU
flash_attention_2 and flex_attention take the window from transformers and skip what lies outside; this is for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from app.training.sizes import chunk_tokens

NAME = "sdpa_by_chunks"  # as transformers calls it; never in a config.json
MaskRule = Callable[[Any, Any, Any, Any], torch.Tensor]  # batch, head, query and key index, broadcast together


def register() -> str:
    """Make it known to transformers; the name that `attn_implementation` takes."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def chunk_mask(rule: MaskRule, batch: int, length: int, window: int) -> torch.Tensor:
    """What each query adds to its scores, 0 or -inf [B·N, 1, C, W + C], for N chunks of C queries.

    Key j of chunk n is token n·C + j - W. The last chunk may reach beyond the end: those queries see themselves.
    """
    chunk = chunk_tokens(window)
    num_chunks = -(-length // chunk)
    queries = torch.arange(num_chunks * chunk).view(num_chunks, chunk, 1)
    keys = (torch.arange(window + chunk) - window) + queries[:, :1]  # [N, 1, W + C]
    rows = torch.arange(batch).view(batch, 1, 1, 1)
    inside = [places.clamp(0, length - 1) for places in (queries, keys)]  # that the rule can be asked
    seen = rule(rows, 0, *inside) & (keys >= 0) & (keys <= queries)
    seen = seen.expand(batch, *seen.shape[-3:]).flatten(0, 1)
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> torch.Tensor:
    """[B, T, H, D] of query [B, H, T, D], key and value [B, K, T, D], and a mask of `chunk_mask`.

    `options` are those of scaled_dot_product_attention: scale, dropout_p.
    """
    batch, _, length, _ = query.shape
    num_chunks, (chunk, reach) = len(mask) // batch, mask.shape[-2:]
    padding = num_chunks * chunk - length
    chunks = _windows(functional.pad(query, (0, 0, 0, padding)), chunk, chunk)  # [B·N, H, C, D]
    around = (0, 0, reach - chunk, padding)
    keys, values = (_windows(functional.pad(tensor, around), chunk, reach) for tensor in (key, value))
    if query.is_cuda:  # there SDPA with a mask and shared heads falls back to the slowest kernel
        keys, values = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (keys, values))
    shares = keys.shape[1] != chunks.shape[1]
    out: torch.Tensor = functional.scaled_dot_product_attention(
        chunks, keys, values, attn_mask=mask, enable_gqa=shares, **options
    )
    ordered = out.transpose(1, 2).reshape(batch, num_chunks * chunk, *out.shape[1::2])
    return ordered[:, :length]


def _windows(tensor: torch.Tensor, step: int, reach: int) -> torch.Tensor:
    """All runs of `reach` tokens, one every `step`, of a tensor [B, K, T, D]: [B·N, K, reach, D]."""
    return tensor.unfold(2, reach, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _mask(**asked: Any) -> torch.Tensor | None:
    """What transformers calls once a forward pass for each type of layer; `local_size` is there for a window only."""
    window, length = asked.get("local_size"), asked["q_length"]
    is_whole = asked["kv_length"] == length and asked.get("attention_mask") is None
    if window is None or not is_whole or asked.get("use_vmap"):
        return _full_mask(**asked)
    if length <= window:
        return _full_mask(**asked | {"local_size": None})  # the window cuts nothing off
    with torch.device(asked["device"]):
        return chunk_mask(asked["mask_function"], asked["batch_size"], length, window).to(asked["dtype"])


def _full_mask(**asked: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(**asked)
    return mask


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """A layer's attention, of either type: `_mask` has said which."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.shape[-2] == query.shape[2]:
        whole: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return whole, None
    given = {"scale": options.get("scaling"), "dropout_p": options.get("dropout", 0.0)}
    return attend(query, key, value, attention_mask, **given), None
