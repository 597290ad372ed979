"""The loss of packed pairs is that of the pairs one by one, and the reference is the model without its adapter."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from app.training.batches import Blocks
from app.training.feed import Feed, Share, batch_of
from app.training.sampler import Plan

pytestmark = pytest.mark.slow  # imports torch, transformers and PEFT
T, BETA = 24, 0.5
STARTS = [[0, 6, 12, 18, 22], [0, 10, 20]]  # two pairs and padding; one pair and padding


def make_blocks() -> Blocks:
    """Every document has a prompt of two tokens; the padding has no labels."""
    ids = np.random.default_rng(0).integers(0, 50, (2, T)).astype(np.int32)
    mask = np.ones((2, T), np.bool_)
    for row, starts in enumerate(STARTS):
        mask[row, starts] = False
        mask[row, np.array(starts) + 1] = False
        mask[row, starts[-1] :] = False
    flat = np.array([*STARTS[0], *STARTS[1], T], np.int32)
    return Blocks(ids, flat, np.array([0, 5, 8]), mask)


def make_model() -> Any:
    """A Llama with an adapter that changes what it says."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.training import adapter
    from app.training.config import AdapterConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=T, initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    base = copy.deepcopy(model).eval()
    adapter.add(model, AdapterConfig(rank=2, dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model.train(), base


def log_probability(model: Any, ids: Any) -> Any:
    """Of all tokens but the first two."""
    import torch

    logits = model(torch.from_numpy(ids)[None].long()).logits[0, 1:-1].log_softmax(-1)
    return logits[torch.arange(len(ids) - 2), torch.from_numpy(ids[2:]).long()].sum()


def test_packed_pairs_equal_pairs_one_by_one() -> None:
    import torch

    from app.training.preference import judge

    blocks = make_blocks()
    model, base = make_model()
    expected = torch.zeros(())
    margins = []
    for row, starts in enumerate(STARTS):
        parts = np.split(blocks.input_ids[row], starts[1:])
        for chosen, rejected in zip(parts[0:-1:2], parts[1::2], strict=False):
            now = log_probability(model, chosen) - log_probability(model, rejected)
            before = log_probability(base, chosen) - log_probability(base, rejected)
            margins.append(BETA * (now - before))
            expected = expected - torch.nn.functional.logsigmoid(margins[-1])
    expected.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}
    assert len(margins) == 3
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    batch = {name: torch.from_numpy(array) for name, array in batch_of([(blocks, 0), (blocks, 1)], 2).items()}
    for joined in (False, True):
        model.zero_grad()
        inputs = {name: tensor.view(1, -1) if joined else tensor for name, tensor in batch.items()}
        judged = judge(model, inputs, T, BETA)
        assert judged.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
        right = sum(margin.item() > 0 for margin in margins)
        assert judged.tally.tolist() == pytest.approx([right, sum(margin.item() for margin in margins), 3.0], rel=1e-4)
        judged.loss_sum.backward()
        for name, one in model.named_parameters():
            if one.requires_grad:
                difference = (one.grad - gradients[name]).abs().max()
                assert difference < 1e-4 * gradients[name].abs().max(), name
    assert model.training


def test_an_adapter_without_effect_gives_the_logarithm_of_two() -> None:
    import torch

    from app.training.preference import judge

    model, _ = make_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = {name: torch.from_numpy(array) for name, array in batch_of([(make_blocks(), 0)], 1).items()}
    judged = judge(model, batch, T, BETA)
    assert judged.loss_sum.item() == pytest.approx(2 * math.log(2))
    assert judged.tally.tolist() == [0.0, 0.0, 2.0]


def test_targets_that_no_layer_has_are_refused() -> None:
    from app.training import adapter
    from app.training.config import AdapterConfig

    _, base = make_model()
    with pytest.raises(ValueError, match=r"adapter.target_modules: .*nobody"):
        adapter.add(base, AdapterConfig(rank=2, target_modules=("nobody",)), seed=0)


def test_rows_that_fill_a_batch_up_are_no_pairs() -> None:
    import torch

    from app.training.preference import is_pair

    blocks = make_blocks()
    batch = {name: torch.from_numpy(array) for name, array in batch_of([(blocks, 0), (blocks, 1)], 1).items()}
    assert is_pair(batch, T).tolist() == [[True, True, False], [False, False, False]]


def test_the_feed_counts_pairs_and_labels_of_the_whole_batch() -> None:
    blocks = make_blocks()
    assert blocks.loss_mask is not None
    plan = Plan(0, "ab", num_rows=2, global_batch=2)
    for rank in (0, 1):
        with Feed([blocks], plan, Share(rank, 2, 1, 1, True, pairs=True), 0) as feed:
            assert feed.next().num_labels == 3
        with Feed([blocks], plan, Share(rank, 2, 1, 1, True), 0) as feed:
            made = feed.next()
        assert made.num_labels == int(blocks.loss_mask.sum())
        (batch,) = made.micro_batches
        row = 0 if (batch["input_ids"][0].numpy() == blocks.input_ids[0]).all() else 1
        assert ((batch["labels"][0] != -100).numpy() == blocks.loss_mask[row]).all()
