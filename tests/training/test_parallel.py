"""Every combination of settings is planned, or refused with the nearest one that is."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.training import parallel
from app.training.config import TrainConfig
from app.training.parallel import Devices

MOE = {"architecture": "qwen3_moe", "num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 64}
MATRIX: dict[str, list[Any]] = {
    "zero_stage": [0, 1, 2, 3],
    "offload_optimizer": ["none", "cpu", "nvme"],
    "dtype": ["float32", "bfloat16"],
    "attention": ["sdpa", "eager", "flash_attention_2", "flex_attention"],
    "min_workers": [0, 2],
    "validation": ["inline", "async"],
    "activation_checkpointing": [False, True],
    "adapter": [{}, {"rank": 4}, {"rank": 4, "load_in_4bit": True}],
    "model": [{}, {"architecture": "qwen3"}, MOE, {"architecture": "olmo3"}, {"num_layers": 2}],
    "pipeline_stages": [1, 2, 3, 4],
    "compile": [False, True],
}
DEVICES = [Devices(), *(Devices(kind, number) for kind, number in product(("cpu", "gpu"), (2, 4, 5)))]


def config_of(**changes: Any) -> TrainConfig:
    given: dict[str, Any] = {"num_workers": 4}
    given["nvme_dir"] = "/nvme" if changes.get("offload_optimizer") == "nvme" else ""
    given["init_from_uri"] = "base" if changes.get("adapter") else ""
    return TrainConfig.model_validate(given | changes)


@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in MATRIX.items()}), st.data())
@settings(max_examples=300, deadline=None)
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
        ({"attention": "flash_attention_2", "zero_stage": 0}, Devices("gpu"), {"dtype": "bfloat16", "zero_stage": 1}),
        ({"attention": "flash_attention_2"}, Devices("cpu"), {"attention": "sdpa"}),
        ({"validation": "async"}, Devices("gpu", 4), {"validation": "inline"}),
        ({"validation": "async"}, Devices("gpu", 5), {}),
        ({"adapter": {"rank": 4, "load_in_4bit": True}}, Devices(), {"zero_stage": 2}),
        ({"min_workers": 1, "offload_optimizer": "nvme"}, Devices("gpu", 4), {"min_workers": 0}),
        ({"pipeline_stages": 2}, Devices(), {"zero_stage": 1}),
        ({"pipeline_stages": 3, "zero_stage": 1}, Devices(), {"pipeline_stages": 2}),
        ({"pipeline_stages": 4, "zero_stage": 1, "model": {"num_layers": 3}}, Devices(), {"pipeline_stages": 2}),
        ({"pipeline_stages": 2, "zero_stage": 3, "model": MOE}, Devices(), {"pipeline_stages": 1}),
        ({"pipeline_stages": 2, "zero_stage": 3, "offload_optimizer": "nvme"}, Devices(), {"pipeline_stages": 1}),
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


def test_a_plan_of_stages_in_words() -> None:
    config = config_of(pipeline_stages=2, zero_stage=1, global_batch_sequences=30, micro_batch_sequences=5)
    assert parallel.plan(config, Devices("gpu", 4)).lines == [
        "2 replicas × 3 forward passes × 5 blocks",
        "pipeline of 2 stages × 2 replicas: of 3 micro-batches a step a stage waits 25.0 % for the others; "
        "a smaller micro_batch_sequences or a larger global_batch_sequences makes more of them",
    ]
    assert config.with_overrides({"storage_uri": "/nowhere"}).plan()[1].startswith("pipeline of 2 stages × 2 replicas")
