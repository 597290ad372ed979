"""Windows computed by chunks equal the full matrix with a mask on it, forward and backward, alone and in a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from app.training.config import ModelConfig, TrainConfig
from app.training.sizes import seen_tokens

if TYPE_CHECKING:
    import torch

slow = pytest.mark.slow  # imports torch and transformers
VOCAB_SIZE, TOLERANCE = 50, 1e-5
SMALL: dict[str, Any] = {
    "architecture": "olmo3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window_tokens": 24,
    "global_every": 2,
}


def config_of(attention: str = "sdpa", **model: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": SMALL | model, "attention": attention})


def model_of(config: TrainConfig, block_tokens: int) -> Any:
    """Fresh weights, and large ones, so that attention is far from even."""
    import torch

    from app.training.engine import fresh_model

    torch.manual_seed(0)
    model = fresh_model(config, {"vocab_size": VOCAB_SIZE, "block_tokens": block_tokens, "end_of_text_id": 0})
    model.config.use_cache = False
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    return model.train()


def close(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(other.abs().max()))


@slow
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["own", "shared"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("length", "window"), [(9, 4), (64, 8), (131, 7), (300, 100), (417, 129), (130, 128)])
def test_chunks_equal_the_masked_matrix(length: int, window: int, documents: bool, heads: tuple[int, int]) -> None:
    """Two sequences; lengths of no whole chunks; documents that end anywhere, some of them single tokens."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from app.training.local_attention import attend, chunk_mask

    torch.manual_seed(length)
    tensors = [torch.randn(2, count, length, 8, requires_grad=True) for count in (heads[0], heads[1], heads[1])]
    document = (torch.rand(2, length) < (0.1 if documents else 0)).cumsum(1)

    def rule(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - window) & (document[row, query] == document[row, key])

    places = torch.arange(length)
    full = rule(torch.arange(2)[:, None, None], 0, places[:, None], places)[:, None]  # [B, 1, T, T]
    expected = scaled_dot_product_attention(*tensors, attn_mask=full, enable_gqa=True).transpose(1, 2)
    found = attend(*tensors, chunk_mask(rule, 2, length, window))
    assert found.shape == expected.shape
    assert close(found, expected)
    weights = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    assert all(close(one, other) for one, other in zip(gradients, wanted, strict=True))


@slow
def test_a_chunk_meets_a_window_and_no_more() -> None:
    """Work grows with the length: 40 chunks of 64 queries and 192 keys, where the matrix is 13 times as large."""
    from app.training.local_attention import chunk_mask

    mask = chunk_mask(lambda row, head, query, key: key > query - 128, 1, 2560, 128)
    assert mask.shape == (40, 1, 64, 192)
    assert 2560 * 2560 / mask.numel() > 13


@slow
@pytest.mark.parametrize("restarts", [(), (5, 6, 40)], ids=["one document", "documents"])
@pytest.mark.parametrize("every", [0, 2])
def test_a_model_trains_as_with_the_masked_matrix(every: int, restarts: tuple[int, ...]) -> None:
    """Loss and gradients of transformers' eager attention on two blocks, in which documents may end anywhere."""
    import torch

    length = 101
    ids = torch.randint(0, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(2, 1)
    for start in restarts:
        positions[1, start:] -= int(positions[1, start])
    figures = []
    for attention in ("sdpa", "eager"):
        model = model_of(config_of(attention, global_every=every), length)
        loss = model(input_ids=ids, labels=ids, position_ids=positions).loss
        loss.backward()
        figures.append((loss.detach(), {name: one.grad for name, one in model.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = figures
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    gaps = {name: float((one - expected[name]).abs().max()) for name, one in gradients.items()}
    assert all(close(one, expected[name]) for name, one in gradients.items()), gaps


@slow
def test_the_window_matters_and_is_the_one_that_was_set() -> None:
    """In a model of local layers alone a token tells only those that L windows reach."""
    import torch

    length, window, layers = 200, 24, SMALL["num_layers"]
    model = model_of(config_of(global_every=0), length).eval()
    ids = torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % VOCAB_SIZE
    with torch.no_grad():
        differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    last = int(differs.nonzero().max())
    assert layers * (window - 1) - window < last <= layers * (window - 1)


@slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_exported_model_is_a_plain_one(tmp_path: Path, attention: str) -> None:
    """config.json names nothing of ours, and transformers computes the same logits from it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = model_of(config_of(), 100).eval()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert "chunks" not in json.dumps(settings)
    assert settings["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert settings["sliding_window"] == 24
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert plain.config._attn_implementation == attention
    ids = torch.randint(0, VOCAB_SIZE, (2, 100))
    with torch.no_grad():
        assert close(model(ids).logits, plain(ids).logits)


@slow
def test_with_a_cache_it_answers_as_without() -> None:
    """Generation is not for chunks: there the full matrix is masked."""
    import torch

    model = model_of(config_of(), 128).eval()
    ids = torch.randint(1, VOCAB_SIZE, (1, 60), generator=torch.Generator().manual_seed(2))
    made = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        wanted = model(made).logits[0, 59:-1].argmax(-1)
    assert made[0, 60:].tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "llama"}, "needs architecture olmo3 .it is llama.*transformers and vLLM compute different"),
        ({"architecture": "qwen3"}, "needs architecture olmo3 .it is qwen3"),
        ({"sliding_window_tokens": 0}, "global_every needs sliding_window_tokens"),
    ],
)
def test_windows_that_would_not_be_served_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate(SMALL | changes)


def test_what_a_window_costs() -> None:
    model = ModelConfig.model_validate(SMALL | {"num_layers": 6, "global_every": 3})
    assert model.num_local_layers == 4
    assert ModelConfig.model_validate(SMALL | {"global_every": 0}).num_local_layers == SMALL["num_layers"]
    assert ModelConfig().num_local_layers == 0
    assert seen_tokens(8192, 6, 4, 512) == (4 * 1024 + 2 * 8192) / 6
    assert seen_tokens(512, 6, 4, 512) == seen_tokens(512, 6, 0, 0) == 512
