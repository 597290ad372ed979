"""How a job is laid out over its workers, and what cannot be: a pure function of TrainConfig and the devices.

Each rule looks at one combination and gives the reason why it does not work and the setting that works instead. A
refusal names all reasons and, with all changes made, the nearest job that would run.
It does not look at memory (planning does), nor at a model to start from: layout.py does, when its settings are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from app.training.config import TrainConfig
from app.training.layout import SHAREABLE, sequence_fits, tensor_fits


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


@dataclass(frozen=True)
class ParallelPlan:
    """What each optimizer step is made of."""

    num_workers: int
    num_replicas: int  # groups of workers that see the same blocks
    accumulation_steps: int
    micro_batch_sequences: int
    filler_sequences: int  # rows without weight that fill up the last forward passes of a step
    missing_devices: int  # that the job waits for

    @property
    def lines(self) -> list[str]:
        """The plan in words."""
        passes = f"{self.accumulation_steps} forward pass{'es' if self.accumulation_steps > 1 else ''}"
        who = f"{self.num_workers} workers"
        if self.num_replicas < self.num_workers:
            who = f"{self.num_replicas} × {self.num_workers // self.num_replicas} workers that share a model"
        said = f"{who} × {passes} × {self.micro_batch_sequences} blocks"
        if self.filler_sequences:
            said += f", {self.filler_sequences} of them filled up without weight"
        waits = f"waits for {self.missing_devices} more device{'s' if self.missing_devices > 1 else ''}"
        return [said, *([waits] if self.missing_devices else [])]


Rule = Callable[[TrainConfig, Devices], Refusal | None]


def plan(config: TrainConfig, devices: Devices) -> ParallelPlan:
    """The layout of the job. Raises ValueError with every reason and the nearest job that works."""
    if reasons := [refusal.reason for refusal in refusals(config, devices)]:
        try:
            changes = nearest(config, devices)
        except ValueError as error:  # with fewer workers to share a model the batch is too small for all of them
            raise ValueError("\n".join([*reasons, str(error)])) from None
        arguments = " ".join(f"--{key} {str(value).lower()}" for key, value in changes.items())
        raise ValueError("\n".join([*reasons, f"the nearest job that works: {arguments}"]))
    passes = config.accumulation_steps(config.num_workers)
    replicas = config.num_replicas(config.num_workers)
    places = replicas * passes * config.micro_batch_sequences
    missing = max(0, config.num_workers - devices.number) if devices.number else 0
    return ParallelPlan(
        num_workers=config.num_workers,
        num_replicas=replicas,
        accumulation_steps=passes,
        micro_batch_sequences=config.micro_batch_sequences,
        filler_sequences=places - config.global_batch_sequences,
        missing_devices=missing,
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
    replaced = _shares(config)  # by sdpa, which takes both
    if config.attention == "flash_attention_2" and config.dtype == "float32" and devices.kind != "cpu" and not replaced:
        return Refusal("attention flash_attention_2: computes in 16 bits only", "dtype", "bfloat16")
    return None


def _4bit_under_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    reason = "adapter.load_in_4bit: ZeRO-3 would cut the packed weights apart"
    if config.adapter.load_in_4bit and config.offload_optimizer == "nvme":
        return Refusal(f"{reason}, and offload_optimizer nvme needs ZeRO-3", "adapter.load_in_4bit", False)
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
    if _shares(config):
        return Refusal(f"{what}: not tried where workers share a model", "float8", "none")
    if on_gpus and config.dtype == "float32":
        return Refusal(f"{what}: on GPUs the rest is computed in 16 bits", "dtype", "bfloat16")
    if config.zero_stage == 3 and not config.activation_checkpointing:
        reason = f"{what} under ZeRO-3: all gathered weights would be kept until the backward pass"
        return Refusal(reason, "activation_checkpointing", True)
    return None


def _no_device_to_score_on(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.validation == "async" and config.num_workers == devices.number:
        reason = f"validation async: all {devices.number} devices are workers', so nothing is scored before the end"
        return Refusal(reason, "validation", "inline")
    return None


def _sequence_degree(config: TrainConfig, devices: Devices) -> Refusal | None:
    degree, model = config.sequence_parallel, config.model
    fit = _sequence_fit(config)
    if fit == degree or _sequence_faults(config):
        return None
    over = f"num_workers ({config.num_workers})"
    if not config.init_from_uri:
        over += f", num_heads ({model.num_heads}) and, or be a multiple of, num_key_value_heads "
        over += f"({model.num_key_value_heads})"
    return Refusal(f"sequence_parallel {degree}: it must divide {over}", "sequence_parallel", fit)


def _sequence_alone(config: TrainConfig, devices: Devices) -> Refusal | None:
    if faults := _sequence_faults(config):
        return Refusal(f"sequence_parallel {config.sequence_parallel}: {'; '.join(faults)}", "sequence_parallel", 1)
    return None


def _tensor_degree(config: TrainConfig, devices: Devices) -> Refusal | None:
    degree, model = config.tensor_parallel, config.model
    fit = _tensor_fit(config)
    if fit == degree or _tensor_faults(config):
        return None
    over = f"num_workers ({config.num_workers})"
    if not config.init_from_uri:
        over += f", num_key_value_heads ({model.num_key_value_heads}) and intermediate_size ({model.intermediate_size})"
    return Refusal(f"tensor_parallel {degree}: it must divide {over}", "tensor_parallel", fit)


def _tensor_alone(config: TrainConfig, devices: Devices) -> Refusal | None:
    if faults := _tensor_faults(config):
        return Refusal(f"tensor_parallel {config.tensor_parallel}: {'; '.join(faults)}", "tensor_parallel", 1)
    return None


def _sequence_with_tensor(config: TrainConfig, devices: Devices) -> Refusal | None:
    if _sequence_fit(config) > 1 and _tensor_fit(config) > 1:
        reason = "sequence_parallel with tensor_parallel: DeepSpeed makes the groups of one or of the other"
        return Refusal(reason, "tensor_parallel", 1)
    return None


def _tensor_under_zero_3(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.zero_stage == 3 and _tensor_fit(config) > 1 and _sequence_fit(config) == 1:
        return Refusal("tensor_parallel with zero_stage 3: the matrices are cut already", "zero_stage", 2)
    return None


def _shared_attention(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.attention != "sdpa" and _shares(config):
        return Refusal(f"attention {config.attention}: workers that share a model use sdpa", "attention", "sdpa")
    return None


def _shared_and_compiled(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.compile and _shares(config):
        return Refusal("compile: not tried where workers share a model", "compile", False)
    return None


def _shared_and_elastic(config: TrainConfig, devices: Devices) -> Refusal | None:
    if 0 < config.min_workers < config.num_workers and _shares(config):
        return Refusal("min_workers: workers that share a model do not go on in other numbers", "min_workers", 0)
    return None


def _shared_and_scored_aside(config: TrainConfig, devices: Devices) -> Refusal | None:
    if config.validation == "async" and _shares(config):
        return Refusal("validation async: not tried where workers share a model", "validation", "inline")
    return None


def _shares(config: TrainConfig) -> bool:
    """Whether workers would share a model when all is mended that forbids it."""
    return _sequence_fit(config) > 1 or _tensor_fit(config) > 1


def _sequence_fit(config: TrainConfig) -> int:
    """The largest degree up to the one asked for that works."""
    model, workers = config.model, config.num_workers
    if _sequence_faults(config):
        return 1
    degrees = (degree for degree in range(config.sequence_parallel, 1, -1) if workers % degree == 0)
    heads = model.num_heads, model.num_key_value_heads
    return next((degree for degree in degrees if config.init_from_uri or sequence_fits(degree, *heads)), 1)


def _tensor_fit(config: TrainConfig) -> int:
    model, workers = config.model, config.num_workers
    if _tensor_faults(config):
        return 1
    degrees = (degree for degree in range(config.tensor_parallel, 1, -1) if workers % degree == 0)
    sizes = model.num_key_value_heads, model.intermediate_size
    return next((degree for degree in degrees if config.init_from_uri or tensor_fits(degree, *sizes)), 1)


def _sequence_faults(config: TrainConfig) -> list[str]:
    """Why no degree above 1 works."""
    if config.sequence_parallel == 1:
        return []
    masked = ["document_masking: Ulysses drops the mask that tells documents apart"] if config.document_masking else []
    return masked + _sharing_faults(config)


def _tensor_faults(config: TrainConfig) -> list[str]:
    return _sharing_faults(config) if config.tensor_parallel > 1 else []


def _sharing_faults(config: TrainConfig) -> list[str]:
    faults = []
    if not config.init_from_uri and config.model.architecture not in SHAREABLE:
        faults.append(f"model.architecture {config.model.architecture}: {' and '.join(SHAREABLE)} can be shared")
    if config.adapter.rank:
        faults.append("adapter.rank: adapters are not shared")
    if config.offload_optimizer == "nvme":
        faults.append("offload_optimizer nvme: not tried where workers share a model")
    return faults


_RULES: tuple[Rule, ...] = (
    _sequence_degree,
    _sequence_alone,
    _tensor_degree,
    _tensor_alone,
    _sequence_with_tensor,
    _tensor_under_zero_3,
    _shared_attention,
    _shared_and_compiled,
    _shared_and_elastic,
    _shared_and_scored_aside,
    _offload_without_zero,
    _nvme_below_zero_3,
    _bfloat16_without_zero,
    _elastic_with_nvme,
    _gpu_attention_on_cpu,
    _flash_attention_in_float32,
    _4bit_under_zero_3,
    _float8,
    _no_device_to_score_on,
)
