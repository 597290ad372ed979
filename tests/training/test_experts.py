"""The balancing loss and the load figures on models small enough to follow by hand."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.training.config import ModelConfig, TrainConfig
from app.training.engine import num_matrix_parameters
from app.training.experts import Experts, balance, count_tokens, load_values, move_biases
from app.training.families import architecture, attention_width, refuse_unwatched

MOE: dict[str, Any] = {
    "architecture": "qwen3_moe",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK: dict[str, Any] = MOE | {
    "architecture": "deepseek_v3",
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "latent": {"key_value_rank": 32, "rope_head_size": 16, "plain_head_size": 16, "value_head_size": 32},
}
SHAPE = {"vocab_size": 50, "block_tokens": 16, "end_of_text_id": 0}


def model_of(**changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = TrainConfig.model_validate({"model": MOE | changes})
    return AutoModelForCausalLM.from_config(architecture(config, SHAPE)).train()


def batch(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 50, (rows, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """The default group of this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_balance_by_hand() -> None:
    """Two experts, one choice: shares of 3/4 and 1/4, probabilities of 0.8 and 0.2; the fifth token does not count."""
    logits = torch.tensor([[0.8, 0.2]] * 4 + [[0.01, 0.99]]).log()
    chosen = torch.tensor([[0], [0], [0], [1], [1]])
    is_counted = torch.tensor([True] * 4 + [False])
    load = count_tokens(chosen, is_counted, 2)
    assert load.tolist() == [3, 1]
    assert float(balance(logits, load, is_counted)) == pytest.approx(2 * (0.75 * 0.8 + 0.25 * 0.2))
    none = count_tokens(chosen, torch.zeros(5, dtype=torch.bool), 2)
    assert (none.tolist(), float(balance(logits, none, torch.zeros(5, dtype=torch.bool)))) == ([0, 0], 0)


def test_load_values() -> None:
    values = load_values(np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    assert values == {
        "expert_load_max": 4.0,
        "expert_load_min": 0.0,
        "expert_load_entropy": 0.5,
        "expert_load_max_layer_00": 1.0,
        "expert_load_max_layer_01": 4.0,
    }


@pytest.mark.slow
def test_of_one_layer_it_is_transformers_loss() -> None:
    model, ids = model_of(num_layers=1), batch()
    wanted = model(input_ids=ids, output_router_logits=True).aux_loss
    experts = Experts.of(model)
    assert experts is not None
    loss = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item())  # pure cross-entropy
    made = experts.balanced(loss, ids)
    assert (made - loss).item() == pytest.approx(1e-3 * wanted.item(), rel=1e-3)


@pytest.mark.slow
def test_loads_are_counted_once_and_no_token_is_dropped(alone: None) -> None:
    """Neither an evaluation nor the second forward pass of activation checkpointing counts; nor do rows of no label."""
    gradients = []
    for recompute in (False, True):
        model, ids = model_of(), batch()
        experts = Experts.of(model)
        assert experts is not None
        if recompute:
            model.gradient_checkpointing_enable()
            model.config.use_cache = False
        labels = ids.clone()
        labels[3] = -100
        for _ in range(2):
            experts.balanced(model(input_ids=ids, labels=labels).loss, labels).backward()
        with torch.no_grad():
            model(input_ids=ids)
        assert experts._sums[:-2].sum() == 2 * 2 * 3 * 16 * 2  # passes, layers, rows, tokens, experts of each
        values, shares = experts.values()
        assert shares.sum(1) == pytest.approx([1, 1])
        assert values["balance_loss"] == pytest.approx(2, abs=0.3)  # 2 experts a token
        assert 1 <= values["expert_load_max"] < 2
        assert experts._sums.sum() == 0
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


@pytest.mark.slow
def test_the_loss_evens_out_the_load(alone: None) -> None:
    """A router that sends all to one expert is brought back by the balancing loss alone."""
    model, ids = model_of(experts_per_token=1, router_aux_loss_coefficient=1.0, num_layers=1), batch(32)
    experts = Experts.of(model)
    assert experts is not None
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        hidden = model.model.layers[0].post_attention_layernorm(model.model.embed_tokens(ids)).mean((0, 1))
        router.weight[0] += 4 * hidden / hidden.norm()
    optimizer = torch.optim.Adam([router.weight], lr=0.02)
    seen = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        (experts.balanced(loss, ids) - loss.detach()).backward()
        optimizer.step()
        seen.append(experts.values()[0]["expert_load_entropy"])
    assert seen[-1] > max(0.97, seen[0])


