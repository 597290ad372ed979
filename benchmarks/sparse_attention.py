"""Layers that see a window, or chosen blocks, beside layers that see all: training time, prefill time, bits per byte.

Every fourth layer sees all the tokens before, and in one row only the last of eight; the others the last 256, or their
own block of 128 and the three before it that fit best. Windows are Olmo 3's, blocks a Qwen3's; each is compared with
the same family whose layers all see all. Forward and backward pass of one attention and of the whole model run here, on
one thread, turn by turn; prefill is vLLM's, by its own count of the seconds to the first token, each model in a process
of its own. `--train` instead trains narrower ones on the demo's text in blocks of 2048 tokens and prints what seeing
less costs in held-out bits per byte.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from competitors import demo_corpus, demo_training, random_models

LENGTHS = (4096, 8192)
VOCAB_SIZE = 6000
WINDOW = 256
BLOCKS = {"attention_block_tokens": 128, "attention_blocks": 4}
SIZES = {
    "architecture": "olmo3", "hidden_size": 256, "intermediate_size": 768, "num_layers": 8, "num_heads": 8,
    "num_key_value_heads": 4, "tie_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "all see all": SIZES,
    "every 4th sees all": SIZES | {"sliding_window_tokens": WINDOW, "global_every": 4},
    "every 8th sees all": SIZES | {"sliding_window_tokens": WINDOW, "global_every": 8},
}
QWEN3 = SIZES | {"architecture": "qwen3"}
CHOOSING: dict[str, dict[str, Any]] = {
    "all see all": QWEN3,
    "every 4th sees all": QWEN3 | BLOCKS | {"global_every": 4},
}
PAIRS = {"windows": MODELS, "blocks": CHOOSING}
AIM_SPEED, AIM_COST = 2.3, 1.0
STEPS, BLOCK_TOKENS = 200, 2048
CACHE_BYTES = 1 << 30


def make(model: dict[str, Any], length: int) -> Any:
    """Fresh weights in float32, as the training stage makes them."""
    import torch

    from app.training.config import TrainConfig
    from app.training.engine import fresh_model

    torch.manual_seed(0)
    config = TrainConfig.model_validate({"model": model})
    made = fresh_model(config, {"vocab_size": VOCAB_SIZE, "block_tokens": length, "end_of_text_id": 0})
    made.config.use_cache = False
    return made.train()


def attention(length: int, window: int = 0, blocks: tuple[int, ...] = ()) -> Callable[[], None]:
    """Forward and backward of one attention of the models' shape: over all, within a window, or to chosen blocks."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from app import block_attention
    from app.training.local_attention import attend, chunk_mask

    heads, shared, width = 8, 4, 32
    query, key, value = (
        torch.randn(1, number, length, width, requires_grad=True) for number in (heads, shared, shared)
    )
    mask = chunk_mask(lambda _, __, queries, keys: queries - keys < window, 1, length, window) if window else None

    def run() -> None:
        if blocks:
            out = block_attention.attend(query, key, value, block_attention.Blocks(*blocks, width**-0.5))
        elif mask is None:
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            out = attend(query, key, value, mask)
        out.sum().backward()

    return run


def whole(model: dict[str, Any], length: int) -> Callable[[], None]:
    """Forward and backward of a model on one block."""
    import torch

    made = make(model, length)
    ids = torch.randint(0, VOCAB_SIZE, (1, length))

    def run() -> None:
        made(input_ids=ids, labels=ids).loss.backward()
        made.zero_grad()

    return run


