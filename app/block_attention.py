"""Attention to the blocks of keys that each query chooses by what is in them, at a cost that grows with the length.

Keys are cut into blocks of B tokens. A query sees its own block up to itself, and of the whole blocks before it those
few whose mean key has the largest dot product with it, each head for itself: MoBA (Lu et al. 2025, arXiv:2502.13189).
On a CPU the queries that chose a block meet it in tiles of equal height, all tiles in one call of torch's flash
attention; the parts of a query are joined by their log-sum-exps, and the backward pass is given the joined ones, as
between devices in ring attention (Liu et al. 2023, arXiv:2310.01889). On a GPU FlexAttention gets the same mask; that
is not tried.

The choice has no gradient, and it alone costs T / B dot products a query. Padding, packed documents and dropout are not
known here. transformers' side of it is in block_qwen3.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

TILE_ROWS = 64  # queries that meet a block together
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what SDPA calls there, with log-sum-exps
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Blocks(NamedTuple):
    """How keys are cut, and what a query sees of them."""

    tokens: int  # of a block
    seen: int  # blocks, the query's own included
    scale: float = 1.0  # of dot products before the softmax


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """[B, H, T, D] of query [B, H, T, D], key and value [B, K, S, D].

    With S > T the queries are the last T of S tokens. Fewer than a block's meet all keys, masked.
    """
    length, earlier = query.shape[2], key.shape[2] - query.shape[2]
    if not earlier and length <= blocks.tokens * blocks.seen:  # that is all
        return _sdpa(query, key, value, blocks, is_causal=True)
    if earlier and (query.is_cuda or length < blocks.tokens or key.shape[2] <= blocks.tokens * blocks.seen):
        return _sdpa(query, key, value, blocks, attn_mask=choice_mask(query, key, blocks))
    if query.is_cuda:
        return attend_by_flex(query, key, value, blocks)
    before, after = earlier % blocks.tokens, -key.shape[2] % blocks.tokens  # to whole blocks
    by_key_head = (-1, query.shape[1] // key.shape[1], before + length + after, query.shape[3])
    queries = functional.pad(query, (0, 0, before, after)).reshape(by_key_head).contiguous()
    keys, values = (functional.pad(tensor, (0, 0, 0, after)).flatten(0, 1).contiguous() for tensor in (key, value))
    out: torch.Tensor = _Chosen.apply(queries, keys, values, blocks)  # type: ignore[no-untyped-call]
    return out.view(*query.shape[:2], *out.shape[2:])[:, :, before : before + length]


@torch.no_grad()
def choose(query: torch.Tensor, key: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The earlier blocks of each query, [P, G, T, n] with n < `seen`, in no order; for none, the number of blocks.

    The queries [P, G, T, D] are the last T of the S tokens of the keys [P, S, D]; P is batch times heads of keys, and G
    the heads that share one.
    """
    num_streams, groups, length, width = query.shape
    whole = key.shape[1] // blocks.tokens
    means = key[:, : whole * blocks.tokens].view(num_streams, whole, blocks.tokens, width).mean(2)
    scores = (query.reshape(num_streams, -1, width) @ means.transpose(1, 2)).view(num_streams, groups, length, whole)
    own = (torch.arange(length, device=query.device) + key.shape[1] - length) // blocks.tokens
    later = torch.arange(whole, device=query.device) >= own[:, None]
    best, chosen = scores.masked_fill_(later, -torch.inf).topk(min(blocks.seen - 1, whole), -1, sorted=False)
    return chosen.masked_fill_(best == -torch.inf, -(-key.shape[1] // blocks.tokens))


def choice_mask(query: torch.Tensor, key: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Which token sees which, boolean [B, H, T, S], of query [B, H, T, D] and key [B, K, S, D]."""
    keys = torch.arange(key.shape[2], device=key.device)
    queries = keys[key.shape[2] - query.shape[2] :, None]
    own = (queries // blocks.tokens == keys // blocks.tokens) & (keys <= queries)
    return own | _seen(query, key, blocks)[..., keys // blocks.tokens]


def attend_by_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """`attend` of T = S by FlexAttention, which skips the tiles that no query in them has chosen; on a GPU compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, seen, on_gpu = blocks.tokens, _seen(query, key, blocks), query.is_cuda

    def sees(row: Any, head: Any, place: Any, other: Any) -> Any:
        own = (place // tokens == other // tokens) & (other <= place)
        return own | seen[row, head, place, other // tokens]

    batch, num_heads, length, _ = query.shape
    mask = create_block_mask(sees, batch, num_heads, length, length, device=query.device.type, _compile=on_gpu)
    attention = torch.compile(flex_attention) if on_gpu else flex_attention
    shares = key.shape[1] != num_heads
    out: torch.Tensor = attention(query, key, value, block_mask=mask, scale=blocks.scale, enable_gqa=shares)
    return out


def _seen(query: torch.Tensor, key: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Whether a query has chosen a block, boolean [B, H, T, N + 1]."""
    by_key_head = (query.shape[0] * key.shape[1], -1, *query.shape[2:])
    chosen = choose(query.reshape(by_key_head), key.flatten(0, 1), blocks)
    none = chosen.new_zeros(*chosen.shape[:3], -(-key.shape[2] // blocks.tokens) + 1, dtype=torch.bool)
    return none.scatter_(-1, chosen, True).view(*query.shape[:3], -1)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, **options: Any) -> torch.Tensor:
    shares = key.shape[1] != query.shape[1]
    out: torch.Tensor = functional.scaled_dot_product_attention(
        query, key, value, scale=blocks.scale, enable_gqa=shares, **options
    )
    return out


class Tiles:
    """Pairs of a query and a block that it chose, sorted by block and cut into tiles of TILE_ROWS.

    A query is a row of [P·G·T, D]. `rows` says for each place in the tiles which query is there, `places` for each
    query where its pairs are; one past the end is nowhere. `owners` says whose tile it is among the P·N blocks.
    """

    def __init__(self, chosen: torch.Tensor, num_blocks: int) -> None:
        num_streams, count = chosen.shape[0], chosen.shape[-1]
        lists = (chosen + torch.arange(num_streams).view(-1, 1, 1, 1) * (num_blocks + 1)).flatten()  # the last for none
        lengths = torch.bincount(lists, minlength=num_streams * (num_blocks + 1))
        heights = (lengths.view(num_streams, -1) + TILE_ROWS - 1) // TILE_ROWS
        heights[:, num_blocks] = 0
        firsts = heights.flatten().cumsum(0) - heights.flatten()
        order = lists.argsort(stable=True)
        lists = lists[order]
        inside = torch.arange(len(lists)) - (lengths.cumsum(0) - lengths)[lists]
        nowhere = int(heights.sum()) * TILE_ROWS
        found = torch.where(lists % (num_blocks + 1) == num_blocks, nowhere, firsts[lists] * TILE_ROWS + inside)
        self.places = torch.empty_like(found).scatter_(0, order, found).view(-1, count)
        self.rows = torch.full((nowhere + 1,), len(self.places)).scatter_(0, found, order // count)[:-1]
        self.owners = torch.repeat_interleave(torch.arange(num_streams * num_blocks), heights[:, :-1].flatten())


def _into(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [P·G·T, …] of queries in their tiles: [tiles, 1, TILE_ROWS, …], zeros where none is."""
    padded = torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
    return padded[rows].view(-1, 1, TILE_ROWS, *tensor.shape[1:])


def _out_of(tensor: torch.Tensor, places: torch.Tensor, nothing: float = 0.0) -> torch.Tensor:
    """What the tiles [tiles, 1, TILE_ROWS, …] say of each query: [P·G·T, n, …]."""
    rows = tensor.flatten(0, 2)
    return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), nothing)])[places]


def _by_block(rows: torch.Tensor, shape: torch.Size, tokens: int) -> torch.Tensor:
    """Rows [P·G·T, …] of queries of that shape [P, G, T, D] beside their own block: [P·N, G, B, …]."""
    parts = rows.view(*shape[:2], -1, tokens, *rows.shape[1:]).transpose(1, 2)
    return parts.reshape(-1, shape[1], tokens, *rows.shape[1:])


def _by_query(parts: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_by_block`."""
    _, groups, tokens, *rest = parts.shape
    return parts.view(shape[0], -1, groups, tokens, *rest).transpose(1, 2).reshape(-1, *rest)


def _last(shared: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A view of those blocks of [P·N, 1, B, D] that queries of that shape [P, G, T, D] are of: [P, T/B, 1, B, D]."""
    return shared.view(shape[0], -1, *shared.shape[1:])[:, -(shape[2] // shared.shape[2]) :]


class _Chosen(torch.autograd.Function):
    """[P, G, T, D] of query [P, G, T, D], key and value [P, N·B, D]; the queries are of the last blocks, whole ones."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        tokens, shape = blocks.tokens, query.shape
        tiles = Tiles(choose(query, key, blocks), key.shape[1] // tokens)
        flat = query.reshape(-1, shape[3])
        shared = [tensor.view(-1, 1, tokens, shape[3]) for tensor in (key, value)]  # [P·N, 1, B, D]
        theirs = (tensor[tiles.owners] for tensor in shared)
        out, log_sum = _forward(_into(flat, tiles.rows), *theirs, 0.0, False, scale=blocks.scale)
        mine = (_last(tensor, shape).expand(-1, -1, shape[1], -1, -1).flatten(0, 1) for tensor in shared)
        own, own_log_sum = _forward(_by_block(flat, shape, tokens), *mine, 0.0, True, scale=blocks.scale)
        own_log_sum = _by_query(own_log_sum.reshape(own.shape[:3]), shape)
        parts = torch.cat([own_log_sum[:, None], _out_of(log_sum, tiles.places, -torch.inf)], 1)  # [P·G·T, 1 + n]
        joined = parts.logsumexp(1)
        shares = (parts - joined[:, None]).exp().to(out.dtype)
        whole = (shares[:, None] @ torch.cat([_by_query(own, shape)[:, None], _out_of(out, tiles.places)], 1))[:, 0]
        ctx.save_for_backward(query, key, value, whole, joined, tiles.places, tiles.rows, tiles.owners)
        ctx.blocks = blocks
        return whole.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, whole, joined, places, rows, owners = ctx.saved_tensors
        tokens, shape, scale = ctx.blocks.tokens, query.shape, ctx.blocks.scale
        by_query = [gradient.reshape(-1, shape[3]), query.reshape(-1, shape[3]), whole, joined]
        shared = [tensor.view(-1, 1, tokens, shape[3]) for tensor in (key, value)]
        given, asked, out, log_sum = (_into(tensor, rows) for tensor in by_query)
        theirs = (tensor[owners] for tensor in shared)
        to_queries, *to_theirs = _backward(given, asked, *theirs, out, log_sum, 0.0, False, scale=scale)
        given, asked, out, log_sum = (_by_block(tensor, shape, tokens) for tensor in by_query)
        mine = (_last(tensor, shape).expand(-1, -1, shape[1], -1, -1).flatten(0, 1) for tensor in shared)
        to_own, *to_mine = _backward(given, asked, *mine, out, log_sum, 0.0, True, scale=scale)
        to_query = _by_query(to_own, shape) + _out_of(to_queries, places).sum(1)
        to_shared = [torch.zeros_like(shared[0]).index_add_(0, owners, part) for part in to_theirs]
        for tensor, part in zip(to_shared, to_mine, strict=True):
            last = _last(tensor, shape)
            last += part.sum(1).view_as(last)
        return to_query.view_as(query), *(tensor.view_as(key) for tensor in to_shared), None
