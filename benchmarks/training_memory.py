"""What each of two ranks holds, and the time of a step: ZeRO stages 0 to 3, activation checkpointing, offload, sharing.

The model has 31 million parameters in float32; two forward passes make a step. Tensors are counted by the storage that
they share, after each backward pass; of each kind the most counts. Counts do not vary, peak memory and time do: their
medians are printed. Activations are in the peak alone, and the second table has blocks long enough that they show. On a
CPU an offloaded optimizer is in the same memory as before; what it costs in time is what is seen. Of one on a
disk the peak has the buffers that it comes through. The last table has workers that share a model, what autograd keeps
of it too, and beside what was counted what the capacity plan says. No Ray: torchrun runs this file on every rank.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from competitors import demo_training

DISK = Path.home() / ".cache" / "zero-to-one-benchmarks" / "disk"
STAGES: dict[str, dict[str, Any]] = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "ZeRO-3, activation checkpointing": {"activation_checkpointing": True},
    "ZeRO-3, optimizer on the CPU": {"offload_optimizer": "cpu"},
    "ZeRO-3, optimizer on a disk": {"offload_optimizer": "nvme", "nvme_dir": str(DISK)},
    "ZeRO-3, parameters on the CPU": {"offload_parameters": "cpu"},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-1, activation checkpointing": {"zero_stage": 1, "activation_checkpointing": True},
    "ZeRO-1, optimizer on the CPU": {"zero_stage": 1, "offload_optimizer": "cpu"},
}
SHARING: dict[str, dict[str, Any]] = {
    "one model a rank, ZeRO-1": {"zero_stage": 1},
    "tokens, ZeRO-1": {"zero_stage": 1, "sequence_parallel": 2},
    "tokens, ZeRO-3": {"zero_stage": 3, "sequence_parallel": 2},
    "matrices, ZeRO-1": {"zero_stage": 1, "tensor_parallel": 2},
    "layers, ZeRO-1": {"zero_stage": 1, "pipeline_stages": 2},
}
RANKS, STEPS, ACCUMULATION_STEPS = 2, 3, 2
MIB = 2**20
MICRO_BATCH, BLOCK_TOKENS, LONG_BLOCK_TOKENS, SHARED_BLOCK_TOKENS, VOCAB_SIZE = 2, 128, 1024, 256, 6000
GLOBAL_BATCH = MICRO_BATCH * ACCUMULATION_STEPS * RANKS
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


class _Saved:
    """A tensor that autograd keeps, as long as it does."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class Kept:
    """What autograd keeps of forward passes, and a pipeline of what goes between its stages: most bytes at once.

    Weights do not count, nor do logits.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self.most = 0

    def pack(self, tensor: Any) -> _Saved:
        """For torch.autograd.graph.saved_tensors_hooks."""
        saved = _Saved(tensor)
        self._saved.add(saved)
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._engine.parameters()}
        sent = list(getattr(self._engine, "pipe_buffers", {}).values())
        held = [item.tensor for item in self._saved if item.tensor.untyped_storage().data_ptr() not in weights]
        activations = [kept for kept in _tensors_in([held, sent]) if kept.shape[-1:] != (VOCAB_SIZE,)]
        self.most = max(self.most, count_bytes(activations))
        return saved


def pass_through(engine: Any, config: Any, block_tokens: int) -> Iterator[None]:
    """The passes of a step on random blocks; stops after each backward pass, of a pipeline before the update."""
    import torch

    from app.training import pipeline, sharing
    from app.training.layout import Layout

    layout = Layout.of(config, torch.distributed.get_rank(), RANKS)
    batches = []
    for _ in range(config.accumulation_steps(RANKS)):
        ids = torch.randint(0, VOCAB_SIZE, (MICRO_BATCH, block_tokens))
        batches.append({"input_ids": ids, "labels": ids})
    if config.pipeline_stages > 1:
        pipeline.train_step(engine, batches, MICRO_BATCH * block_tokens)
        yield
        return
    for batch in batches:
        engine.backward(engine(**sharing.model_inputs(batch, layout)).loss)
        yield
        engine.step()


def measure_rank(output: Path, changes: dict[str, Any], block_tokens: int) -> None:
    """What torchrun runs: some steps; the most that this rank held of each kind, its peak memory, seconds of a step."""
    import deepspeed
    import torch

    from app.training import nvme
    from app.training.config import TrainConfig
    from app.training.engine import build

    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="gloo")
    batch = {"micro_batch_sequences": MICRO_BATCH, "global_batch_sequences": GLOBAL_BATCH}
    config = TrainConfig.model_validate({"model": MODEL, "num_workers": RANKS} | batch | changes)
    shape = {"vocab_size": VOCAB_SIZE, "block_tokens": block_tokens, "end_of_text_id": 0}
    if config.nvme_dir:
        nvme.prepare()
    engine = build(config, shape, RANKS, use_gpu=False)
    most: dict[str, int] = {}
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        for _ in pass_through(engine, config, block_tokens):
            most = {kind: max(held, most.get(kind, 0)) for kind, held in holdings(engine).items()}
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = Kept(engine)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        for _ in pass_through(engine, config, block_tokens):
            pass
    nvme.clear(engine)
    figures = most | {"total": sum(most.values()), "peak memory": peak, "activations": kept.most}
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


def show_sharing(given: Any) -> None:
    """Each way to share a model: what was counted, and what the capacity plan says."""
    from app.planning.estimate import Shape, memory_of
    from app.training.config import TrainConfig

    print("MiB where two ranks share a model: counted, and in brackets planned; logits not in it")
    print(
        f"blocks of {SHARED_BLOCK_TOKENS} tokens".ljust(28)
        + "".join(f"{kind:>20}" for kind in ("parameters", "states", "activations"))
        + f"{'seconds':>10}"
    )
    for name, changes in SHARING.items():
        held = measure(given.folder / "output", changes, SHARED_BLOCK_TOKENS, given.runs)
        batch = {"micro_batch_sequences": MICRO_BATCH, "global_batch_sequences": GLOBAL_BATCH}
        config = TrainConfig.model_validate({"model": MODEL, "num_workers": RANKS} | batch | changes)
        plan = memory_of(config, Shape(VOCAB_SIZE, SHARED_BLOCK_TOKENS), RANKS)
        states = held["float32 copy"] + held["optimizer states"]
        pairs = ((held["parameters"], plan.weights), (states, plan.optimizer), (held["activations"], plan.activations))
        row = "".join(f"{counted / MIB:12.1f}{f'({planned / MIB:.1f})':>8}" for counted, planned in pairs)
        print(f"{name:28}{row}{held['seconds']:10.2f}", flush=True)


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
    show_sharing(given)


if __name__ == "__main__":
    if demo_training.is_rank():
        measure_rank(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
