"""Where a step's time goes, and what it could have been: seconds by part, communication, FLOPs, memory, GPU figures.

On a CPU by the host's clock; gloo blocks, so the seconds inside collectives are the communication. On a GPU by CUDA
events; every PROFILE_EVERY_STEPS a profile of the step says which share of it was communication that nothing hid.
It does not speak to other ranks. The GPU's side is not covered by the tests of a machine that has none.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from app.devices import published_flops

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Interval = tuple[float, float]

PARTS = ("data", "forward_backward", "optimizer", "checkpoint", "evaluation")
PROFILE_EVERY_STEPS = 50
_FIRST_PROFILED = 5  # kernels are loaded and buffers allocated by then
_COLLECTIVES = (
    *(
        "all_reduce",
        "all_reduce_coalesced",
        "inference_all_reduce",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
    ),
    *("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced", "all_gather_object"),
    *("all_to_all", "all_to_all_single", "broadcast", "broadcast_object_list", "gather", "scatter", "send", "recv"),
    *("barrier", "monitored_barrier"),
)


class CommunicationClock:
    """Seconds that this rank's host spent inside collectives and waiting for those that it had begun."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function; its seconds are counted, and those of the `wait` of a handle that it returns."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            began = time.perf_counter()
            result: Any = function(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return _TimedWork(result, self) if isinstance(result, torch.distributed.Work) else result  # type: ignore[return-value]

        return call


class _TimedWork:
    """The handle of a collective under way: all of it passed on, `wait` timed."""

    def __init__(self, work: Any, clock: CommunicationClock) -> None:
        self._work = work
        self._clock = clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = self._work.wait(*args, **kwargs)
        self._clock.seconds += time.perf_counter() - began
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def measure_communication() -> CommunicationClock:
    """Time DeepSpeed's collectives from now on; after `deepspeed.init_distributed`, and of use with gloo only."""
    from deepspeed.comm import comm

    assert comm.cdb is not None, "deepspeed.init_distributed comes first"
    clock = CommunicationClock()
    time_collectives(comm.cdb, clock)
    return clock


def time_collectives(backend: Any, clock: CommunicationClock) -> None:
    """Shadow the object's collectives by timed ones: it stays the object that it is, with its type and attributes."""
    for name in _COLLECTIVES:
        if hasattr(backend, name):
            setattr(backend, name, clock.timed(getattr(backend, name)))


class StepMeter:
    """Seconds by part of a step. Parts do not nest; a step lasts from the `finish` of the one before to its own.

    `clock` is for CPUs: its seconds are taken from the part that they fell into. On a GPU the share of
    forward_backward that the last profile found exposed stands for every step until the next.
    """

    def __init__(self, use_gpu: bool, clock: CommunicationClock | None = None) -> None:
        self._use_gpu = use_gpu
        self._clock = clock or CommunicationClock()
        self._counts_communication = clock is not None and not use_gpu
        self._exposed_share: float | None = None
        self._profiler: Any = None
        self._steps = 0
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._spans: list[tuple[str, Any, Any, float]] = []  # part, its two marks, seconds of communication in it
        self._began, self._communicated = now, self._clock.seconds
        if self._use_gpu and self._steps % PROFILE_EVERY_STEPS == _FIRST_PROFILED:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()

    def _mark(self) -> Any:
        if not self._use_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, one of PARTS; a part may come several times in a step."""
        assert name in PARTS, name
        began, communicated = self._mark(), self._clock.seconds
        yield
        self._spans.append((name, began, self._mark(), self._clock.seconds - communicated))

    def finish(self) -> dict[str, float]:
        """Seconds by part, `communication` where it is known, and `step` in all; the next step begins here."""
        if self._use_gpu:
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter()
        seconds = {"step": now - self._began, **dict.fromkeys(PARTS, 0.0)}
        for name, began, ended, communication in self._spans:
            lasted = began.elapsed_time(ended) / 1000 if self._use_gpu else ended - began
            seconds[name] += lasted - (communication if self._counts_communication else 0.0)
        if self._counts_communication:
            seconds["communication"] = self._clock.seconds - self._communicated
        elif self._use_gpu:
            self._split_exposed(seconds)
        self._steps += 1
        self._begin(now)
        return seconds

    def _split_exposed(self, seconds: dict[str, float]) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            exposed = exposed_seconds(*kernels(self._profiler.events()))
            self._exposed_share = min(1.0, exposed / max(seconds["forward_backward"], 1e-9))
            self._profiler = None
        if self._exposed_share is not None:
            seconds["communication"] = self._exposed_share * seconds["forward_backward"]
            seconds["forward_backward"] -= seconds["communication"]


def kernels(events: Sequence[Any]) -> tuple[list[Interval], list[Interval]]:
    """Intervals in seconds of the NCCL kernels and of all others among a profiler's events."""
    sorted_out = defaultdict(list)
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
            sorted_out[event.name.startswith("nccl")].append(span)
    return sorted_out[True], sorted_out[False]


def exposed_seconds(communication: Sequence[Interval], computation: Sequence[Interval]) -> float:
    """Length of the union of the first that no interval of the second covers.

    >>> exposed_seconds([(0, 4), (2, 6)], [(1, 3), (5, 9)])
    3.0
    """
    edges = [
        edge
        for kind, spans in enumerate((communication, computation))
        for began, ended in spans
        for edge in ((began, kind, 1), (ended, kind, -1))
    ]
    running, exposed, before = [0, 0], 0.0, 0.0
    for moment, kind, change in sorted(edges):
        if running[0] and not running[1]:
            exposed += moment - before
        running[kind] += change
        before = moment
    return exposed


def peak_flops(use_gpu: bool) -> float:
    """FLOP/s of one device: the data sheet's, 0.0 for an unknown GPU; of a CPU what one large product reaches."""
    return published_flops(torch.cuda.get_device_name()) if use_gpu else _cpu_flops()


@functools.cache
def _cpu_flops(size: int = 1024) -> float:
    """Best of three float32 products in this process's threads."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)


def gpu_figures() -> dict[str, float]:
    """gpu_utilization (0 to 1, over NVML's last sample) and gpu_power_watts of this rank's GPU; {} where there is none.

    Needs nvidia-ml-py, which requirements/gpu.lock has.
    """
    if not _has_nvml():
        return {}
    return {
        "gpu_utilization": torch.cuda.utilization() / 100,
        "gpu_power_watts": torch.cuda.power_draw() / 1000,  # NVML gives milliwatts
    }


@functools.cache
def _has_nvml() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.utilization()
        torch.cuda.power_draw()
    except Exception as error:  # no nvidia-ml-py, or a GPU that does not say (a MIG slice)
        logger.warning("no GPU utilization and power in the telemetry: %s", error)
        return False
    return True


def memory_bytes(use_gpu: bool) -> float:
    """The most that this rank held on its GPU so far; on a CPU the resident memory of its process now."""
    if use_gpu:
        return float(torch.cuda.max_memory_allocated())
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(resident_pages * os.sysconf("SC_PAGE_SIZE"))
