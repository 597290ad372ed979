"""Which changes make a job fit its devices: all combinations of a few knobs are tried, the least costly first.

The knobs are those that change how a step is computed and not what is learned: ZeRO stage, activation checkpointing,
size of a forward pass, optimizer states and parameters that are offloaded, and more devices. What training refuses is
not proposed. It changes nothing; it says what would help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from app.planning.estimate import GIB, Memory, Shape, memory_of
from app.training import parallel
from app.training.config import TrainConfig
from app.training.refusals import Devices

MOST_DEVICES = 4096
_COSTS = {
    "zero_stage": 1.0, "micro_batch_sequences": 2.0, "activation_checkpointing": 3.0, "offload_optimizer": 8.0,
    "offload_parameters": 9.0,
}  # fmt: skip
_DEVICES_COST = 20.0  # for each doubling: nothing else costs money


@dataclass(frozen=True)
class Trial:
    """A job with some settings changed, the number of its devices, and what it takes then."""

    changes: dict[str, Any]
    num_devices: int
    memory: Memory

    def words(self, num_devices: int) -> str:
        """The changes as arguments; devices when they are more than before."""
        said = [f"--{key} {str(value).lower()}" for key, value in self.changes.items() if key != "num_workers"]
        if self.num_devices != num_devices:
            said.append(f"{self.num_devices} devices")
        return " ".join(said)


def nearest_fit(config: TrainConfig, shape: Shape, num_devices: int, room_bytes: float) -> Trial | None:
    """The least costly set of changes with which a worker takes no more than `room_bytes`; None if nothing helps."""
    trials = sorted(_combinations(config, num_devices), key=lambda trial: _cost(config, trial, num_devices))
    for changes, devices in trials:
        memory = _try(config, shape, changes, devices)
        if memory and memory.device <= room_bytes:
            return Trial(changes, devices, memory)
    return None


def single_changes(config: TrainConfig, shape: Shape, num_devices: int) -> list[Trial]:
    """Each knob turned alone by as little as possible, where that lowers the memory; the most helpful first."""
    found: list[Trial] = []
    now = memory_of(config, shape, num_devices).device
    seen: set[str] = set()
    for changes, devices in sorted(
        _combinations(config, num_devices), key=lambda trial: _cost(config, trial, num_devices)
    ):
        turned = [*changes, *(["devices"] if devices != num_devices else [])]
        if len(turned) != 1 or turned[0] in seen:
            continue
        memory = _try(config, shape, changes, devices)
        if memory and memory.device < now:
            seen.add(turned[0])
            found.append(Trial(changes, devices, memory))
    return sorted(found, key=lambda trial: trial.memory.device)


def largest_micro_batch(config: TrainConfig, shape: Shape, num_devices: int, room_bytes: float) -> int:
    """Blocks of one forward pass that fit, at most a worker's share of the batch; 0 if not even one does."""
    share = -(-config.global_batch_sequences // config.num_replicas(num_devices))
    fitting = 0
    for blocks in range(1, share + 1):
        changed = config.with_overrides({"micro_batch_sequences": blocks})
        if memory_of(changed, shape, num_devices).device > room_bytes:
            break
        fitting = blocks
    return fitting


def _combinations(config: TrainConfig, num_devices: int) -> Iterator[tuple[dict[str, Any], int]]:
    stages = range(config.zero_stage, 4)
    recompute = {config.activation_checkpointing, True}
    offload = {config.offload_optimizer, "cpu" if config.offload_optimizer == "none" else config.offload_optimizer}
    blocks, sizes = config.micro_batch_sequences, [config.micro_batch_sequences]
    while blocks > 1:
        blocks //= 2
        sizes.append(blocks)
    devices = [num_devices]
    while 2 * devices[-1] <= min(MOST_DEVICES, config.global_batch_sequences * config.workers_per_replica):
        devices.append(2 * devices[-1])
    keep = {config.offload_parameters, "cpu"}
    for stage, size, again, where, kept, number in product(stages, sizes, recompute, offload, keep, devices):
        wanted = {
            "zero_stage": stage,
            "micro_batch_sequences": size,
            "activation_checkpointing": again,
            "offload_optimizer": where,
            "offload_parameters": kept,
        }
        yield {key: value for key, value in wanted.items() if getattr(config, key) != value}, number


def _cost(config: TrainConfig, trial: tuple[dict[str, Any], int], num_devices: int) -> float:
    """How little one wants these changes; a knob turned further costs more."""
    changes, devices = trial
    cost: float = sum(_COSTS[key] for key in changes)
    cost += 0.1 * (changes.get("zero_stage", config.zero_stage) - config.zero_stage)
    cost += 0.1 * (config.micro_batch_sequences / changes.get("micro_batch_sequences", config.micro_batch_sequences))
    return cost + _DEVICES_COST * (devices / num_devices - 1)


def _try(config: TrainConfig, shape: Shape, changes: dict[str, Any], devices: int) -> Memory | None:
    """What the changed job takes; None if training would refuse it."""
    changed = config.with_overrides(changes)
    if parallel.refusals(changed, Devices()):
        return None
    return memory_of(changed, shape, devices)


def gib(size: float) -> str:
    """Bytes in GiB, or MiB if there are few, to three digits.

    >>> gib(3 * GIB), gib(12.34 * GIB), gib(1234 * GIB), gib(GIB / 100)
    ('3.00 GiB', '12.3 GiB', '1,234 GiB', '10.2 MiB')
    """
    amount, unit = (size / GIB, "GiB") if size >= 0.1 * GIB else (1024 * size / GIB, "MiB")
    digits = 2 if amount < 10 else 1 if amount < 100 else 0
    return f"{amount:,.{digits}f} {unit}"