def compare(kinds: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of each, turn by turn, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(runs + 1):
        for name, run in kinds.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def show(what: str, length: int, found: dict[str, float]) -> float:
    """A row for each kind; how many times faster the one with windows in three of four layers is."""
    dense = next(iter(found.values()))
    for name, seconds in found.items():
        print(f"{what:22} {length:7} {name:20} {seconds:9.3f} {dense / seconds:7.2f}", flush=True)
    return dense / list(found.values())[1]


def prefill(folder: Path, name: str, model: dict[str, Any], runs: int) -> dict[str, float]:
    """Median seconds to the first token at each length, in a process of its own."""
    path = folder / f"{model['architecture']}-{name}".replace(" ", "-").replace(",", "")
    if not (path / "config.json").exists():
        make(model, max(LENGTHS)).save_pretrained(path)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(demo_training.ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", str(path), "--runs", str(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_prefill(folder: str, runs: int) -> dict[str, float]:
    """What the child does."""
    import random

    import vllm

    model = vllm.LLM(
        folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=max(LENGTHS),
        max_num_seqs=1, max_num_batched_tokens=2048, kv_cache_memory_bytes=CACHE_BYTES, enable_prefix_caching=False,
    )  # fmt: skip
    options = vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    generator, found = random.Random(0), {}
    for length in LENGTHS:
        taken = []
        for _ in range(runs + 1):
            prompt = {"prompt_token_ids": [generator.randrange(10, VOCAB_SIZE) for _ in range(length - 1)]}
            began = time.perf_counter()
            model.generate(prompt, options, use_tqdm=False)
            taken.append(time.perf_counter() - began)
        found[str(length)] = statistics.median(taken[1:])
    return found


def cost(folder: Path, seeds: int, kinds: list[str]) -> None:
    """Train each family of four narrower layers on the demo's text; print the scores and what seeing less costs."""
    narrow = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
    print(f"{STEPS} steps of {2 * BLOCK_TOKENS} tokens in blocks of {BLOCK_TOKENS}, held-out bits per byte")
    with demo_training.cluster(folder / "cluster") as running:
        demo_corpus.prepare(folder, running, BLOCK_TOKENS)
        for kind in kinds:
            family = PAIRS[kind]
            scores: list[list[float]] = []
            for name, model in list(family.items())[:2]:  # all see all, every 4th sees all
                scores.append([])
                for seed in range(seeds):
                    output = f"{kind}-{name}-{seed}".replace(" ", "-")
                    changes = {"model": model | narrow, "seed": seed, "global_batch_sequences": 2}
                    config = demo_corpus.settings(folder, output, STEPS, micro_batch_sequences=1, **changes)
                    figures = demo_corpus.train(config, running)
                    scores[-1].append(figures["held_out_bits_per_byte"])
                    print(f"  seed {seed}: {kind}, {name} {figures}", file=sys.stderr, flush=True)
                print(f"{kind:8} {name:20} {', '.join(f'{score:.4f}' for score in scores[-1])}", flush=True)
            mean, half = demo_corpus.interval([100 * (b / a - 1) for a, b in zip(*scores, strict=True)])
            print(f"cost of {kind}: {mean:+.2f} % ± {half:.2f} (95 %)   (aim: at most {AIM_COST:.0f} %)", flush=True)


def speed(folder: Path, runs: int) -> None:
    """Time everything; print it."""
    import torch

    torch.set_num_threads(1)
    print(f"one thread, float32, windows of {WINDOW} tokens; seconds, medians of {runs} turns")
    print(f"{'':22} {'tokens':>7} {'':20} {'seconds':>9} {'times':>7}")
    faster: dict[tuple[str, str, int], float] = {}
    for length in LENGTHS:
        kinds = {"all": attention(length), f"window of {WINDOW}": attention(length, WINDOW)}
        kinds["4 blocks of 128"] = attention(length, blocks=tuple(BLOCKS.values()))
        found = compare(kinds, runs)
        show("attention, both passes", length, found)
        for kind, seconds in zip(PAIRS, list(found.values())[1:], strict=True):
            faster[kind, "one attention", length] = found["all"] / seconds
    for kind, family in PAIRS.items():
        for length in LENGTHS:
            models = {name: whole(model, length) for name, model in family.items()}
            faster[kind, "model", length] = show("model, both passes", length, compare(models, runs))
        prefills = {name: prefill(folder, name, model, runs) for name, model in family.items()}
        for length in LENGTHS:
            found = {name: seconds[str(length)] for name, seconds in prefills.items()}
            faster[kind, "prefill", length] = show("model, vLLM's prefill", length, found)
    for (kind, what, length), times in faster.items():
        aim = f"   (aim: {AIM_SPEED})" if (kind, what) == ("windows", "model") else ""
        print(f"{what} at {length} tokens, {kind} in three of four layers: {times:.2f} times faster{aim}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "sparse-attention"
    parser.add_argument("--folder", type=Path, default=default, help="models and corpus")
    parser.add_argument("--runs", type=int, default=5, help="turns; medians are printed")
    parser.add_argument("--train", type=int, default=0, metavar="SEEDS", help="train instead, so many seeds")
    parser.add_argument("--kinds", nargs="+", choices=PAIRS, default=list(PAIRS), help="what to train")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure_prefill(given.child, given.runs)))
        return
    print(random_models.machine())
    if given.train:
        cost(given.folder / "text", given.train, given.kinds)
    else:
        speed(given.folder, given.runs)


if __name__ == "__main__":
    main()
