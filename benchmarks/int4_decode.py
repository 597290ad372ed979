"""Decoding with 4-bit weights against float32 and bfloat16: tokens a second and resident memory of vLLM's engine.

Every row is a process of its own with the engine inside (offline, eager, one thread). A step gives each sequence of
the batch one token; what is timed are the steps after the prompts, medians over runs, in seconds of the process's CPU
time: with one thread on an idle core that is the time on the clock, and on a busy one nearly what it would have been.
Weights are random, 4-bit ones by round-to-nearest.

`avx2` keeps vLLM, torch, MKL and oneDNN from newer instructions, `native` does not. In `int4`, 4-bit weights meet
float32 activations (the default of ServeConfig), in `int4-bfloat16` they meet bfloat16 ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from competitors import random_models

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("float32", "bfloat16", "int4", "int4-bfloat16")
BATCHES = (1, 8, 32)
PROMPT_TOKENS, STEPS = 16, 24
RUN_SECONDS, ROW_SECONDS = 4, 9  # a run that takes longer ends before its last step, a row before its last run
CACHE_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(random_models.SHAPES), choices=random_models.SHAPES)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--instructions", nargs="+", default=["avx2", "native"], choices=["avx2", "native"])
    parser.add_argument("--runs", type=int, default=5, help="at most; a slow row ends after one that took its time")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, options.instructions[0], options.runs)))
        return
    print(random_models.machine())
    print(f"one thread; tokens a second of CPU time (/ float32), MiB of the process; medians of {options.runs} runs")
    print(f"{'':28}" + "".join(f"{f'batch {batch}':>18}" for batch in BATCHES) + "    resident      peak")
    lasts = []
    for instructions in options.instructions:
        for model in options.models:
            rows: dict[str, dict[str, list[float]]] = {}
            for precision in options.precisions:
                row = rows[precision] = run(model, precision, instructions, options)
                base = rows.get("float32", row)["tokens"]
                speeds = "".join(f"{a:10.1f} ({a / b:5.2f})" for a, b in zip(row["tokens"], base, strict=True))
                memory = "".join(f"{size:10.0f}" for size in row["memory"])
                print(f"{instructions:7}{model:7}{precision:14}{speeds}{memory}", flush=True)
            if {"int4", "float32"} <= rows.keys():
                pairs = zip(rows["int4"]["tokens"], rows["float32"]["tokens"], strict=True)
                ratios = " / ".join(f"{a / b:.2f}" for a, b in pairs)
                lasts.append(f"int4 / float32, {instructions}, {model}, batch 1 / 8 / 32: {ratios}")
    print("\n".join(lasts))


def run(model: str, precision: str, instructions: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """One row, in a process of its own."""
    folder = random_models.make(model)["int4" if precision.startswith("int4") else "plain"]
    dtype = "bfloat16" if precision.endswith("bfloat16") else "float32"
    command = [sys.executable, __file__, "--child", str(folder), dtype]
    command += ["--instructions", instructions, "--runs", str(options.runs)]
    environment = os.environ | (random_models.AVX2 if instructions == "avx2" else {})
    environment |= {
        "OMP_NUM_THREADS": "1",  # as app/serving/engine.py sets it on two cores
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{model} {precision} {instructions}: {done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: str, dtype: str, instructions: str, runs: int) -> dict[str, list[float]]:
    """Tokens a second at each batch, and resident and peak memory of this process in MiB."""
    if instructions == "avx2":
        random_models.hide_avx512()
    import vllm

    model = vllm.LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
    )
    tokens = []
    for batch in BATCHES:
        decode(model, batch)  # warms up
        began, speeds = time.perf_counter(), []
        while len(speeds) < runs and (not speeds or time.perf_counter() - began < ROW_SECONDS):
            speeds.append(decode(model, batch))
        tokens.append(statistics.median(speeds))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"tokens": tokens, "memory": [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]}


def decode(model: object, batch: int) -> float:
    """Tokens a second of CPU time, of steps in which all sequences of a batch get one."""
    import vllm

    engine = model.llm_engine  # type: ignore[attr-defined]
    options = vllm.SamplingParams(max_tokens=2 * STEPS, temperature=0, ignore_eos=True, detokenize=False)
    for index in range(batch):
        prompt = {"prompt_token_ids": [(7 * index + place) % 5000 + 10 for place in range(PROMPT_TOKENS)]}
        engine.add_request(str(index), prompt, options)
    while len(engine.step()) < batch:
        pass
    began, num_steps = time.process_time(), 0
    while num_steps < STEPS and time.process_time() - began < RUN_SECONDS:
        engine.step()
        num_steps += 1
    speed = batch * num_steps / (time.process_time() - began)
    engine.abort_request([str(index) for index in range(batch)])
    return speed


if __name__ == "__main__":
    main()
