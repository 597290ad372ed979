from typing import Any

import pytest
import torch

from app.training.config import ModelConfig, OptimizerConfig, TrainConfig
from app.training.engine import fresh_model, parameter_groups, set_learning_rate

pytestmark = pytest.mark.slow  # transformers
WIDE = ModelConfig(
    hidden_size=128, intermediate_size=96, num_layers=1, num_heads=4, num_key_value_heads=2, tie_embeddings=False
)


def groups_of(**optimizer: Any) -> list[dict[str, Any]]:
    model = fresh_model(TrainConfig(model=WIDE), {"vocab_size": 50, "block_tokens": 8, "end_of_text_id": 0})
    return parameter_groups(model.named_parameters(), OptimizerConfig(**optimizer), WIDE.hidden_size)


def test_matrices_decay_and_embeddings_and_vectors_do_not() -> None:
    matrices, others = groups_of(weight_decay=0.3)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert len(matrices["params"]) == 4 + 3 + 1  # attention, SwiGLU, output
    assert sorted(tuple(one.shape) for one in others["params"]) == [(50, 128), (128,), (128,), (128,)]


def test_matrices_of_a_wider_model_take_less_of_the_learning_rate() -> None:
    """From 32 to 128 wide: a quarter, and it is kept with the optimizer's states."""
    first = torch.optim.AdamW(groups_of(found_at_hidden_size=32))
    again = torch.optim.AdamW(groups_of(found_at_hidden_size=32))
    again.load_state_dict(first.state_dict())
    for optimizer in (first, again):
        set_learning_rate(optimizer, 0.02)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.02])


def test_without_a_width_all_weights_take_the_learning_rate() -> None:
    optimizer = torch.optim.AdamW(groups_of())
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


def test_a_step_changes_what_wide_matrices_put_out_as_much_as_narrow_ones() -> None:
    """The reason for it: Adam's first step moves each weight by the rate, and their effects add up over the width."""
    changes = []
    for width in (64, 1024):
        layer = torch.nn.Linear(width, 8, bias=False)
        inputs = torch.ones(1, width)
        settings = OptimizerConfig(found_at_hidden_size=64, weight_decay=0.0)
        optimizer = torch.optim.AdamW(parameter_groups(layer.named_parameters(), settings, width))
        before = layer(inputs)
        before.sum().backward()
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        changes.append(float((layer(inputs) - before).detach().abs().mean()))
    assert changes == pytest.approx([0.064, 0.064], rel=1e-3)
