"""Sizes worked out by hand or published, and the ones that transformers and autograd come to."""

import random
from typing import Any

import pytest

from app.planning.estimate import (
    Shape,
    activation_bytes_per_token,
    checkpoint_bytes,
    key_value_bytes_per_token,
    memory_of,
    serving_bytes,
    training_days,
    training_flops,
)
from app.planning.parts import Part, parts_of
from app.training.config import ModelConfig, TrainConfig
from app.training.sizes import count_parameters

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_layers": 32,
    "num_heads": 32,
    "num_key_value_heads": 32,
    "tie_embeddings": False,
}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
QWEN3_30B_A3B = {
    "architecture": "qwen3_moe",
    "hidden_size": 2048,
    "num_layers": 48,
    "num_heads": 32,
    "num_key_value_heads": 4,
    "head_size": 128,
    "tie_embeddings": False,
    "num_experts": 128,
    "experts_per_token": 8,
    "moe_intermediate_size": 768,
}
QWEN3_8B = LLAMA_3_8B | {"architecture": "qwen3", "intermediate_size": 12288, "num_layers": 36}


DEEPSEEK_V3 = {
    "architecture": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_layers": 61,
    "num_heads": 128,
    "tie_embeddings": False,
    "num_experts": 256,
    "experts_per_token": 8,
    "moe_intermediate_size": 2048,
    "num_shared_experts": 1,
    "num_dense_layers": 3,
    "routed_scaling_factor": 2.5,
    "latent": {
        "key_value_rank": 512,
        "query_rank": 1536,
        "rope_head_size": 64,
        "plain_head_size": 128,
        "value_head_size": 128,
    },
}
DEEPSEEK: dict[str, Any] = {  # what of a small one has no counterpart in other families
    "architecture": "deepseek_v3",
    "num_shared_experts": 1,
    "latent": {
        "key_value_rank": 48,
        "query_rank": 40,
        "rope_head_size": 16,
        "plain_head_size": 16,
        "value_head_size": 32,
    },
}


