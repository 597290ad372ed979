"""Losses of one process, and of two that share the batch, the layers, the tokens or the matrices: are they the same?

The model has 0.9 million parameters in float32; rows and the weights to start from are the same; 50 steps of 8 blocks.
Where gradients are summed in another order the last digits differ, and with them all that follows. No Ray: torchrun
runs this file on every rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from competitors import demo_training

STEPS, BLOCKS, MICRO_BATCH = 50, 8, 2
SHOWN_EVERY = 10
SHAPE = {"vocab_size": 1000, "block_tokens": 128, "end_of_text_id": 0}
MODEL = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # name: ranks, settings
    "one process": (1, {"zero_stage": 0}),
    "ZeRO-3 x 2": (2, {"zero_stage": 3}),
    "PP x 2": (2, {"zero_stage": 1, "pipeline_stages": 2}),
    "TP x 2": (2, {"zero_stage": 2, "tensor_parallel": 2}),
    "SP x 2": (2, {"zero_stage": 3, "sequence_parallel": 2}),
}


def train_rank(output: Path, name: str, base: str) -> None:
    """What torchrun runs: the loss of each step, summed over the ranks."""
    import deepspeed
    import torch

    from app.training import pipeline
    from app.training.config import TrainConfig
    from app.training.engine import build
    from app.training.layout import Layout
    from app.training.sharing import model_inputs

    deepspeed.ops.__compatible_ops__ = {}  # builds no C++ that only inference calls
    deepspeed.init_distributed(dist_backend="gloo")
    num_ranks, changes = WAYS[name]
    batch = {"global_batch_sequences": BLOCKS, "micro_batch_sequences": MICRO_BATCH, "num_workers": num_ranks}
    config = TrainConfig.model_validate({"model": MODEL, "init_from_uri": base, **batch, **changes})
    layout = Layout.of(config, torch.distributed.get_rank(), num_ranks)
    engine = build(config, SHAPE, num_ranks, use_gpu=False)
    averaged, passes = layout.averaged_ranks(config.zero_stage), config.accumulation_steps(num_ranks)
    losses = []
    for step in range(STEPS):
        mine = blocks_of(step).chunk(layout.data_size)[layout.data_rank]
        weight = BLOCKS * (SHAPE["block_tokens"] - 1) / (averaged * passes)
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = [{"input_ids": ids, "labels": ids} for ids in mine.chunk(passes)]
        if layout.num_stages > 1:
            total += pipeline.train_step(engine, micro_batches, weight)
        else:
            for micro_batch in micro_batches:
                loss = engine(**model_inputs(micro_batch, layout), num_items_in_batch=weight).loss
                engine.backward(loss)
                engine.step()
                total += loss.detach().double()
        total /= averaged * passes * layout.same_loss
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    demo_training.answer(output, {"losses": losses})


def blocks_of(step: int) -> Any:
    """[BLOCKS, T] random walks through the vocabulary: the next token is near the last."""
    import torch

    far = torch.randint(0, 3, (BLOCKS, SHAPE["block_tokens"]), generator=torch.Generator().manual_seed(step))
    return far.cumsum(1) % SHAPE["vocab_size"]


def write_base(folder: Path) -> None:
    """The weights that all start from."""
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import fresh_model

    torch.manual_seed(0)
    fresh_model(TrainConfig.model_validate({"model": MODEL}), SHAPE).save_pretrained(folder)


def main() -> None:
    given = demo_training.arguments(__doc__, "parallel-losses", runs=1)
    base = given.folder / "base"
    write_base(base)
    found: dict[str, list[float]] = {}
    for name, (num_ranks, _) in WAYS.items():
        output = given.folder / name.replace(" ", "-")
        found[name] = demo_training.torchrun(Path(__file__), output, num_ranks, name, str(base))[0]["losses"]
    alone = next(iter(found.values()))
    print(f"loss by step; {STEPS} steps of {BLOCKS} blocks in float32, the same weights and rows")
    print(f"{'step':>11}" + "".join(f"{name:>14}" for name in found))
    for step in [0, *range(SHOWN_EVERY - 1, STEPS, SHOWN_EVERY)]:
        print(f"{step + 1:11}" + "".join(f"{losses[step]:14.7f}" for losses in found.values()))
    apart = [max(abs(loss - other) for loss, other in zip(losses, alone, strict=True)) for losses in found.values()]
    print(f"{'difference':>11}" + "".join(f"{difference:14.1e}" for difference in apart))
    print(f"largest difference of a step's loss from one process: {max(apart):.1e}")


if __name__ == "__main__":
    if demo_training.is_rank():
        train_rank(Path(sys.argv[1]), *sys.argv[2:])
    else:
        main()
