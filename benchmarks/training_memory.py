"""Bytes that each of two ranks holds at ZeRO stage 0, 1, 2 and 3: parameters, gradients, optimizer states; peak memory.

The model has 31 million parameters in float32; two forward passes make a step. Tensors are counted by the storage that
they share, after each backward pass; of each kind the most counts. Counts do not vary, peak memory does a little: its
median is printed. No Ray: torchrun runs this file on every rank.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from competitors import demo_training

STAGES = (0, 1, 2, 3)
RANKS, STEPS, ACCUMULATION_STEPS = 2, 3, 2
MIB = 2**20
MICRO_BATCH, BLOCK_TOKENS, VOCAB_SIZE = 2, 128, 6000
MODEL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_layers": 8, "num_heads": 8, "num_key_value_heads": 4,
    "tie_embeddings": False,
}  # fmt: skip
KINDS = ("parameters", "float32 copy", "gradients", "optimizer states")
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


def measure_rank(output: Path, stage: int) -> None:
    """What torchrun runs: some steps; the most that this rank held of each kind, and its peak memory."""
    import deepspeed
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import build

    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="gloo")
    batch = {"micro_batch_sequences": MICRO_BATCH, "global_batch_sequences": MICRO_BATCH * ACCUMULATION_STEPS * RANKS}
    config = TrainConfig.model_validate({"model": MODEL, "zero_stage": stage, **batch})
    shape = {"vocab_size": VOCAB_SIZE, "block_tokens": BLOCK_TOKENS, "end_of_text_id": 0}
    engine = build(config, shape, RANKS, use_gpu=False)
    most: dict[str, int] = {}
    for _ in range(STEPS * ACCUMULATION_STEPS):
        ids = torch.randint(0, VOCAB_SIZE, (MICRO_BATCH, BLOCK_TOKENS))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        most = {kind: max(held, most.get(kind, 0)) for kind, held in holdings(engine).items()}
        engine.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    demo_training.answer(output, most | {"total": sum(most.values()), "peak memory": peak})


def measure(output: Path, stage: int, runs: int) -> dict[str, float]:
    """The figures of the rank that holds most, medians of the runs."""
    found = []
    for _ in range(runs):
        ranks = demo_training.torchrun(Path(__file__), output, RANKS, str(stage))
        found.append({kind: max(rank[kind] for rank in ranks) for kind in ranks[0]})
    return {kind: statistics.median(figures[kind] for figures in found) for kind in found[0]}


def main() -> None:
    given = demo_training.arguments(__doc__, "training-memory")
    print(f"MiB of the rank that holds most; {RANKS} ranks, {ACCUMULATION_STEPS} forward passes a step")
    print("stage  " + "".join(f"{kind:>18}" for kind in (*KINDS, "total", "peak memory")) + "   total / stage 0")
    totals: dict[int, float] = {}
    for stage in STAGES:
        held = measure(given.folder / f"zero-{stage}", stage, given.runs)
        totals[stage] = held["total"]
        row = "".join(f"{num_bytes / MIB:18.1f}" for num_bytes in held.values())
        print(f"{stage:5}  {row}   {totals[stage] / totals[0]:15.3f}", flush=True)
    print(f"ZeRO-3 / ZeRO-0: {totals[3] / totals[0]:.3f}")


if __name__ == "__main__":
    if demo_training.is_rank():
        measure_rank(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
