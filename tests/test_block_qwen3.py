"""A Qwen3 with layers that see chosen blocks: what it computes, what its folder says, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app import block_attention

pytestmark = pytest.mark.slow  # imports transformers
VOCAB_SIZE, LENGTH = 50, 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 300,
    "initializer_range": 0.2,
}
BLOCKS = {"attention_block_tokens": 8, "attention_blocks": 3}


def model_of(**changes: Any) -> Any:
    """Fresh weights, and large ones, so that attention is far from even."""
    from app.block_qwen3 import BlockSparseQwen3Config, BlockSparseQwen3ForCausalLM, register

    register()
    torch.manual_seed(0)
    return BlockSparseQwen3ForCausalLM(BlockSparseQwen3Config(**SIZES | BLOCKS | changes))


def tokens(length: int = LENGTH, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(0))


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: block_attention.Blocks) -> torch.Tensor:
    mask = block_attention.choice_mask(query, key, blocks)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=blocks.scale, enable_gqa=True
    )


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_trains_as_with_the_masked_matrix(monkeypatch: pytest.MonkeyPatch, every: int, recompute: bool) -> None:
    """Loss and all gradients, also where activations are computed again."""
    figures = []
    for attend in (block_attention.attend, masked):
        monkeypatch.setattr("app.block_qwen3.attend", attend)
        model = model_of(global_every=every).train()
        if recompute:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        figures.append((float(loss.detach()), {name: one.grad for name, one in model.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = figures
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, wanted in expected.items():
        assert float((gradients[name] - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max())), name


def test_up_to_the_blocks_that_are_seen_it_is_a_qwen3() -> None:
    """With the same weights: equal within 3 blocks of 8, other beyond them, and equal again if each layer sees all."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    chosen, every = model_of().eval(), model_of(global_every=1).eval()
    dense = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    dense.load_state_dict(chosen.state_dict())
    with torch.no_grad():
        wanted, found, whole = (model(tokens()).logits for model in (dense, chosen, every))
    distance = (found - wanted).abs().amax((0, 2))
    assert float(distance[:24].max()) < 1e-4
    assert float(distance[24:].min()) > 0.01
    assert float((whole - wanted).abs().max()) < 1e-4


def test_a_later_token_changes_no_earlier_answer() -> None:
    model, changed = model_of(global_every=2).eval(), tokens()
    changed[:, 60] = (changed[:, 60] + 1) % VOCAB_SIZE
    with torch.no_grad():
        distance = (model(tokens()).logits - model(changed).logits).abs().amax((0, 2))
    assert float(distance[:60].max()) < 1e-5
    assert float(distance[60:].max()) > 0.01


def test_with_a_cache_it_answers_as_without() -> None:
    model = model_of(global_every=2).eval()
    made = model.generate(
        tokens(60, 1), max_new_tokens=30, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        wanted = model(made).logits[0, 59:-1].argmax(-1)
    assert made[0, 60:].tolist() == wanted.tolist()


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_a_folder_is_read_back_whatever_attention_is_asked_for(tmp_path: Path, attention: str | None) -> None:
    from transformers import AutoModelForCausalLM

    from app.models import load_model

    model = model_of(global_every=2).eval()
    model.save_pretrained(tmp_path)
    read = (
        load_model(tmp_path)
        if attention is None
        else AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    )
    read.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(read(tokens()).logits, model(tokens()).logits)


def test_without_our_code_a_folder_is_refused(tmp_path: Path) -> None:
    """transformers does not take it for the Qwen3 that its weights would fit."""
    model_of().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == (
        "block_sparse_qwen3",
        ["BlockSparseQwen3ForCausalLM"],
    )
    assert "auto_map" not in settings  # nothing to execute
    assert {name: settings[name] for name in BLOCKS} == BLOCKS
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "block_sparse_qwen3" in done.stderr.splitlines()[-1] or "`block_sparse_qwen3`" in done.stderr


def test_a_config_without_blocks_is_refused() -> None:
    from app.block_qwen3 import BlockSparseQwen3Config

    with pytest.raises(ValueError, match="attention_block_tokens and attention_blocks must be set"):
        BlockSparseQwen3Config(**SIZES, attention_block_tokens=8)


def test_padding_and_documents_are_refused() -> None:
    model, ids = model_of(), tokens()
    ones = torch.ones_like(ids)
    assert model(ids, attention_mask=ones).logits.shape == (2, LENGTH, VOCAB_SIZE)
    padded = ones.clone()
    padded[1, :3] = 0
    with pytest.raises(ValueError, match="padding, packed documents"):
        model(ids, attention_mask=padded)
    restarts = torch.arange(LENGTH).remainder(60).repeat(2, 1)
    with pytest.raises(ValueError, match="padding, packed documents"):
        model(ids, position_ids=restarts, use_cache=False)
    with pytest.raises(ValueError, match="masks and attention_dropout"):
        model(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