def test_a_bias_moves_against_the_load_by_hand() -> None:
    """A mean of 5 in both layers; what has it exactly stays."""
    biases = [torch.tensor([0.5, 0.0, 0.0]), torch.zeros(3)]
    move_biases(biases, np.array([[9.0, 5.0, 1.0], [4.0, 4.0, 7.0]]), 0.25)
    assert [bias.tolist() for bias in biases] == [[0.25, 0.0, 0.25], [0.25, 0.25, -0.25]]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.005])
def test_the_bias_evens_out_the_load(alone: None, rate: float) -> None:
    """Of a router that prefers one expert; without a step of the bias it stays so. An evaluation moves nothing."""
    model, ids = model_of(**DEEPSEEK), batch(32)
    experts = Experts.of(model, rate)
    assert experts is not None
    router = model.model.layers[1].mlp.gate
    hidden: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
        mean = hidden[0].reshape(-1, 64).mean(0)
        router.weight[0] += 2 * mean / mean.norm() ** 2
    seen = []
    for _ in range(60):
        with torch.no_grad():
            model(input_ids=ids)
        loss = model(input_ids=ids, labels=ids).loss
        assert experts.balanced(loss, ids) == loss
        values, shares = experts.values()
        assert "balance_loss" not in values
        seen.append(float(shares[0].max()))
    assert seen[0] > 0.4  # of two choices a token, half at most
    assert seen[-1] == pytest.approx(0.25, abs=0.03) if rate else seen[-1] == seen[0]
    assert (router.e_score_correction_bias[0] < -0.1) == bool(rate)
    assert values["router_bias_max"] == pytest.approx(float(router.e_score_correction_bias.abs().max()), abs=0.05)


@pytest.mark.slow
def test_a_dense_model_is_not_watched() -> None:
    dense = model_of(architecture="qwen3", num_experts=0, experts_per_token=0, moe_intermediate_size=0)
    assert Experts.of(dense) is None


@pytest.mark.slow
@pytest.mark.parametrize("query_rank", [0, 24])
def test_attention_is_as_wide_as_its_products(query_rank: int) -> None:
    """Keys of 32 and values of 64, by two heads; of our config and of transformers'."""
    latent = DEEPSEEK["latent"] | {"query_rank": query_rank, "value_head_size": 64}
    model = ModelConfig.model_validate(DEEPSEEK | {"latent": latent})
    made = architecture(TrainConfig(model=model), SHAPE)
    assert model.attention_width == attention_width(made) == 2 * (32 + 64) / 2
    assert made.q_lora_rank == (query_rank or None)
    dense = ModelConfig.model_validate({"head_size": 48})
    assert dense.attention_width == attention_width(architecture(TrainConfig(model=dense), SHAPE)) == 8 * 48


@pytest.mark.slow
def test_flops_count_the_active_experts() -> None:
    model = model_of(tie_embeddings=False)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert num_matrix_parameters(model) == everything - 50 * 64 - experts // 2


@pytest.mark.slow
def test_the_config_of_a_llama_is_what_it_was() -> None:
    """Fields of other families change nothing for it."""
    from transformers import LlamaConfig

    config = TrainConfig()
    plain = LlamaConfig(
        vocab_size=50,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    assert architecture(config, SHAPE).to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": 4}, "need architecture qwen3_moe or deepseek_v3"),
        ({"architecture": "qwen3_moe"}, "qwen3_moe needs num_experts"),
        (MOE | {"experts_per_token": 5}, "an experts_per_token of at most num_experts"),
        (MOE | {"num_shared_experts": 1}, "num_shared_experts, .* need architecture deepseek_v3"),
        ({"latent": {"query_rank": 8}}, "and latent need architecture deepseek_v3"),
        (MOE | {"architecture": "deepseek_v3"}, "deepseek_v3 needs num_shared_experts and, of latent, key_value_rank"),
        (DEEPSEEK | {"head_size": 32}, "head_size: deepseek_v3 takes latent.rope_head_size"),
        (DEEPSEEK | {"num_dense_layers": 2}, "num_dense_layers below num_layers"),
        (DEEPSEEK | {"latent": DEEPSEEK["latent"] | {"rope_head_size": 15}}, "multiple of 2"),
        (DEEPSEEK | {"num_experts": 1, "experts_per_token": 1}, "2 num_experts or more"),
    ],
)
def test_families_refuse_each_others_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig.model_validate(changes)


def test_a_mixture_that_nobody_evens_out_is_refused() -> None:
    refuse_unwatched({"model_type": "llama"})
    refuse_unwatched({"model_type": "qwen3_moe", "num_experts": 128})
    with pytest.raises(ValueError, match="of type deepseek_v2 is not supported; mixtral"):
        refuse_unwatched({"model_type": "deepseek_v2", "n_routed_experts": 64})
    assert math.isclose(load_values(np.full((1, 8), 1 / 8))["expert_load_entropy"], 1)
