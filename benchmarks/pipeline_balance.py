"""64 layers over 8 stages: how even the planned stages are, by parameters and by the time that they take here.

Parameters are counted, also of models that no machine here holds. Of two shapes that fit, the forward and backward
passes of the embedding, of one layer and of the head with its loss are timed on one thread, by its processor time; the
cut that is best by these medians is made, and its stages are timed one after another, in rounds. Stages share the
weights of their layers, so that a few stand for 64: what is computed is the same. A stage has whole layers, so how even
a cut can be depends on how many layers the head is worth. No bubble and no communication is in these times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from app.training.config import ModelConfig
from app.training.sizes import stage_costs
from app.training.stages import Costs, Stages, balance, describe

NUM_LAYERS, NUM_STAGES = 64, 8
MICRO_BATCH, BLOCK_TOKENS = 2, 128
SMALL = ModelConfig(num_layers=NUM_LAYERS, hidden_size=256, intermediate_size=768, tie_embeddings=False)
SIXTEENTH = ModelConfig(
    num_layers=NUM_LAYERS, hidden_size=512, intermediate_size=1792, num_heads=8, num_key_value_heads=1,
    tie_embeddings=False,
)  # fmt: skip
WIDE = ModelConfig(
    num_layers=NUM_LAYERS, hidden_size=8192, intermediate_size=28672, num_heads=64, num_key_value_heads=8,
    tie_embeddings=False,
)  # fmt: skip
LLAMA_13B = ModelConfig(
    num_layers=NUM_LAYERS, hidden_size=5120, intermediate_size=13824, num_heads=40, num_key_value_heads=40,
    tie_embeddings=False,
)  # fmt: skip
QWEN3_32B = ModelConfig(
    architecture="qwen3", num_layers=NUM_LAYERS, hidden_size=5120, intermediate_size=25600, num_heads=64, head_size=128,
    num_key_value_heads=8, tie_embeddings=False,
)  # fmt: skip
COUNTED = {
    "hidden 256, vocabulary 8192": (SMALL, 8192),
    "Llama 2 70B's layers, vocabulary 32000": (WIDE, 32000),
    "Llama 2 70B's proportions, hidden 512, vocabulary 2000": (SIXTEENTH, 2000),
    "Llama 2 13B's layers, vocabulary 32000": (LLAMA_13B, 32000),
    "Qwen3 32B, vocabulary 151936": (QWEN3_32B, 151936),
}
TIMED = ("hidden 256, vocabulary 8192", "Llama 2 70B's proportions, hidden 512, vocabulary 2000")


class Parts:
    """An embedding, some layers and a head of a shape, as transformers makes them, and what a stage does with them."""

    def __init__(self, model: ModelConfig, vocab_size: int, num_layers: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        from app.training.config import TrainConfig
        from app.training.families import architecture

        made = model.model_copy(update={"num_layers": num_layers})
        shape = {"vocab_size": vocab_size, "block_tokens": BLOCK_TOKENS, "end_of_text_id": 0}
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(architecture(TrainConfig(model=made), shape))
        self.ids = torch.randint(0, vocab_size, (MICRO_BATCH, BLOCK_TOKENS))
        self.hidden = torch.randn(MICRO_BATCH, BLOCK_TOKENS, model.hidden_size)
        self.gradient = torch.randn_like(self.hidden)
        self.positions = torch.arange(BLOCK_TOKENS)[None]

    def run(self, num_layers: int, is_first: bool, is_last: bool) -> None:
        """Forward and backward of a stage; without layers and an end, of nothing."""
        inner = self.model.model
        hidden: Any = inner.embed_tokens(self.ids) if is_first else self.hidden.clone().requires_grad_()
        rotary = inner.rotary_emb(hidden, position_ids=self.positions) if num_layers else None
        for layer in inner.layers[:num_layers]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=self.positions)
        if is_last:
            logits = self.model.lm_head(inner.norm(hidden))
            self.model.loss_function(logits=logits, labels=self.ids, vocab_size=logits.shape[-1]).backward()
        else:
            hidden.backward(self.gradient)


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Processor seconds of each, medians over rounds in which all are called; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def time_parts(parts: Parts, rounds: int) -> Costs:
    """Seconds of a forward and backward pass of the embedding, one layer and the head."""
    calls: dict[str, Callable[[], None]] = {
        "embedding": lambda: parts.run(0, True, False),
        "layer": lambda: parts.run(1, False, False),
        "head": lambda: parts.run(0, False, True),
    }
    found = medians(calls, rounds)
    return Costs(found["embedding"], (found["layer"],) * NUM_LAYERS, found["head"])


def time_stages(parts: Parts, planned: Stages, rounds: int) -> Stages:
    """The same cut with the seconds that its stages take."""
    sizes = [end - start for start, end in pairwise(planned.bounds)]

    def call_of(stage: int, size: int) -> Callable[[], None]:
        return lambda: parts.run(size, stage == 0, stage == NUM_STAGES - 1)

    found = medians({str(stage): call_of(stage, size) for stage, size in enumerate(sizes)}, rounds)
    return Stages(planned.bounds, tuple(found.values()))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="medians over so many are printed")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{NUM_LAYERS} layers over {NUM_STAGES} stages, embedding and head untied; imbalance: (max - mean) / mean")
    print("by parameters:")
    for name, (model, vocab_size) in COUNTED.items():
        costs = stage_costs(model, vocab_size)
        planned = balance(costs, NUM_STAGES)
        millions = " ".join(f"{cost / 1e6:.1f}" for cost in planned.costs)
        print(f"  {name}: {describe(planned)}; the head is {costs.head / costs.layers[0]:.2f} layers")
        print(f"    millions: {millions}")
    print(f"by time, forward and backward of {MICRO_BATCH} blocks of {BLOCK_TOKENS} tokens on one thread, float32:")
    found = {}
    for name in TIMED:
        model, vocab_size = COUNTED[name]
        parts = Parts(model, vocab_size, 2 * NUM_LAYERS // NUM_STAGES)
        costs = time_parts(parts, 3 * rounds)
        by_time = balance(costs, NUM_STAGES)
        measured = time_stages(parts, by_time, rounds)
        single = [1000 * seconds for seconds in (costs.embedding, costs.layers[0], costs.head)]
        print(f"  {name}: embedding {single[0]:.1f} ms, layer {single[1]:.1f} ms, head {single[2]:.1f} ms")
        layers = " + ".join(str(end - start) for start, end in pairwise(by_time.bounds))
        print(f"    best cut by these: {layers}, imbalance {percent(by_time.imbalance)}")
        print(f"    its stages timed: {' '.join(f'{1000 * cost:.0f}' for cost in measured.costs)} ms", flush=True)
        print(f"    imbalance of the stages as timed: {percent(measured.imbalance)}")
        by_parameters = balance(stage_costs(model, vocab_size), NUM_STAGES)
        other = time_stages(parts, by_parameters, rounds)
        print(f"    of the cut by parameters, as a run makes it: {percent(other.imbalance)}")
        found[name] = measured.imbalance
    print(f"measured imbalance of the most even cut: {percent(min(found.values()))}")


if __name__ == "__main__":
    main()
