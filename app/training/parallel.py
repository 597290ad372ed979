"""How a job is laid out over its workers, and what cannot be: a pure function of TrainConfig and the devices.

What does not work is refused with all reasons of the rules in refusals.py and, with all changes made, the nearest job
that would run.
It does not look at memory (planning does), nor at a model to start from: layout.py does, when its settings are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.training.config import TrainConfig
from app.training.refusals import RULES, Devices, Refusal
from app.training.stages import describe_schedule


@dataclass(frozen=True)
class ParallelPlan:
    """What each optimizer step is made of."""

    num_workers: int
    num_replicas: int  # groups of workers that see the same blocks
    accumulation_steps: int
    micro_batch_sequences: int
    filler_sequences: int  # rows without weight that fill up the last forward passes of a step
    missing_devices: int  # that the job waits for
    pipeline: tuple[str, ...] = ()  # its schedule in words

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
        return [said, *self.pipeline, *([waits] if self.missing_devices else [])]


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
        pipeline=tuple(describe_schedule(config.pipeline_stages, config.num_workers, passes)),
    )


def refusals(config: TrainConfig, devices: Devices) -> list[Refusal]:
    """What does not work of the job, a refusal for each setting that has to change."""
    found = (rule(config, devices) for rule in RULES)
    return [refusal for refusal in found if refusal]


def nearest(config: TrainConfig, devices: Devices) -> dict[str, Any]:
    """Dotted settings that make the job one that works; {} when it does already."""
    changes: dict[str, Any] = {}
    for _ in RULES:  # a change may make another rule speak, each at most once
        for refusal in refusals(config, devices):
            changes[refusal.key] = refusal.value
            config = config.with_overrides({refusal.key: refusal.value})
    assert not refusals(config, devices), "two rules contradict each other"
    return changes
