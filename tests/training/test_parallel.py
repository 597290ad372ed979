"""Every combination of settings is planned, or refused with the nearest one that is."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.training import parallel
from app.training.config import TrainConfig
from app.training.refusals import Devices

MOE = {"architecture": "qwen3_moe", "num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 64}
BLOCKS = {"architecture": "qwen3", "attention_block_tokens": 64, "attention_blocks": 3, "global_every": 2}
DEEPSEEK = MOE | {
    "architecture": "deepseek_v3",
    "num_shared_experts": 1,
    "latent": {"key_value_rank": 32, "rope_head_size": 16, "plain_head_size": 16, "value_head_size": 32},
}
MATRIX: dict[str, list[Any]] = {
    "zero_stage": [0, 1, 2, 3],
    "offload_optimizer": ["none", "cpu", "nvme"],
    "offload_parameters": ["none", "cpu"],
    "dtype": ["float32", "bfloat16"],
    "attention": ["sdpa", "eager", "flash_attention_2", "flex_attention"],
    "min_workers": [0, 2],
    "validation": ["inline", "async"],
    "activation_checkpointing": [False, True],
    "float8": ["none", "tensorwise"],
    "document_masking": [False, True],
    "compile": [False, True],
    "sequence_parallel": [1, 1, 2, 3, 4],
    "tensor_parallel": [1, 1, 2, 3],
    "adapter": [{}, {"rank": 4}, {"rank": 4, "load_in_4bit": True}],
    "pipeline_stages": [1, 1, 2, 3, 4],
    "model": [
        {},
        {"architecture": "qwen3"},
        {"num_key_value_heads": 2, "intermediate_size": 97, "num_layers": 2},
        MOE,
        DEEPSEEK,
        {"architecture": "olmo3"},
        BLOCKS,
    ],
}
DEVICES = [Devices(), *(Devices(kind, number) for kind, number in product(("cpu", "gpu"), (2, 4, 5)))]
DEVICES += [Devices("gpu", 4, has_float8=False)]


def config_of(**changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"num_workers": 4}
    given["nvme_dir"] = "/nvme" if changes.get("offload_optimizer") == "nvme" else ""
    given["init_from_uri"] = "base" if changes.get("adapter") else ""
    return TrainConfig.model_validate(given | changes)


@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in MATRIX.items()}), st.data())
@settings(max_examples=600, deadline=None)
def test_what_is_refused_has_a_nearest_plan_that_works(chosen: dict[str, Any], data: st.DataObject) -> None:
    devices = data.draw(st.sampled_from(DEVICES))
    config = config_of(**chosen)
    changes = parallel.nearest(config, devices)
    reasons = [refusal.reason for refusal in parallel.refusals(config, devices)]
    assert bool(changes) == bool(reasons)
    if changes:
        with pytest.raises(ValueError, match="the nearest job that works: --") as raised:
            parallel.plan(config, devices)
        assert all(reason in str(raised.value) for reason in reasons)
    for key in changes:  # none of the changes is idle
        fewer = {name: value for name, value in changes.items() if name != key}
        assert parallel.refusals(config.with_overrides(fewer), devices)
    made = parallel.plan(config.with_overrides(changes), devices)
    places = made.num_replicas * made.accumulation_steps * made.micro_batch_sequences
    assert places - made.filler_sequences == config.global_batch_sequences
    assert made.missing_devices == (max(0, 4 - devices.number) if devices.number else 0)


@pytest.mark.parametrize(
    ("changes", "devices", "nearest"),
    [
        ({}, Devices("cpu", 4), {}),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, Devices(), {"zero_stage": 1}),
        ({"zero_stage": 0, "offload_optimizer": "nvme", "dtype": "bfloat16"}, Devices(), {"zero_stage": 3}),
        ({"zero_stage": 0, "offload_parameters": "cpu", "dtype": "bfloat16"}, Devices(), {"zero_stage": 3}),
        (
            {"offload_parameters": "cpu", "zero_stage": 2, "adapter": {"rank": 4, "load_in_4bit": True}},
            Devices(),
            {"zero_stage": 3, "adapter.load_in_4bit": False},
        ),
        ({"offload_parameters": "cpu", "float8": "rowwise"}, Devices(), {"float8": "none"}),
        ({"attention": "flash_attention_2", "zero_stage": 0}, Devices("gpu"), {"dtype": "bfloat16", "zero_stage": 1}),
        ({"attention": "flash_attention_2"}, Devices("cpu"), {"attention": "sdpa"}),
        ({"validation": "async"}, Devices("gpu", 4), {"validation": "inline"}),
        ({"validation": "async"}, Devices("gpu", 5), {}),
        ({"adapter": {"rank": 4, "load_in_4bit": True}}, Devices(), {"zero_stage": 2}),
        ({"float8": "tensorwise"}, Devices("cpu", 4), {"activation_checkpointing": True}),
        ({"float8": "rowwise", "zero_stage": 0}, Devices("gpu", 4), {"dtype": "bfloat16", "zero_stage": 1}),
        ({"float8": "rowwise", "dtype": "bfloat16"}, Devices("gpu", 4, has_float8=False), {"float8": "none"}),
        ({"float8": "tensorwise", "model": MOE}, Devices("cpu", 4), {"float8": "none"}),
        ({"float8": "tensorwise", "model": BLOCKS}, Devices("cpu", 4), {"float8": "none"}),
        ({"attention": "flash_attention_2", "model": BLOCKS}, Devices("gpu", 4), {"attention": "sdpa"}),
        (
            {"compile": True, "document_masking": True, "model": BLOCKS},
            Devices(),
            {"compile": False, "document_masking": False},
        ),
        ({"tensor_parallel": 2, "model": BLOCKS}, Devices(), {"tensor_parallel": 1}),
        ({"zero_stage": 1, "offload_optimizer": "cpu", "validation": "async", "model": BLOCKS}, Devices("cpu", 5), {}),
        ({"float8": "tensorwise", "model": DEEPSEEK}, Devices("cpu", 4), {"float8": "none"}),
        ({"zero_stage": 2, "tensor_parallel": 2, "model": DEEPSEEK}, Devices(), {"tensor_parallel": 1}),
        ({"zero_stage": 1, "pipeline_stages": 2, "model": DEEPSEEK}, Devices(), {"pipeline_stages": 1}),
        ({"sequence_parallel": 2, "model": DEEPSEEK}, Devices(), {"sequence_parallel": 1}),
        ({"sequence_parallel": 4}, Devices("gpu", 4), {}),
        ({"sequence_parallel": 3}, Devices(), {"sequence_parallel": 2}),
        ({"sequence_parallel": 2, "document_masking": True}, Devices(), {"sequence_parallel": 1}),
        ({"sequence_parallel": 2, "model": MOE}, Devices(), {"sequence_parallel": 1}),
        ({"sequence_parallel": 2, "attention": "flash_attention_2"}, Devices("gpu"), {"attention": "sdpa"}),
        ({"sequence_parallel": 2, "tensor_parallel": 2}, Devices(), {"tensor_parallel": 1}),
        ({"sequence_parallel": 2, "adapter": {"rank": 4}}, Devices(), {"sequence_parallel": 1}),
        ({"tensor_parallel": 2}, Devices(), {"zero_stage": 2}),
        ({"tensor_parallel": 2, "zero_stage": 1, "min_workers": 2}, Devices(), {"min_workers": 0}),
        (
            {"tensor_parallel": 4, "zero_stage": 1, "model": {"num_key_value_heads": 2}},
            Devices(),
            {"tensor_parallel": 2},
        ),
        ({"tensor_parallel": 2, "offload_optimizer": "nvme"}, Devices(), {"tensor_parallel": 1}),
        ({"sequence_parallel": 2, "offload_parameters": "cpu"}, Devices(), {"sequence_parallel": 1}),
        ({"tensor_parallel": 2, "zero_stage": 2, "compile": True}, Devices(), {"compile": False}),
        ({"tensor_parallel": 2, "zero_stage": 2, "float8": "rowwise"}, Devices(), {"float8": "none"}),
        ({"pipeline_stages": 2}, Devices(), {"zero_stage": 1}),
        ({"pipeline_stages": 3, "zero_stage": 1}, Devices(), {"pipeline_stages": 2}),
        ({"pipeline_stages": 4, "zero_stage": 1, "model": {"num_layers": 3}}, Devices(), {"pipeline_stages": 2}),
        ({"pipeline_stages": 2, "zero_stage": 3, "model": MOE}, Devices(), {"pipeline_stages": 1}),
        ({"pipeline_stages": 2, "zero_stage": 3, "offload_optimizer": "nvme"}, Devices(), {"pipeline_stages": 1}),
        ({"pipeline_stages": 2, "sequence_parallel": 2, "zero_stage": 1}, Devices(), {"sequence_parallel": 1}),
        (
            {"pipeline_stages": 2, "attention": "flash_attention_2", "min_workers": 2, "compile": True},
            Devices("gpu"),
            {"attention": "sdpa", "min_workers": 0, "compile": False, "zero_stage": 1},
        ),
    ],
)
def test_nearest(changes: dict[str, Any], devices: Devices, nearest: dict[str, Any]) -> None:
    assert parallel.nearest(config_of(**changes), devices) == nearest


def test_a_plan_in_words() -> None:
    made = parallel.plan(config_of(global_batch_sequences=10, micro_batch_sequences=2), Devices("gpu", 3))
    assert made.lines == [
        "4 workers × 2 forward passes × 2 blocks, 6 of them filled up without weight",
        "waits for 1 more device",
    ]


def test_a_plan_of_workers_that_share() -> None:
    made = parallel.plan(config_of(sequence_parallel=2, micro_batch_sequences=4), Devices("gpu", 4))
    assert made.lines == ["2 × 2 workers that share a model × 4 forward passes × 4 blocks"]


def test_a_batch_that_is_too_small_without_sharing() -> None:
    config = config_of(sequence_parallel=4, global_batch_sequences=1, document_masking=True)
    with pytest.raises(ValueError, match=r"Ulysses drops the mask[\s\S]*\(1\) must not be below num_workers \(4\)"):
        parallel.plan(config, Devices())


def test_a_plan_of_stages_in_words() -> None:
    config = config_of(pipeline_stages=2, zero_stage=1, global_batch_sequences=30, micro_batch_sequences=5)
    assert parallel.plan(config, Devices("gpu", 4)).lines == [
        "2 × 2 workers that share a model × 3 forward passes × 5 blocks",
        "pipeline of 2 stages × 2 replicas: of 3 micro-batches a step a stage waits 25.0 % for the others; "
        "a smaller micro_batch_sequences or a larger global_batch_sequences makes more of them",
    ]
    assert config.with_overrides({"storage_uri": "/nowhere"}).plan()[1].startswith("pipeline of 2 stages × 2 replicas")
