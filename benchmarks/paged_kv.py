"""Memory for keys and values: vLLM's pages against a contiguous place of the whole window for each running sequence.

A real engine answers requests of mixed lengths, as many at a time as the batch allows. After each of its steps its own
statistics are read, `vllm:kv_cache_usage_perc` and `vllm:num_requests_running`, and the number and size of its blocks.
Pages: blocks in use x block size, half-empty last ones included. Contiguous: running sequences x window; a server of
that kind would even keep the places of the batch that are empty. Both are summed over all steps.

Lengths are log-normal with the means of ShareGPT's prompts and answers in the paper on vLLM (161 and 338 tokens), cut
at the window; beside them, as a hard case, prompt and answer together uniform up to the window. The model has the
demo's shape and random weights: what is counted depends on lengths only.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from typing import Any

from competitors import random_models

PROMPT_MEAN, ANSWER_MEAN, SPREAD = 161, 338, 1.0  # of the log-normal's exponent
HIDDEN, _, LAYERS, HEADS, KEY_VALUE_HEADS = random_models.SHAPES["demo"]
TOKEN_BYTES = 2 * LAYERS * KEY_VALUE_HEADS * (HIDDEN // HEADS) * 4  # keys and values in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32, help="sequences that run together")
    parser.add_argument("--window", type=int, default=random_models.CONTEXT)
    options = parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    print(random_models.machine())
    print(f"{options.requests} requests, {options.batch} at a time, window {options.window}; MiB, means over steps")
    print(
        f"{'lengths':12}{'mean tokens':>12}{'blocks':>8}{'of':>7}{'steps':>7}{'paged':>8}{'contiguous':>12}{'saved':>8}"
    )
    engine = start(options.batch, options.window)
    saved = {}
    for name, lengths in (("uniform", uniform), ("log-normal", log_normal)):
        generator = random.Random(0)
        drawn = [lengths(generator, options.window) for _ in range(options.requests)]
        saved[name] = report(name, drawn, serve(engine, drawn), options.window)
    print(f"memory saved, paged against contiguous at a window of {options.window}: {100 * saved['log-normal']:.1f} %")


def log_normal(generator: random.Random, window: int) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    drawn = (generator.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD) for mean in (PROMPT_MEAN, ANSWER_MEAN))
    prompt, answer = (max(1, round(value)) for value in drawn)
    prompt = min(prompt, window - 1)
    return prompt, min(answer, window - prompt)


def uniform(generator: random.Random, window: int) -> tuple[int, int]:
    """Tokens of a prompt and of its answer: together up to the window, and the prompt any part of them."""
    total = generator.randint(2, window)
    prompt = generator.randint(1, total - 1)
    return prompt, total - prompt


def start(batch: int, window: int) -> Any:
    """The engine, with room for the whole batch at full length: nothing has to wait for memory."""
    import vllm

    return vllm.LLM(
        str(random_models.make("demo")["plain"]),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        max_model_len=window,
        max_num_seqs=batch,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=(batch + 1) * (window + 128) * TOKEN_BYTES,
    )


def serve(model: Any, lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks in use and sequences running after each step; the last element: all blocks, and tokens of one."""
    import vllm

    engine = model.llm_engine
    generator = random.Random(1)
    for index, (prompt, answer) in enumerate(lengths):
        tokens = {"prompt_token_ids": [generator.randrange(10, random_models.VOCABULARY) for _ in range(prompt)]}
        options = vllm.SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False)
        engine.add_request(str(index), tokens, options)
    cache = engine.vllm_config.cache_config
    samples = []
    while engine.has_unfinished_requests():
        engine.step()
        values = {metric.name: metric.value for metric in model.get_metrics() if hasattr(metric, "value")}
        usable = cache.num_gpu_blocks - 1  # vLLM keeps one for itself, and counts the share of the others
        samples.append((round(values["vllm:kv_cache_usage_perc"] * usable), int(values["vllm:num_requests_running"])))
    return [*samples, (cache.num_gpu_blocks, cache.block_size)]


def report(name: str, lengths: list[tuple[int, int]], samples: list[tuple[int, int]], window: int) -> float:
    """Print a row; the share of memory that pages save."""
    *steps, (num_blocks, block_tokens) = samples
    steps = [step for step in steps if step[1]]
    mean_tokens = sum(map(sum, lengths)) / len(lengths)
    paged, contiguous = (
        sum(step[part] * tokens for step in steps) * TOKEN_BYTES / len(steps) / 2**20
        for part, tokens in ((0, block_tokens), (1, window))
    )
    most = max(blocks for blocks, _ in steps)
    row = f"{name:12}{mean_tokens:12.0f}{most:8d}{num_blocks:7d}{len(steps):7d}{paged:8.1f}{contiguous:12.1f}"
    print(f"{row}{100 * (1 - paged / contiguous):7.1f}%", flush=True)
    return 1 - paged / contiguous


if __name__ == "__main__":
    main()
