"""What does not work of a training job, a rule for each combination: why not, and the nearest setting that does.

Pure functions of TrainConfig and the devices; parallel.py asks them all. Of a model to start from they know nothing:
layout.py looks at its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from app.training.config import TrainConfig
from app.training.layout import SHAREABLE, sequence_fits, tensor_fits

WITH_BLOCKS = {"attention": "sdpa", "compile": False, "document_masking": False, "float8": "none"}  # tried with them
SHARING = ("pipeline_stages", "sequence_parallel", "tensor_parallel")  # ways to share a model; one at a time


@dataclass(frozen=True)
class Devices:
    """What the workers run on; before a cluster is known it may be any kind, and 0 means any number."""

    kind: Literal["any", "cpu", "gpu"] = "any"
    number: int = 0
    has_float8: bool = True  # of GPUs: that their chips multiply in 8 bits


@dataclass(frozen=True)
class Refusal:
    """Why a combination does not work, and the one setting that is nearest to it and does."""

    reason: str
    key: str
    value: Any


Rule = Callable[[TrainConfig, Devices], Refusal | None]


def _offload_without_zero(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.offload_optimizer == "cpu" and config.zero_stage == 0 and not _needs_zero_3(config):
        return Refusal("offload_optimizer cpu: without ZeRO DeepSpeed ignores it", "zero_stage", 1)
    return None


def _offload_below_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    what = _needs_zero_3(config)
    if not what or config.zero_stage == 3:
        return None
    why = "all workers have all parameters" if config.offload_parameters != "none" else "DeepSpeed keeps the states"
    return Refusal(f"{what}: below ZeRO-3 {why} in memory", "zero_stage", 3)


def _needs_zero_3(config: TrainConfig) -> str:
    """The setting that only ZeRO-3 can offload by; "" for none."""
    if config.offload_parameters != "none":
        return "offload_parameters cpu"
    return "offload_optimizer nvme" if config.offload_optimizer == "nvme" else ""


def _bfloat16_without_zero(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.dtype == "bfloat16" and config.zero_stage == 0 and not _needs_zero_3(config):
        reason = "dtype bfloat16 with zero_stage 0: DeepSpeed's optimizer for it gives other losses than ZeRO 1 to 3"
        return Refusal(reason, "zero_stage", 1)
    return None


def _gpu_attention_on_cpu(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.attention in ("flash_attention_2", "flex_attention") and devices.kind == "cpu":
        return Refusal(f"attention {config.attention}: has no backward pass on a CPU", "attention", "sdpa")
    return None


def _flash_attention_in_float32(config: TrainConfig, devices: Devices) -> Refusal | None:
    fits = devices.kind != "cpu" and not _shares(config) and not _has_blocks(config)  # else sdpa takes its place
    if config.attention == "flash_attention_2" and config.dtype == "float32" and fits:
        return Refusal("attention flash_attention_2: computes in 16 bits only", "dtype", "bfloat16")
    return None


def _4bit_under_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    reason = "adapter.load_in_4bit: ZeRO-3 would cut the packed weights apart"
    if config.adapter.load_in_4bit and (what := _needs_zero_3(config)):
        return Refusal(f"{reason}, and {what} needs ZeRO-3", "adapter.load_in_4bit", False)
    if config.adapter.load_in_4bit and config.zero_stage == 3:
        return Refusal(reason, "zero_stage", 2)
    return None


def _float8(config: TrainConfig, devices: Devices) -> Refusal | None:
    what, on_gpus = f"float8 {config.float8}", devices.kind == "gpu"
    if config.float8 == "none":
        return None
    if on_gpus and not devices.has_float8:
        reason = f"{what}: these GPUs have no FP8 (A100 and older have not); bfloat16 is what they compute in"
        return Refusal(reason, "float8", "none")
    if config.adapter.rank:
        return Refusal(f"{what}: the weights below an adapter are not converted", "float8", "none")
    if config.model.num_experts and not config.init_from_uri:
        return Refusal(f"{what}: experts are no linear layers: most of a mixture would stay as it is", "float8", "none")
    if config.offload_parameters != "none":
        return Refusal(f"{what}: not tried with offload_parameters", "float8", "none")
    if _shares(config) or _has_blocks(config):
        where = "where workers share a model" if _shares(config) else "with model.attention_block_tokens"
        return Refusal(f"{what}: not tried {where}", "float8", "none")
    if on_gpus and config.dtype == "float32":
        return Refusal(f"{what}: on GPUs the rest is computed in 16 bits", "dtype", "bfloat16")
    if config.zero_stage == 3 and not config.activation_checkpointing:
        reason = f"{what} under ZeRO-3: all gathered weights would be kept until the backward pass"
        return Refusal(reason, "activation_checkpointing", True)
    return None


def _not_tried_with_blocks(config: TrainConfig, devices: Devices, key: str) -> Refusal | None:
    now, tried = getattr(config, key), WITH_BLOCKS[key]
    if now != tried and _has_blocks(config):
        return Refusal(f"{key} {str(now).lower()}: not with model.attention_block_tokens", key, tried)
    return None


def _has_blocks(config: TrainConfig) -> bool:
    return bool(config.model.attention_block_tokens) and not config.init_from_uri


def _no_device_to_score_on(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.validation == "async" and config.num_workers == devices.number:
        reason = f"validation async: all {devices.number} devices are workers', so nothing is scored before the end"
        return Refusal(reason, "validation", "inline")
    return None


def _cannot_share(config: TrainConfig, devices: Devices, kind: str) -> Refusal | None:
    if faults := _faults(config, kind):
        return Refusal(f"{kind} {getattr(config, kind)}: {'; '.join(faults)}", kind, 1)
    return None


def _degree(config: TrainConfig, devices: Devices, kind: str) -> Refusal | None:
    degree, fit, model = getattr(config, kind), _fit(config, kind), config.model
    if fit == degree or _faults(config, kind):
        return None
    limits = {
        "pipeline_stages": f" and be at most num_layers ({model.num_layers})",
        "sequence_parallel": f", num_heads ({model.num_heads}) and, or be a multiple of, num_key_value_heads "
        f"({model.num_key_value_heads})",
        "tensor_parallel": f", num_key_value_heads ({model.num_key_value_heads}) and intermediate_size "
        f"({model.intermediate_size})",
    }
    over = f"num_workers ({config.num_workers})" + ("" if config.init_from_uri else limits[kind])
    return Refusal(f"{kind} {degree}: it must divide {over}", kind, fit)


def _one_way_to_share(config: TrainConfig, devices: Devices) -> Refusal | None:
    asked = [kind for kind in SHARING if _fit(config, kind) > 1]
    if len(asked) < 2:
        return None
    return Refusal(f"{' with '.join(asked)}: workers share a model in one of these ways", asked[-1], 1)


def _zero_stage_of_pipeline(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _way_to_share(config) != "pipeline_stages" or config.zero_stage == 1:
        return None
    why = "DeepSpeed cuts no gradients within a stage" if config.zero_stage else "each stage would clip by its own norm"
    return Refusal(f"pipeline_stages with zero_stage {config.zero_stage}: {why}", "zero_stage", 1)


def _zero_3_of_tensors(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _way_to_share(config) == "tensor_parallel" and config.zero_stage == 3:
        return Refusal("tensor_parallel with zero_stage 3: the matrices are cut already", "zero_stage", 2)
    return None


def _pipeline_with_offload(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _way_to_share(config) == "pipeline_stages" and config.offload_optimizer == "cpu":
        return Refusal("pipeline_stages with offload_optimizer cpu: not tried", "offload_optimizer", "none")
    return None


def _not_tried_where_shared(config: TrainConfig, devices: Devices, key: str, value: Any) -> Refusal | None:
    now = getattr(config, key)
    if now != value and _shares(config):
        return Refusal(f"{key} {str(now).lower()}: not tried where workers share a model", key, value)
    return None


def _elastic_where_shared(config: TrainConfig, devices: Devices) -> Refusal | None:
    if 0 < config.min_workers < config.num_workers and _shares(config):
        return Refusal("min_workers: workers that share a model do not go on in other numbers", "min_workers", 0)
    return None


def _shares(config: TrainConfig) -> bool:
    """Whether workers would share a model when all is mended that forbids it."""
    return bool(_way_to_share(config))


def _way_to_share(config: TrainConfig) -> str:
    """The way that would be left of those asked for; "" for none."""
    return next((kind for kind in SHARING if _fit(config, kind) > 1), "")


def _fit(config: TrainConfig, kind: str) -> int:
    """The largest degree up to the one asked for that works."""
    if _faults(config, kind):
        return 1
    degrees = (degree for degree in range(getattr(config, kind), 1, -1) if config.num_workers % degree == 0)
    return next((degree for degree in degrees if config.init_from_uri or _model_allows(config, kind, degree)), 1)


def _model_allows(config: TrainConfig, kind: str, degree: int) -> bool:
    model = config.model
    if kind == "pipeline_stages":
        return degree <= model.num_layers
    if kind == "sequence_parallel":
        return sequence_fits(degree, model.num_heads, model.num_key_value_heads)
    return tensor_fits(degree, model.num_key_value_heads, model.intermediate_size)


def _faults(config: TrainConfig, kind: str) -> list[str]:
    """Why no degree above 1 works, whatever else is changed."""
    if getattr(config, kind) == 1:
        return []
    faults = []
    if not config.init_from_uri and config.model.architecture not in SHAREABLE:
        faults.append(f"model.architecture {config.model.architecture}: {' and '.join(SHAREABLE)} can be shared")
    if _has_blocks(config):
        faults.append("model.attention_block_tokens: not tried where workers share a model")
    if config.adapter.rank:
        faults.append("adapter.rank: adapters are not shared")
    if what := _needs_zero_3(config):
        faults.append(f"{what}: not tried where workers share a model")
    if kind == "sequence_parallel" and config.document_masking:
        faults.append("document_masking: Ulysses drops the mask that tells documents apart")
    return faults


RULES: tuple[Rule, ...] = (
    _offload_without_zero,
    _offload_below_zero_3,
    _bfloat16_without_zero,
    _gpu_attention_on_cpu,
    _flash_attention_in_float32,
    _4bit_under_zero_3,
    _float8,
    *(partial(_not_tried_with_blocks, key=key) for key in WITH_BLOCKS if key != "float8"),
    _no_device_to_score_on,
    *(partial(_cannot_share, kind=kind) for kind in SHARING),
    *(partial(_degree, kind=kind) for kind in SHARING),
    _one_way_to_share,
    _zero_stage_of_pipeline,
    _zero_3_of_tensors,
    _pipeline_with_offload,
    partial(_not_tried_where_shared, key="attention", value="sdpa"),
    partial(_not_tried_where_shared, key="compile", value=False),
    partial(_not_tried_where_shared, key="validation", value="inline"),
    _elastic_where_shared,
)
