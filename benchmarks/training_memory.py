"""What each of two ranks holds, and the time of a step: ZeRO stages 0 to 3, activation checkpointing, offload.

The model has 31 million parameters in float32; two forward passes make a step. Tensors are counted by the storage that
they share, after each backward pass; of each kind the most counts. Counts do not vary, peak memory and time do: their
medians are printed. Activations are in the peak alone, and the second table has blocks long enough that they show. On a
CPU an offloaded optimizer is in the same memory as before; what it costs in time is what is seen. No Ray: torchrun runs
this file on every rank.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from competitors import demo_training

STAGES: dict[str, dict[str, Any]] = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "ZeRO-3, activation checkpointing": {"activation_checkpointing": True},
    "ZeRO-3, optimizer on the CPU": {"offload_optimizer": "cpu"},
    "ZeRO-3, parameters on the CPU": {"offload_parameters": "cpu"},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-1, activation checkpointing": {"zero_stage": 1, "activation_checkpointing": True},
    "ZeRO-1, optimizer on the CPU": {"zero_stage": 1, "offload_optimizer": "cpu"},
}
RANKS, STEPS, ACCUMULATION_STEPS = 2, 3, 2
MIB = 2**20
MICRO_BATCH, BLOCK_TOKENS, LONG_BLOCK_TOKENS, VOCAB_SIZE = 2, 128, 1024, 6000
MODEL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_layers": 8, "num_heads": 8, "num_key_value_heads": 4,
    "tie_embeddings": False,
}  # fmt: skip
KINDS = ("parameters", "float32 copy", "gradients", "optimizer states")
COLUMNS = (*KINDS, "total", "peak memory", "seconds")
STORES = {  # attributes of DeepSpeed's ZeRO optimizers, 1 and 2 first, then 3
    "float32 copy": ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"),
    "gradients": ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"),
}


def count_bytes(value: Any) -> int:
    """Of all tensors in nested lists and dicts; what shares a storage counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors_in(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors_in(value: Any) -> Iterator[Any]:
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def holdings(engine: Any) -> dict[str, int]:
    """Bytes of each kind on this rank now. Without ZeRO the float32 weights are the only copy."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    stores = {kind: [getattr(optimizer, name, None) for name in names] for kind, names in STORES.items()}
    shards = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
    held = (
        [[parameter.data for parameter in parameters], shards],
        stores["float32 copy"],
        [[parameter.grad for parameter in parameters], stores["gradients"]],
        [list(state.values()) for state in inner.state.values()],
    )
    return dict(zip(KINDS, map(count_bytes, held), strict=True))


def measure_rank(output: Path, changes: dict[str, Any], block_tokens: int) -> None:
    """What torchrun runs: some steps; the most that this rank held of each kind, its peak memory, seconds of a step."""
    import deepspeed
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import build

    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="gloo")
    batch = {"micro_batch_sequences": MICRO_BATCH, "global_batch_sequences": MICRO_BATCH * ACCUMULATION_STEPS * RANKS}
    config = TrainConfig.model_validate({"model": MODEL} | batch | changes)
    shape = {"vocab_size": VOCAB_SIZE, "block_tokens": block_tokens, "end_of_text_id": 0}
    engine = build(config, shape, RANKS, use_gpu=False)
    most: dict[str, int] = {}
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        for _ in range(ACCUMULATION_STEPS):
            ids = torch.randint(0, VOCAB_SIZE, (MICRO_BATCH, block_tokens))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            most = {kind: max(held, most.get(kind, 0)) for kind, held in holdings(engine).items()}
            engine.step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = most | {"total": sum(most.values()), "peak memory": peak}
    demo_training.answer(output, figures | {"seconds": statistics.median(seconds[1:])})


def measure(output: Path, changes: dict[str, Any], block_tokens: int, runs: int) -> dict[str, float]:
    """The figures of the rank that holds most, or is slowest; medians of the runs."""
    found = []
    for _ in range(runs):
        ranks = demo_training.torchrun(Path(__file__), output, RANKS, json.dumps(changes), str(block_tokens))
        found.append({kind: max(rank[kind] for rank in ranks) for kind in ranks[0]})
    return {kind: statistics.median(figures[kind] for figures in found) for kind in found[0]}


def show(given: Any, rows: dict[str, dict[str, Any]], block_tokens: int) -> dict[str, dict[str, float]]:
    """The table of one length of blocks."""
    print(f"blocks of {block_tokens} tokens".ljust(34) + "".join(f"{kind:>18}" for kind in COLUMNS))
    found: dict[str, dict[str, float]] = {}
    for name, changes in rows.items():
        held = found[name] = measure(given.folder / "output", changes, block_tokens, given.runs)
        row = "".join(f"{held[kind] / MIB:18.1f}" for kind in COLUMNS[:-1])
        print(f"{name:34}{row}{held['seconds']:18.2f}", flush=True)
    return found


def main() -> None:
    given = demo_training.arguments(__doc__, "training-memory")
    print(f"MiB of the rank that holds most; {RANKS} ranks, {ACCUMULATION_STEPS} forward passes a step; seconds a step")
    stages = show(given, STAGES, BLOCK_TOKENS)
    options = show(given, OPTIONS, LONG_BLOCK_TOKENS)
    for zero in ("ZeRO-3", "ZeRO-1"):
        plain, again = options[zero], options[f"{zero}, activation checkpointing"]
        memory, time_ = (again[kind] / plain[kind] for kind in ("peak memory", "seconds"))
        print(f"{zero}, activation checkpointing / without: peak memory {memory:.2f}, time {time_:.2f}")
    print(f"ZeRO-3 / ZeRO-0, without activations: {stages['ZeRO-3']['total'] / stages['ZeRO-0']['total']:.3f}")


if __name__ == "__main__":
    if demo_training.is_rank():
        measure_rank(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
