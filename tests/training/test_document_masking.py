"""A packed block trains as its documents do one by one: what transformers makes of position_ids that restart."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from app.training.batches import Blocks
from app.training.feed import Feed, Share
from app.training.sampler import Plan

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.slow  # imports torch and transformers
T, VOCAB_SIZE = 24, 50
STARTS = [[5, 6, 14], [0, 9, 23]]  # a block that begins inside a document, and one that begins with one


def make_model(attention: str, use_cache: bool = False) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
        initializer_range=0.3,  # attention that is far from even
        use_cache=use_cache,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).train()


def packed(masking: bool) -> dict[str, "torch.Tensor"]:
    """The two blocks as one micro-batch."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, T)).astype(np.int32)
    flat = np.array([*STARTS[0], *STARTS[1], T], np.int32)
    blocks = Blocks(ids, flat, np.array([0, 3, 6]))
    with Feed([blocks], Plan(0, "ab", 2, 2), Share(0, 1, 2, 1, masking), 0) as feed:
        made = feed.next()
    assert made.num_labels == 2 * (T - 1) - (5 if masking else 0)
    return made.micro_batches[0]


def documents() -> list["torch.Tensor"]:
    """The parts of documents in the two blocks, each [1, length]."""
    import torch

    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, T))
    parts = [part for row, starts in zip(ids, STARTS, strict=True) for part in np.split(row, starts)]
    return [torch.from_numpy(part)[None] for part in parts if len(part) > 1]


def loss_and_gradients(
    model: Any, inputs: list[dict[str, "torch.Tensor"]], **options: bool
) -> tuple[float, dict[str, "torch.Tensor"]]:
    """The summed loss of all inputs, and its gradients."""
    model.zero_grad()
    total = sum(model(**given, num_items_in_batch=1, **options).loss for given in inputs)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return float(total.detach()), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_packed_block_equals_its_documents(attention: str, joined: bool) -> None:
    """Also with the rows of the micro-batch joined to one, the only form that flash attention takes documents from."""
    import torch

    model = make_model(attention)
    one_by_one = [{"input_ids": document, "labels": document} for document in documents()]
    expected_loss, expected = loss_and_gradients(model, one_by_one)
    batch = packed(masking=True)
    if joined:
        batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
    loss, gradients = loss_and_gradients(model, [batch])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max())), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_masking_documents_see_each_other(attention: str) -> None:
    """The same labels, so that only attention and positions differ."""
    model = make_model(attention)
    masked, plain = packed(masking=True), packed(masking=False)
    loss, gradients = loss_and_gradients(model, [masked])
    other_loss, others = loss_and_gradients(model, [{**plain, "labels": masked["labels"]}])
    assert abs(loss - other_loss) > 0.01 * loss
    assert all((gradient - others[name]).abs().max() > 1e-3 for name, gradient in gradients.items())


def test_a_cache_must_be_turned_off() -> None:
    """transformers looks for documents only where there is no cache, and exported models ask for one."""
    exported, masked = make_model("sdpa", use_cache=True), [packed(masking=True)]
    expected, _ = loss_and_gradients(make_model("sdpa"), masked)
    assert loss_and_gradients(exported, masked, use_cache=False)[0] == expected
    assert abs(loss_and_gradients(exported, masked)[0] - expected) > 0.01 * expected
