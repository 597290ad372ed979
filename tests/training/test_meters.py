import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.devices import published_flops
from app.training.gathering import FIELDS, Workload, exchange, pack, rank_row, rank_values, step_values, unpack
from app.training.meters import (
    PARTS,
    CommunicationClock,
    StepMeter,
    exposed_seconds,
    gpu_figures,
    kernels,
    memory_bytes,
    peak_flops,
    time_collectives,
)
from app.training.sizes import flops_per_token

intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda pair: (pair[0], sum(pair))))


class SlowBackend:
    """Collectives that block for a while, as gloo's do."""

    name = "torch"

    def all_reduce(self, tensor: Any, *, seconds: float) -> None:
        time.sleep(seconds)

    def get_rank(self) -> int:
        return 3


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """The default group of this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_parts_and_communication_fill_no_more_than_the_step() -> None:
    clock, backend = CommunicationClock(), SlowBackend()
    time_collectives(backend, clock)
    meter = StepMeter(use_gpu=False, clock=clock)
    with meter.part("data"):
        time.sleep(0.002)
    for _ in range(2):
        with meter.part("forward_backward"):
            time.sleep(0.005)
            backend.all_reduce(None, seconds=0.01)
    backend.all_reduce(None, seconds=0.002)
    seconds = meter.finish()
    assert seconds["communication"] >= 0.022
    assert seconds["data"] >= 0.002
    assert 0.01 <= seconds["forward_backward"] < seconds["step"] - 0.02
    assert seconds["optimizer"] == 0
    assert sum(seconds[name] for name in (*PARTS, "communication")) <= seconds["step"]


def test_a_step_begins_where_the_one_before_ended() -> None:
    began = time.perf_counter()
    meter = StepMeter(use_gpu=False, clock=CommunicationClock())
    steps = []
    for _ in range(3):
        with meter.part("data"):
            time.sleep(0.001)
        steps.append(meter.finish())
    assert all(step["data"] <= step["step"] for step in steps)
    assert sum(step["step"] for step in steps) <= time.perf_counter() - began
    assert steps[2]["communication"] == 0


def test_without_a_clock_communication_is_unknown_not_zero() -> None:
    assert "communication" not in StepMeter(use_gpu=False).finish()


def test_a_part_must_have_a_known_name() -> None:
    with pytest.raises(AssertionError, match="coffee"), StepMeter(use_gpu=False).part("coffee"):
        pass


def test_a_timed_backend_stays_what_it_is() -> None:
    backend = SlowBackend()
    time_collectives(backend, CommunicationClock())
    assert type(backend) is SlowBackend
    assert (backend.name, backend.get_rank()) == ("torch", 3)
    assert not hasattr(backend, "broadcast")
    assert backend.all_reduce.__name__ == "all_reduce"


def test_collectives_give_the_same_result_timed(alone: None) -> None:
    clock = CommunicationClock()
    tensor, gathered = torch.arange(3.0), torch.empty(3)
    work = clock.timed(torch.distributed.all_gather_into_tensor)(gathered, tensor, async_op=True)
    begun = clock.seconds
    work.wait()
    assert gathered.tolist() == [0, 1, 2]
    assert 0 < begun < clock.seconds
    assert work.is_completed()
    assert work.wait.__qualname__  # DeepSpeed names its profiling ranges by it
    assert clock.timed(torch.distributed.all_reduce)(tensor) is None


@pytest.mark.slow
def test_deepspeed_calls_its_collectives_through_the_clock(alone: None) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.comm import comm

    from app.training.meters import measure_communication

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    backend_type = type(comm.cdb)
    clock = measure_communication()
    try:
        tensor = torch.ones(2)
        comm.all_reduce(tensor)
        handle = comm.all_gather_into_tensor(torch.empty(2), tensor, async_op=True)
        before_wait = clock.seconds
        handle.wait()
        assert 0 < before_wait < clock.seconds
        assert type(comm.cdb) is backend_type
        assert comm.is_initialized()
    finally:
        comm.cdb = None


@given(intervals, intervals)
def test_exposed_is_what_computation_does_not_cover(
    communication: list[tuple[int, int]], computation: list[tuple[int, int]]
) -> None:
    def covered(spans: list[tuple[int, int]]) -> set[int]:
        return {moment for began, ended in spans for moment in range(began, ended)}

    exposed = covered(communication) - covered(computation)
    assert exposed_seconds(communication, computation) == len(exposed)


def test_kernels_are_sorted_by_name_and_annotations_left_out() -> None:
    def event(name: str, start: float, device: str = "CUDA", annotation: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=start + 1e6)
        device_type = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, time_range=span, device_type=device_type, is_user_annotation=annotation)

    events = [
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0),
        event("nccl:all_reduce", 0, annotation=True),
        event("ampere_bf16_gemm", 2e6),
        event("aten::mm", 2e6, device="CPU"),
    ]
    assert kernels(events) == ([(0, 1)], [(2, 3)])


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce GTX 1080", 0.0),
    ],
)
def test_published_flops(name: str, flops: float) -> None:
    assert published_flops(name) == flops


def test_a_cpu_is_measured_once() -> None:
    assert 1e8 < peak_flops(use_gpu=False) == peak_flops(use_gpu=False)


def test_flops_of_a_llama_7b_token() -> None:
    assert flops_per_token(6_607_000_000, 32, 4096, 4096) == pytest.approx(4.6e10, rel=0.01)


def test_memory_is_that_of_this_process() -> None:
    assert 2**20 < memory_bytes(use_gpu=False) < 2**40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_no_figures() -> None:
    assert gpu_figures() == {}


@given(st.lists(st.lists(st.floats(width=64), min_size=3, max_size=3), min_size=1), st.integers(0, 2**64 - 1))
def test_what_is_packed_comes_out_by_the_bit(rows: list[list[float]], digest: int) -> None:
    values, digests = unpack(torch.stack([pack(row, digest) for row in rows]))
    assert values.tobytes() == np.array(rows).tobytes()
    assert digests == [digest] * len(rows)


def test_exchange_with_oneself(alone: None) -> None:
    values, digests = exchange([1.5, math.nan, -0.0], -1)
    assert values.shape == (1, 3)
    assert (values[0, 0], math.isnan(values[0, 1])) == (1.5, True)
    assert digests == [2**64 - 1]


def _exchange_per_rank(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values, digests = exchange([rank, 10.0 + rank], 2**63 + rank)
    np.savez(f"{results}/{rank}.npz", values=values, digests=np.array(digests, np.uint64))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_get_all_rows_in_order(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_exchange_per_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert found["values"].tolist() == [[0, 10], [1, 11]]
            assert found["digests"].tolist() == [2**63, 2**63 + 1]


def ranks(**columns: list[float]) -> np.ndarray[Any, Any]:
    """Rows of two ranks; a step of 10 s with 1 s in each part unless told."""
    even: dict[str, list[float]] = {"step": [10, 10], **{name: [1, 1] for name in PARTS}, "communication": [1, 1]}
    given = even | {"memory_bytes": [5, 7]} | columns
    return np.array([rank_row({name: values[rank] for name, values in given.items()}) for rank in range(2)])


def test_values_of_a_step() -> None:
    work = Workload(step_tokens=800, flops_per_token=5, peak_flops=1000)
    values = step_values(ranks(communication=[1, 3]), work)
    assert values["tokens_per_second"] == 100  # 10 s less checkpoint and evaluation
    assert values["tokens_per_second_per_worker"] == 50
    assert values["mfu"] == 0.25
    assert values["communication_seconds"] == 2
    assert values["communication_share"] == 0.2
    assert values["rank_spread"] == 0.2  # busy for 9 s and for 7 s
    assert values["memory_bytes"] == 7
    assert values["world_size"] == 2
    assert not {"gpu_utilization", "gpu_power_watts"} & set(values)


def test_what_is_not_known_is_left_out() -> None:
    values = step_values(ranks(communication=[math.nan, math.nan]), Workload(800, 5, peak_flops=0))
    assert not {"mfu", "communication_seconds", "communication_share", "rank_spread"} & set(values)
    assert not any(math.isnan(value) for value in values.values())


def test_columns_of_the_caller_come_after_the_fields() -> None:
    rows = np.hstack([ranks(), [[0.5, 1], [0.25, 0]]])
    assert rows[:, len(FIELDS)].sum() == 0.75
    assert step_values(rows, Workload(8, 1, 1)) == step_values(ranks(), Workload(8, 1, 1))
    assert rank_values(rows)["busy_seconds"] == [9, 9]
