"""Threads of an engine on this CPU: tokens a second of one replica, and of two at the same time, by binding and number.

`auto` is vLLM's own: it keeps one core free, and binds the threads of every replica to the same others. `nobind`
leaves threads to the kernel. A replica is a vLLM engine with its worker process, as Ray Serve starts it; all decode at
the same time, each a batch that is full all the while. Settings come one after another, since an engine takes half a
minute to start: the machine must be idle. Medians over slices of the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from competitors import random_models

ROOT = Path(__file__).resolve().parent.parent
SLICE_SECONDS, SLICES = 3, 5
SETTINGS = {  # binding, threads
    "auto": {"VLLM_CPU_OMP_THREADS_BIND": "auto"},
    "nobind 1": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    "nobind 2": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(random_models.SHAPES), choices=random_models.SHAPES)
    parser.add_argument("--kind", default="plain", choices=["plain", "int4"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        decode(options.child, options.batch)
        return
    print(random_models.machine())
    print(f"tokens a second of all replicas, batch {options.batch}, float32, {options.kind} weights; in brackets each")
    lasts = []
    for model in options.models:
        for num_replicas in options.replicas:
            totals = {}
            for name in SETTINGS:
                speeds = run(str(random_models.make(model)[options.kind]), name, num_replicas, options.batch)
                totals[name] = sum(speeds)
                each = " + ".join(f"{speed:.1f}" for speed in speeds)
                print(f"{model:7}{num_replicas} replicas   {name:10}{totals[name]:8.1f}   ({each})", flush=True)
            ratio = totals["nobind 1"] / totals["auto"]
            lasts.append(f"one thread not bound / vLLM's own binding, {model}, {num_replicas} replicas: {ratio:.2f}")
    print("\n".join(lasts))


def run(folder: str, setting: str, num_replicas: int, batch: int) -> list[float]:
    """Tokens a second of each replica, all at work at the same time."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--child", folder, "--batch", str(batch)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    children = [
        subprocess.Popen(
            command,
            env=environment | quiet | SETTINGS[setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(num_replicas)
    ]
    for child in children:
        assert child.stdout
        assert any("ready" in line for line in iter(child.stdout.readline, "")), "an engine did not start"
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate()[0] for child in children]
    return [float(output.splitlines()[-1]) for output in outputs]


def decode(folder: str, batch: int) -> None:
    """Start an engine, say so, wait for a line, and print the tokens a second of a batch that is full all the while."""
    import vllm

    engine = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=batch,
        kv_cache_memory_bytes=1 << 30,
    ).llm_engine
    options = vllm.SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True, detokenize=False)
    num_added = 0

    def step() -> int:
        nonlocal num_added
        while engine.get_num_unfinished_requests() < batch:
            engine.add_request(str(num_added), {"prompt_token_ids": [10 + num_added] * 16}, options)
            num_added += 1
        return len(engine.step())

    for _ in range(8):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    speeds = []
    for _ in range(SLICES):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < SLICE_SECONDS:
            count += step()
        speeds.append(count / (time.perf_counter() - began))
    print(statistics.median(speeds))


if __name__ == "__main__":
    main()
