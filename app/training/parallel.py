"""How a job is laid out over its workers, and what cannot be: a pure function of TrainConfig and the devices.

Each rule looks at one combination and gives the reason why it does not work and the setting that works instead. A
refusal names all reasons and, with all changes made, the nearest job that would run.
It does not look at memory (planning does) and knows data parallelism, ZeRO 0 to 3, and pipelines of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from app.training.config import TrainConfig
from app.training.stages import FAMILIES, describe_schedule


@dataclass(frozen=True)
class Devices:
    """What the workers run on; before a cluster is known it may be any kind, and 0 means any number."""

    kind: Literal["any", "cpu", "gpu"] = "any"
    number: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why a combination does not work, and the one setting that is nearest to it and does."""

    reason: str
    key: str
    value: Any


@dataclass(frozen=True)
class ParallelPlan:
    """What each optimizer step is made of."""

    num_workers: int
    accumulation_steps: int
    micro_batch_sequences: int
    filler_sequences: int  # rows without weight that fill up the last forward passes of a step
    missing_devices: int  # that the job waits for
    num_stages: int = 1  # of the workers, so many together are one replica
    pipeline: tuple[str, ...] = ()  # its schedule in words

    @property
    def num_replicas(self) -> int:
        """Of the model, each with its own share of the batch."""
        return self.num_workers // self.num_stages

    @property
    def lines(self) -> list[str]:
        """The plan in words."""
        passes = f"{self.accumulation_steps} forward pass{'es' if self.accumulation_steps > 1 else ''}"
        who = f"{self.num_workers} workers" if self.num_stages == 1 else f"{self.num_replicas} replicas"
        said = f"{who} × {passes} × {self.micro_batch_sequences} blocks"
        if self.filler_sequences:
            said += f", {self.filler_sequences} of them filled up without weight"
        waits = f"waits for {self.missing_devices} more device{'s' if self.missing_devices > 1 else ''}"
        return [said, *self.pipeline, *([waits] if self.missing_devices else [])]


Rule = Callable[[TrainConfig, Devices], Refusal | None]


def plan(config: TrainConfig, devices: Devices) -> ParallelPlan:
    """The layout of the job. Raises ValueError with every reason and the nearest job that works."""
    if reasons := [refusal.reason for refusal in refusals(config, devices)]:
        changes = nearest(config, devices)
        arguments = " ".join(f"--{key} {str(value).lower()}" for key, value in changes.items())
        raise ValueError("\n".join([*reasons, f"the nearest job that works: {arguments}"]))
    passes = config.accumulation_steps(config.num_workers)
    places = config.num_workers // config.pipeline_stages * passes * config.micro_batch_sequences
    missing = max(0, config.num_workers - devices.number) if devices.number else 0
    return ParallelPlan(
        num_workers=config.num_workers,
        accumulation_steps=passes,
        micro_batch_sequences=config.micro_batch_sequences,
        filler_sequences=places - config.global_batch_sequences,
        missing_devices=missing,
        num_stages=config.pipeline_stages,
        pipeline=tuple(describe_schedule(config.pipeline_stages, config.num_workers, passes)),
    )


def refusals(config: TrainConfig, devices: Devices) -> list[Refusal]:
    """What does not work of the job, a refusal for each setting that has to change."""
    found = (rule(config, devices) for rule in _RULES)
    return [refusal for refusal in found if refusal]


def nearest(config: TrainConfig, devices: Devices) -> dict[str, Any]:
    """Dotted settings that make the job one that works; {} when it does already."""
    changes: dict[str, Any] = {}
    for _ in _RULES:  # a change may make another rule speak, each at most once
        for refusal in refusals(config, devices):
            changes[refusal.key] = refusal.value
            config = config.with_overrides({refusal.key: refusal.value})
    assert not refusals(config, devices), "two rules contradict each other"
    return changes