def model_of(settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(settings)


def train_of(model: dict[str, Any] = LLAMA_2_7B, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": model, "micro_batch_sequences": 1, "dtype": "bfloat16", **settings})


def whole(config: TrainConfig) -> Part:
    (part,) = parts_of(config, vocab_size=64, num_devices=1)
    return part


@pytest.mark.parametrize(
    ("model", "vocab_size", "total", "active"),
    [
        (LLAMA_2_7B, 32_000, 6_738_415_616, 6_738_415_616),
        (LLAMA_3_8B, 128_256, 8_030_261_248, 8_030_261_248),
        (QWEN3_8B, 151_936, 8_190_735_360, 8_190_735_360),
        (QWEN3_30B_A3B, 151_936, 30_532_122_624, 3_353_032_704),
        (DEEPSEEK_V3, 129_280, 671_026_404_352, 37_552_282_624),
    ],
    ids=["Llama-2-7B", "Llama-3-8B", "Qwen3-8B", "Qwen3-30B-A3B", "DeepSeek-V3"],
)
def test_published_models(model: dict[str, Any], vocab_size: int, total: int, active: int) -> None:
    count = count_parameters(model_of(model), vocab_size)
    assert (count.total, count.active) == (total, active)
    assert count.multiplied == active - vocab_size * model["hidden_size"]


def random_model(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4])
    model: dict[str, Any] = {
        "architecture": draw.choice(["llama", "qwen3", "qwen3_moe", "deepseek_v3", "olmo3"]),
        "hidden_size": 32 * heads,
        "intermediate_size": 32 * draw.randint(1, 5),
        "num_layers": draw.randint(1, 4),
        "num_heads": heads,
        "num_key_value_heads": draw.choice([size for size in (1, 2, 4) if heads % size == 0]),
        "head_size": draw.choice([0, 16, 64]),
        "tie_embeddings": draw.random() < 0.5,
    }
    if model["architecture"] == "qwen3" and draw.random() < 0.5:
        model |= {"attention_block_tokens": 8, "attention_blocks": 3}
    if model["architecture"] == "deepseek_v3":
        sizes = {"key_value_rank": 48, "rope_head_size": 8, "plain_head_size": draw.choice([8, 24])}
        model |= {
            "head_size": 0,
            "num_shared_experts": draw.randint(1, 2),
            "num_dense_layers": draw.randrange(model["num_layers"]),
            "latent": sizes | {"query_rank": draw.choice([0, 40]), "value_head_size": draw.choice([16, 32])},
        }
    if model["architecture"] in ("qwen3_moe", "deepseek_v3"):
        experts = draw.randint(2, 6)
        model |= {
            "num_experts": experts,
            "experts_per_token": draw.randint(1, experts),
            "moe_intermediate_size": 32 * draw.randint(1, 3),
        }
    return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_parameters_are_those_of_transformers(seed: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from app.training.engine import num_matrix_parameters
    from app.training.families import architecture

    config = train_of(random_model(seed))
    with torch.device("meta"):
        made = architecture(config, {"vocab_size": 300, "block_tokens": 64, "end_of_text_id": 0})
        model = AutoModelForCausalLM.from_config(made)
    count = count_parameters(config.model, 300)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.multiplied == num_matrix_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [
        {},
        {"architecture": "qwen3", "num_key_value_heads": 2},
        {"architecture": "qwen3_moe", "num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 96},
        DEEPSEEK | {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 96, "num_dense_layers": 1},
        DEEPSEEK | {"num_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 96, "num_shared_experts": 2},
        {"architecture": "olmo3"},
        {"architecture": "olmo3", "sliding_window_tokens": 64, "global_every": 3},
        {"architecture": "olmo3", "sliding_window_tokens": 24},
        {"architecture": "qwen3", "attention_block_tokens": 16, "attention_blocks": 3, "global_every": 3},
        {"architecture": "qwen3", "num_key_value_heads": 2, "attention_block_tokens": 24, "attention_blocks": 2},
    ],
    ids=[
        "llama",
        "qwen3",
        "qwen3_moe",
        "deepseek_v3",
        "two shared",
        "olmo3",
        "local and global",
        "local",
        "blocks and global",
        "blocks",
    ],
)
def test_activations_are_what_autograd_keeps(dtype: str, family: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from app.training.families import architecture

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_layers": 3, "num_heads": 4, "num_key_value_heads": 4}
    config = train_of(sizes | {"tie_embeddings": False} | family, dtype=dtype)
    shape = {"vocab_size": 64, "block_tokens": 128, "end_of_text_id": 0}
    model = AutoModelForCausalLM.from_config(architecture(config, shape), dtype=getattr(torch, dtype))
    model.config.use_cache = False
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.randint(0, 64, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=input_ids, labels=input_ids)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / input_ids.numel()
    float32_logits = 4 * 64
    assert activation_bytes_per_token(whole(config), Shape(64, 128)) + float32_logits == pytest.approx(found, rel=0.02)


@pytest.mark.slow
def test_tiles_are_as_high_as_they_are() -> None:
    from app.block_attention import TILE_ROWS
    from app.planning import estimate

    assert estimate._TILE_ROWS == TILE_ROWS


@pytest.mark.parametrize(
    ("settings", "bytes_per_parameter"),
    [
        ({"zero_stage": 1}, (2, 2, 12 / 8, 0)),
        ({"zero_stage": 2}, (2, 2 / 8, 12 / 8, 0)),
        ({"zero_stage": 3}, (2 / 8, 2 / 8, 12 / 8, 0)),
        ({"zero_stage": 0, "dtype": "float32"}, (4, 4, 8, 0)),
        ({"zero_stage": 3, "dtype": "float32"}, (4 / 8, 4 / 8, 12 / 8, 0)),
        ({"zero_stage": 3, "offload_optimizer": "cpu"}, (2 / 8, 0, 0, 16 / 8)),
        ({"zero_stage": 1, "offload_optimizer": "cpu"}, (2, 2, 0, 16 / 8)),
        ({"zero_stage": 3, "offload_parameters": "cpu"}, (0, 2 / 8, 12 / 8, 2 / 8)),
        ({"zero_stage": 3, "offload_parameters": "cpu", "offload_optimizer": "cpu"}, (0, 0, 0, 18 / 8)),
    ],
    ids=str,
)
def test_states_by_zero_stage(settings: dict[str, Any], bytes_per_parameter: tuple[float, ...]) -> None:
    """Rajbhandari et al. 2020, figure 1, for 8 devices: 16 bytes a parameter, divided up stage by stage."""
    memory = memory_of(train_of(**settings), Shape(32_000, 4096), 8)
    total = 6_738_415_616
    found = (memory.weights, memory.gradients, memory.optimizer, memory.host)
    assert found == pytest.approx([total * b for b in bytes_per_parameter])


@pytest.mark.parametrize(
    ("stage", "measured"),
    [(0, (119.5, 119.5, 238.9)), (1, (119.5, 119.5, 179.2)), (2, (119.5, 68.5, 179.2)), (3, (59.8, 59.7, 179.2))],
)
def test_states_that_were_counted_on_two_ranks(stage: int, measured: tuple[float, ...]) -> None:
    """MiB in benchmarks/results/training_memory.txt; at stage 2 it counted a bucket of gradients with the shard."""
    model = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 8, "num_heads": 8, "num_key_value_heads": 4}
    config = train_of(model | {"tie_embeddings": False}, zero_stage=stage, dtype="float32")
    memory = memory_of(config, Shape(6000, 128), 2)
    planned = [size / 2**20 for size in (memory.weights, memory.gradients, memory.optimizer)]
    assert planned == pytest.approx(measured, abs=9 if stage == 2 else 0.2)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("stages", [2, 3, 7])
def test_stages_have_the_model_between_them(stages: int, tie: bool) -> None:
    batch = {"num_workers": 2 * stages, "global_batch_sequences": 8}
    config = train_of(LLAMA_3_8B | {"tie_embeddings": tie}, pipeline_stages=stages, **batch)
    parts = parts_of(config, 32_000, 2 * stages)
    total = count_parameters(config.model, 32_000).total + (32_000 * 4096 if tie else 0)  # both ends have it
    assert sum(part.parameters.total for part in parts) == total
    assert [part.passes for part in parts] == [min(4, stages - index) for index in range(stages)]  # 4 in a step
    assert [part.is_last for part in parts] == [False] * (stages - 1) + [True]


def test_matrices_are_shared_and_what_is_between_them_is_not() -> None:
    config = train_of(LLAMA_3_8B, tensor_parallel=4, num_workers=8, zero_stage=1)
    count = count_parameters(config.model, 32_000)
    held = (count.attention + count.mlp + count.head) / 4 + count.embedding + count.norms
    memory = memory_of(config, Shape(32_000, 4096), 8)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * held, 2 * held, 12 * held / 2)
    layer = 16 * 4096 + (4 * 4096 + 4 * 1024 + 4 * 32 + 8 * 14336) / 4  # norms; q, k, v, the result, and SwiGLU
    assert memory.activations == 4096 * (32 * layer + 8 * 4096)


def test_tokens_are_shared_and_states_over_all_workers() -> None:
    alone, shared = (
        memory_of(train_of(num_workers=8, zero_stage=3, sequence_parallel=degree), Shape(32_000, 4096), 8)
        for degree in (1, 4)
    )
    assert (shared.weights, shared.gradients, shared.optimizer) == (alone.weights, alone.gradients, alone.optimizer)
    assert shared.logits == alone.logits / 4
    traded = 1024 * 32 * 2 * 4096  # the result of its heads
    assert shared.activations == alone.activations / 4 + traded


@pytest.mark.parametrize(
    ("way", "counted"),
    [
        ({}, (119.5, 179.2, 171.3)),
        ({"sequence_parallel": 2}, (119.5, 179.2, 89.7)),
        ({"sequence_parallel": 2, "zero_stage": 3}, (59.8, 179.2, 89.7)),
        ({"tensor_parallel": 2}, (65.6, 196.8, 111.2)),
        ({"pipeline_stages": 2}, (59.7, 179.2, 169.4)),
    ],
    ids=str,
)
def test_what_was_counted_where_two_ranks_share(way: dict[str, int], counted: tuple[float, ...]) -> None:
    """MiB in benchmarks/results/training_memory.txt: weights, optimizer states, what autograd keeps."""
    model = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 8, "num_heads": 8, "num_key_value_heads": 4}
    settings = {"zero_stage": 1, "dtype": "float32", "num_workers": 2, "micro_batch_sequences": 2} | way
    config = train_of(model | {"tie_embeddings": False}, global_batch_sequences=8, **settings)
    memory = memory_of(config, Shape(6000, 256), 2)
    planned = [size / 2**20 for size in (memory.weights, memory.optimizer, memory.activations)]
    assert planned == pytest.approx(counted, rel=0.005)


def test_activations_by_hand() -> None:
    """Llama-2-7B in bfloat16, a token of one layer: two norms 16 H, attention 8 H and 4 a head, SwiGLU 8 I."""
    layer = 24 * 4096 + 4 * 32 + 8 * 11008
    ends = 6 * 4096 + 2 * 4096
    kept = activation_bytes_per_token(whole(train_of()), Shape(32_000, 4096))
    again = activation_bytes_per_token(whole(train_of(activation_checkpointing=True)), Shape(32_000, 4096))
    assert kept == 32 * layer + ends
    assert again == 2 * 32 * 4096 + layer + ends


def test_the_score_matrix_counts_where_it_is_kept() -> None:
    sdpa, eager = (
        activation_bytes_per_token(whole(train_of(attention=name)), Shape(32_000, 4096)) for name in ("sdpa", "eager")
    )
    assert eager - sdpa == 32 * 32 * 4096 * 6


def test_a_window_takes_its_share_of_the_flops() -> None:
    dense = {"architecture": "olmo3", "hidden_size": 512, "num_layers": 8, "num_heads": 8}
    windows = train_of(dense | {"sliding_window_tokens": 256, "global_every": 4})
    saved = training_flops(train_of(dense), Shape(6000, 4096)) - training_flops(windows, Shape(6000, 4096))
    assert saved == 12 * 6 * 512 * (4096 - 2 * 256)


def test_time_and_storage() -> None:
    config, shape = train_of(), Shape(32_000, 4096)
    flops = training_flops(config, shape)
    assert flops == 6 * (6_738_415_616 - 32_000 * 4096) + 12 * 32 * 4096 * 4096
    assert training_days(flops * 1e12, 1024, 312e12, 0.5) == pytest.approx(3.3, rel=0.02)
    assert [checkpoint_bytes(train_of(zero_stage=stage), 1000) for stage in (1, 2, 3)] == [14_000, 14_000, 12_000]
    assert key_value_bytes_per_token(model_of(LLAMA_2_7B)) == 512 * 1024
    assert key_value_bytes_per_token(model_of(DEEPSEEK_V3)) == 2 * 61 * 576
    assert serving_bytes(model_of(LLAMA_2_7B), 32_000, quantized=False) == 2 * 6_738_415_616
    assert 3.5e9 < serving_bytes(model_of(LLAMA_2_7B), 32_000, quantized=True) < 4.0e9
