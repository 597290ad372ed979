"""How fast the endpoint's engine decodes a model: vLLM, offline, in the process that calls this.

Prompts of equal length are answered at once, a warm-up first; a run's tokens a second are of the answers, the time is
that of prompts and answers together. It does not measure HTTP, queues or the gateway: benchmarks/ do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from app.evaluation.config import SpeedConfig

CACHE_BYTES = 1 << 30  # on a CPU, where vLLM would take most of the memory
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine dies with this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MLA_DISABLE": "1",  # as the endpoint serves DeepSeek's attention on a CPU
    "HF_HUB_OFFLINE": "1",
}


def decode(model_dir: Path, documents: Sequence[Sequence[int]], config: SpeedConfig) -> tuple[str, list[list[float]]]:
    """What it ran on, and of each batch size the seconds of each run.

    Documents are token ids; those with fewer than prompt_tokens are passed over. Raises ValueError when none is left.
    """
    prompts = [list(ids[: config.prompt_tokens]) for ids in documents if len(ids) >= config.prompt_tokens]
    if not prompts:
        raise ValueError(f"speed.prompt_tokens: no held-out document has {config.prompt_tokens} tokens")
    os.environ.update(ENVIRONMENT)
    import torch
    import vllm

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        settings = {"dtype": "auto", "tensor_parallel_size": config.num_gpus}
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))  # the endpoint leaves a core to others, too
        settings = {"dtype": "float32", "kv_cache_memory_bytes": CACHE_BYTES}
    engine = vllm.LLM(
        str(model_dir),
        load_format="safetensors",
        skip_tokenizer_init=True,
        enforce_eager=config.enforce_eager,
        max_model_len=config.prompt_tokens + config.new_tokens,
        max_num_seqs=max(config.batch_sizes),
        enable_prefix_caching=False,  # the same prompts come again and again
        **settings,
    )
    options = vllm.SamplingParams(max_tokens=config.new_tokens, temperature=0, ignore_eos=True, detokenize=False)

    def seconds(batch: int) -> float:
        given = [{"prompt_token_ids": prompts[index % len(prompts)]} for index in range(batch)]
        began = time.perf_counter()
        engine.generate(given, options, use_tqdm=False)
        return time.perf_counter() - began

    found = []
    for batch in config.batch_sizes:
        seconds(batch)
        found.append([seconds(batch) for _ in range(config.num_runs)])
    ran_on = (
        f"{config.num_gpus} × {torch.cuda.get_device_name()}" if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"vLLM {vllm.__version__}, {ran_on}", found
