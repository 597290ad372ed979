"""Attention to chosen blocks, computed by tiles, equals the full matrix with a mask made query by query."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from app.block_attention import TILE_ROWS, Blocks, Tiles, attend, attend_by_flex, choice_mask, choose

pytestmark = pytest.mark.slow  # imports torch
TOLERANCE = 1e-5
WIDTH, SCALE = 16, 0.3
SHAPES = [  # batch, heads, heads of keys, tokens, tokens of a block, blocks seen
    (1, 1, 1, 64, 8, 2),
    (2, 4, 4, 96, 16, 3),
    (1, 8, 2, 200, 8, 5),
    (2, 4, 1, 131, 7, 3),
    (1, 6, 3, 301, 32, 4),
    (2, 2, 2, 257, 64, 2),
    (1, 2, 1, 130, 1, 9),
    (1, 4, 2, 512, 128, 3),
    (1, 2, 2, 65, 32, 2),  # one token in the last block
    (1, 2, 1, 90, 32, 3),  # all is seen
]


def tensors(batch: int, heads: int, shared: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + length)
    return [
        torch.randn(batch, number, length, WIDTH, generator=generator, requires_grad=True)
        for number in (heads, shared, shared)
    ]


def reference_mask(query: torch.Tensor, key: torch.Tensor, tokens: int, blocks: int) -> torch.Tensor:
    """By the definition, one query at a time."""
    batch, heads, length, _ = query.shape
    total = key.shape[2]
    mask = torch.zeros(batch, heads, length, total, dtype=torch.bool)
    for row in range(batch):
        for head in range(heads):
            keys = key[row, head * key.shape[1] // heads]
            for index in range(length):
                place = total - length + index
                first = place // tokens * tokens
                mask[row, head, index, first : place + 1] = True
                scores = [
                    float(query[row, head, index] @ keys[at : at + tokens].mean(0)) for at in range(0, first, tokens)
                ]
                for block in sorted(range(len(scores)), key=lambda one: -scores[one])[: blocks - 1]:
                    mask[row, head, index, block * tokens : (block + 1) * tokens] = True
    return mask


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def masked(given: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True, scale=SCALE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_equal_the_masked_matrix(shape: tuple[int, ...]) -> None:
    """Values and the gradients of all three inputs."""
    *sizes, tokens, blocks = shape
    given = tensors(*sizes)
    with torch.no_grad():
        mask = reference_mask(given[0], given[1], tokens, blocks)
    expected = masked(given, mask)
    found = attend(*given, Blocks(tokens, blocks, SCALE))
    assert distance(found, expected) <= TOLERANCE
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    gradients = torch.autograd.grad((found * weights).sum(), given)
    assert max(map(distance, gradients, wanted)) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_it_takes_tensors_as_layers_make_them(batch: int) -> None:
    """[B, T, H, D] in memory, of a length that needs no padding."""
    given = [tensor.detach() for tensor in tensors(batch, 4, 2, 96)]
    expected = attend(*given, Blocks(16, 3, SCALE))
    found = attend(*(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in given), Blocks(16, 3, SCALE))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_the_last_queries_see_what_they_saw_among_all(shape: tuple[int, ...]) -> None:
    """With earlier keys in a cache: one query, less than a block of them, or several blocks from anywhere."""
    *sizes, tokens, blocks = shape
    query, key, value = tensors(*sizes)
    whole = attend(query, key, value, Blocks(tokens, blocks, SCALE))
    for length in {sizes[-1] - 1, sizes[-1] - tokens, 2 * tokens + 1, tokens - 1, 1} - {0}:
        last = attend(query[:, :, -length:], key, value, Blocks(tokens, blocks, SCALE))
        assert distance(last, whole[:, :, -length:]) <= TOLERANCE
        weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad((whole[:, :, -length:] * weights).sum(), (query, key, value), retain_graph=True)
        found = torch.autograd.grad((last * weights).sum(), (query, key, value))
        assert max(map(distance, found, wanted)) <= TOLERANCE


@pytest.mark.parametrize("changed", [0, 40, 63, 64, 100, 130])
def test_a_later_token_changes_nothing_earlier(changed: int) -> None:
    """And it does change what comes from there on."""
    given = [tensor.detach() for tensor in tensors(1, 4, 2, 131)]
    blocks = Blocks(16, 3, SCALE)
    before = attend(*given, blocks)
    for tensor in given:
        tensor[:, :, changed] = 9 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    after = attend(*given, blocks)
    assert distance(after[:, :, :changed], before[:, :, :changed]) <= 1e-6 if changed else True
    assert distance(after[:, :, changed], before[:, :, changed]) > 0.01


def test_the_choice_has_no_gradient() -> None:
    """A key that only the choice reads gets none: its block is chosen by no query of the last block."""
    query, key, value = tensors(1, 1, 1, 96)
    with torch.no_grad():
        key[0, 0, :32] = -query[0, 0, 64:].mean(0) * 50  # far from what the last queries look for
        key[0, 0, 32:64] = query[0, 0, 64:].mean(0) * 50
        query[0, 0, 64:] = query[0, 0, 64:].mean(0) + 0.01 * query[0, 0, 64:]
    out = attend(query, key, value, Blocks(32, 2, SCALE))
    (gradient,) = torch.autograd.grad(out[0, 0, 64:].sum(), key)
    assert float(gradient[0, 0, :32].abs().max()) == 0
    assert float(gradient[0, 0, 32:].abs().max()) > 0


def test_flex_attention_is_given_the_same_mask() -> None:
    """Its forward pass on a CPU; on a GPU it is not tried."""
    given = [tensor.detach() for tensor in tensors(2, 4, 2, 256)]
    mask = reference_mask(given[0], given[1], 32, 3)
    assert distance(attend_by_flex(*given, Blocks(32, 3, SCALE)), masked(given, mask)) <= TOLERANCE


def test_work_grows_with_the_length() -> None:
    """Scores that are computed, of tiles and own blocks: at four times the length about four times as many, not 16."""

    def scores(length: int, tokens: int = 64, blocks: int = 4) -> int:
        query, key, _ = (tensor.detach()[0] for tensor in tensors(1, 4, 2, length))
        chosen = choose(query.reshape(2, 2, length, WIDTH), key, Blocks(tokens, blocks))
        tiles = Tiles(chosen, length // tokens)
        assert len(tiles.owners) * TILE_ROWS >= int((chosen < length // tokens).sum())
        return len(tiles.owners) * TILE_ROWS * tokens + 4 * length * tokens

    few, many = scores(1024), scores(4096)
    assert many / few < 4.6
    assert many < 4 * 4096 * 4096 / 2 / 5  # of what a causal matrix has
    assert math.isclose(many, 4 * 4096 * 64 * 4, rel_tol=0.2)  # k·B keys a query, but for what fills tiles up


def test_in_16_bits_it_is_as_near_as_sdpa() -> None:
    given = [tensor.detach() for tensor in tensors(1, 4, 2, 300)]
    mask = reference_mask(given[0].bfloat16().float(), given[1].bfloat16().float(), 32, 4)
    expected = masked(given, mask)
    halves: list[Any] = [tensor.bfloat16() for tensor in given]
    blocks = Blocks(32, 4, SCALE)
    chosen = choice_mask(halves[0], halves[1], blocks)
    theirs = distance(masked(halves, chosen).float(), expected)
    ours = distance(attend(*halves, blocks).float(), expected)
    assert ours <= 1.5 * theirs + 1e-3