def _offload_without_zero(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.offload_optimizer == "cpu" and config.zero_stage == 0:
        return Refusal("offload_optimizer cpu: without ZeRO DeepSpeed ignores it", "zero_stage", 1)
    return None


def _nvme_below_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.offload_optimizer == "nvme" and config.zero_stage < 3:
        return Refusal("offload_optimizer nvme: below ZeRO-3 DeepSpeed keeps the states in memory", "zero_stage", 3)
    return None


def _bfloat16_without_zero(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.dtype == "bfloat16" and config.zero_stage == 0 and config.offload_optimizer != "nvme":
        reason = "dtype bfloat16 with zero_stage 0: DeepSpeed's optimizer for it gives other losses than ZeRO 1 to 3"
        return Refusal(reason, "zero_stage", 1)
    return None


def _elastic_with_nvme(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.offload_optimizer == "nvme" and 0 < config.min_workers < config.num_workers:
        reason = "min_workers with offload_optimizer nvme: states on a node's disk do not move to other workers"
        return Refusal(reason, "min_workers", 0)
    return None


def _gpu_attention_on_cpu(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.attention in ("flash_attention_2", "flex_attention") and devices.kind == "cpu":
        return Refusal(f"attention {config.attention}: has no backward pass on a CPU", "attention", "sdpa")
    return None


def _flash_attention_in_float32(config: TrainConfig, devices: Devices) -> Refusal | None:
    fits = config.pipeline_stages == 1 and devices.kind != "cpu"  # else another rule changes it
    if config.attention == "flash_attention_2" and config.dtype == "float32" and fits:
        return Refusal("attention flash_attention_2: computes in 16 bits only", "dtype", "bfloat16")
    return None


def _4bit_under_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    reason = "adapter.load_in_4bit: ZeRO-3 would cut the packed weights apart"
    if config.adapter.load_in_4bit and config.offload_optimizer == "nvme":
        return Refusal(f"{reason}, and offload_optimizer nvme needs ZeRO-3", "adapter.load_in_4bit", False)
    if config.adapter.load_in_4bit and config.zero_stage == 3:
        return Refusal(reason, "zero_stage", 2)
    return None


def _no_device_to_score_on(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.validation == "async" and config.num_workers == devices.number:
        reason = f"validation async: all {devices.number} devices are workers', so nothing is scored before the end"
        return Refusal(reason, "validation", "inline")
    return None


def _not_cut_into_stages(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.pipeline_stages == 1 or not (uncut := _uncut(config)):
        return None
    return Refusal(f"pipeline_stages with {uncut}", "pipeline_stages", 1)


def _uncut(config: TrainConfig) -> str:
    """What of the job stages do not go with, and why; "" if nothing is against them."""
    if config.adapter.rank:
        return "adapter.rank: an adapter is not cut into stages"
    if config.model.architecture not in FAMILIES and not config.init_from_uri:
        return f"model.architecture {config.model.architecture}: only {' and '.join(FAMILIES)} are cut into stages"
    if config.offload_optimizer == "nvme":
        return "offload_optimizer nvme: it needs ZeRO-3, which has no stages"
    return ""


def _is_pipeline(config: TrainConfig) -> bool:
    return config.pipeline_stages > 1 and not _uncut(config)


def _stages_do_not_divide(config: TrainConfig, devices: Devices) -> Refusal | None:
    num_stages, num_workers = config.pipeline_stages, config.num_workers
    most = num_stages if config.init_from_uri else min(num_stages, config.model.num_layers)
    fitting = max(number for number in range(1, most + 1) if num_workers % number == 0)
    if not _is_pipeline(config) or fitting == num_stages:
        return None
    if num_workers % num_stages:
        reason = f"pipeline_stages {num_stages}: does not divide num_workers ({num_workers})"
    else:
        reason = f"pipeline_stages {num_stages}: more than model.num_layers ({config.model.num_layers})"
    return Refusal(reason, "pipeline_stages", fitting)


def _pipeline_beside_zero_1(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _is_pipeline(config) and config.zero_stage == 0:
        return Refusal("pipeline_stages with zero_stage 0: each stage would clip by its own norm", "zero_stage", 1)
    if _is_pipeline(config) and config.zero_stage > 1:
        reason = f"pipeline_stages with zero_stage {config.zero_stage}: DeepSpeed cuts no gradients within a stage"
        return Refusal(reason, "zero_stage", 1)
    return None


def _pipeline_with_offload(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _is_pipeline(config) and config.offload_optimizer == "cpu":
        return Refusal("pipeline_stages with offload_optimizer cpu: not tried", "offload_optimizer", "none")
    return None


def _pipeline_attention(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _is_pipeline(config) and config.attention not in ("sdpa", "eager"):
        return Refusal(f"pipeline_stages with attention {config.attention}: not tried", "attention", "sdpa")
    return None


def _elastic_pipeline(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _is_pipeline(config) and 0 < config.min_workers < config.num_workers:
        reason = "pipeline_stages with min_workers: the stages' checkpoints are for one number of workers"
        return Refusal(reason, "min_workers", 0)
    return None


def _compiled_pipeline(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _is_pipeline(config) and config.compile:
        return Refusal("pipeline_stages with compile: not tried", "compile", False)
    return None


_RULES: tuple[Rule, ...] = (
    _offload_without_zero,
    _nvme_below_zero_3,
    _bfloat16_without_zero,
    _elastic_with_nvme,
    _gpu_attention_on_cpu,
    _flash_attention_in_float32,
    _4bit_under_zero_3,
    _no_device_to_score_on,
    _not_cut_into_stages,
    _stages_do_not_divide,
    _pipeline_beside_zero_1,
    _pipeline_with_offload,
    _pipeline_attention,
    _elastic_pipeline,
    _compiled_pipeline,
)
