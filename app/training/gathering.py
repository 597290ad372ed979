"""The figures of all ranks of a step, in one collective, and the step's values made of them.

Each rank gives a row of float64 and a digest; every rank gets all rows. FIELDS are the meters' columns, the caller's
own columns come after them. It decides nothing and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from app.training.meters import PARTS

Rows = npt.NDArray[np.float64]

FIELDS = ("step", *PARTS, "communication", "memory_bytes", "gpu_utilization", "gpu_power_watts")
_DIGEST_MASK = (1 << 64) - 1


def rank_row(figures: Mapping[str, float]) -> list[float]:
    """One rank's figures in the order of FIELDS: StepMeter.finish's, memory_bytes, gpu_figures; NaN if not measured."""
    return [float(figures.get(name, math.nan)) for name in FIELDS]


def exchange(values: Sequence[float], digest: int, device: torch.device | str = "cpu") -> tuple[Rows, list[int]]:
    """All ranks' values [world, K] and 64-bit digests, by rank; collective over the default group.

    One all-gather of int64: floats travel by their bits, so that NaN and the digest come over as they are.
    """
    mine = pack(values, digest).to(device)
    everyone = torch.empty(torch.distributed.get_world_size() * len(mine), dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(everyone, mine)
    return unpack(everyone.cpu().view(-1, len(mine)))


def pack(values: Sequence[float], digest: int) -> torch.Tensor:
    """[K + 1] int64: the bits of the values, then the digest."""
    bits = np.array([*values, 0.0], np.float64).view(np.int64)
    bits[-1] = np.uint64(digest & _DIGEST_MASK).astype(np.int64)
    return torch.from_numpy(bits)


def unpack(rows: torch.Tensor) -> tuple[Rows, list[int]]:
    """The inverse of `pack` over [world, K + 1]; digests from 0 to 2**64 - 1."""
    bits = np.ascontiguousarray(rows.numpy())
    return np.ascontiguousarray(bits[:, :-1]).view(np.float64), [int(digest) & _DIGEST_MASK for digest in bits[:, -1]]


@dataclass(frozen=True)
class Workload:
    """What a step computes: tokens over all ranks, FLOPs of a token, and the peak FLOP/s of one device (0: unknown)."""

    step_tokens: int
    flops_per_token: float
    peak_flops: float


def step_values(rows: Rows, work: Workload) -> dict[str, float]:
    """The step's values of [world, ≥ len(FIELDS)] rows: parts are means over ranks, memory is the largest rank's.

    Speed and MFU leave out checkpoint and evaluation. rank_spread is the slowest rank's busy time (not in
    communication) less the fastest's, over the step. What a rank did not measure is left out.
    """
    column = dict(zip(FIELDS, rows.T, strict=False))
    step_seconds = float(column["step"].max())
    values = {"step_seconds": step_seconds}
    for name in (*PARTS, "communication"):
        values[f"{name}_seconds"] = float(column[name].mean())
    trained = max(step_seconds - values["checkpoint_seconds"] - values["evaluation_seconds"], 1e-9)
    values["tokens_per_second"] = work.step_tokens / trained
    values["tokens_per_second_per_worker"] = values["tokens_per_second"] / len(rows)
    if work.peak_flops:
        values["mfu"] = values["tokens_per_second_per_worker"] * work.flops_per_token / work.peak_flops
    busy = column["step"] - column["communication"]
    values["communication_share"] = values["communication_seconds"] / step_seconds
    values["rank_spread"] = float(busy.max() - busy.min()) / step_seconds
    values["memory_bytes"] = float(column["memory_bytes"].max())
    values["gpu_utilization"] = float(column["gpu_utilization"].mean())
    values["gpu_power_watts"] = float(column["gpu_power_watts"].mean())
    values["world_size"] = float(len(rows))
    return {name: value for name, value in values.items() if not math.isnan(value)}


def rank_values(rows: Rows) -> dict[str, list[float]]:
    """Name -> a value for each rank, of what differs between ranks; a rank that did not measure it gives NaN."""
    column = dict(zip(FIELDS, rows.T, strict=False))
    return {
        "busy_seconds": (column["step"] - column["communication"]).tolist(),
        **{name: column[name].tolist() for name in ("memory_bytes", "gpu_utilization", "gpu_power_watts")},
    }
