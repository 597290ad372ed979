"""The vLLM engine's settings: a pure function of ServeConfig, the model's config.json and the machine.

On a GPU vLLM finds them by itself. On a CPU it would take nine tenths of the memory for its cache and bind the threads
of every replica to the same cores. Memory and threads are therefore derived here, unless given: from what the machine
that builds the application has, as if all replicas ran on it. Give them where replicas run on other machines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import storage
from app.models import DEEPSEEK_ROUTER
from app.serving.config import ServeConfig

CPU_SEQUENCES = 64  # computed together; more share the same arithmetic, and each token of all takes longer
CPU_CHUNK_TOKENS = 2048  # of prompts in one step; a longer prompt is cut, and others' tokens come in between
FULL_SEQUENCES = 16  # that fit in the cache at the model's full context, or four times as many at a quarter of it
CACHE_SHARE = 4  # at most this part of the free memory is cache, of all replicas together
MIN_CACHE_BYTES = 256 << 20  # room for prefixes to be found again
BLOCK_TOKENS = 128  # of vLLM's cache on a CPU
# Of vLLM's attention on a CPU. Its kernel for latent attention is for DeepSeek's own sizes only.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Machine:
    """What the settings of an engine on a CPU depend on."""

    num_cores: int  # physical ones that this process may use
    available_bytes: int  # of memory


def read_machine() -> Machine:
    """This machine, within the limits of its container (cgroup v2)."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    num_cores = len({_words(topology.format(cpu)) or (str(cpu),) for cpu in os.sched_getaffinity(0)})
    quota, period = (_words("/sys/fs/cgroup/cpu.max") or ("max", "1"))[:2]
    if quota != "max":
        num_cores = min(num_cores, max(1, int(quota) // int(period)))
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    (limit,) = _words("/sys/fs/cgroup/memory.max") or ("max",)
    if limit != "max":
        used = int(_words("/sys/fs/cgroup/memory.current")[0])
        statistics = _words("/sys/fs/cgroup/memory.stat")
        reclaimable = int(statistics[statistics.index("inactive_file") + 1])
        available = min(available, max(0, int(limit) - used + reclaimable))
    return Machine(num_cores, available)


def engine_arguments(config: ServeConfig, use_gpu: bool, machine: Machine | None = None) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine; without a machine, for this one.

    Raises ValueError when neither the config nor the model tells what a CPU's cache depends on, and for a DeepSeek-V3
    that vLLM would not compute as transformers does.
    """
    has_latent = _has_latent_attention(config)
    if has_latent:
        _refuse_other_answers(config, use_gpu)
    arguments: dict[str, Any] = {
        "dtype": _dtype(config, use_gpu),
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    given = {
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs or (0 if use_gpu else CPU_SEQUENCES),
        "max_num_batched_tokens": config.max_num_batched_tokens or (0 if use_gpu else CPU_CHUNK_TOKENS),
    }
    arguments |= {name: value for name, value in given.items() if value}
    if use_gpu:
        arguments["tensor_parallel_size"] = config.gpus_per_replica
        if config.gpu_memory_utilization:
            arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * (1 << 30)) or _cache_bytes(
            config, machine or read_machine()
        )
        if has_latent:  # vLLM 0.29's kernel turns rows as if each followed the last; here they are parts of longer ones
            arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments


def refuse_untried(config: ServeConfig, use_gpu: bool) -> None:
    """Raises ValueError where layers see chosen blocks of tokens (block_qwen3.py) and the endpoint is not tried so."""
    wrong = {"a GPU": use_gpu, "adapters.folder": bool(config.adapters.folder)}
    found = [name for name, is_set in wrong.items() if is_set]
    if found and _model_settings(config).get("attention_block_tokens"):
        raise ValueError(
            f"model_uri: {config.model_uri} has attention_block_tokens: served on CPUs without adapters, "
            f"and not with {' or '.join(found)}"
        )


def adapter_arguments(config: ServeConfig) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine for LoRA: none without a folder of adapters."""
    if not config.adapters.folder:
        return {}
    size = config.adapters.max_loaded
    return {"enable_lora": True, "max_loras": size, "max_cpu_loras": size, "max_lora_rank": config.adapters.max_rank}


def engine_environment(config: ServeConfig, use_gpu: bool, machine: Machine | None = None) -> dict[str, str]:
    """Environment variables of the replica; without a machine, for this one.

    On a CPU, the number of threads, with a core left to schedulers and HTTP: threads wait for each other in a loop, and
    one without a core holds up all. They are not bound: replicas share this environment, and would share the binding.
    """
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if use_gpu:
        return variables
    if _has_latent_attention(config):
        variables["VLLM_MLA_DISABLE"] = "1"  # keys and values are cached, not what they are made from
    num_free = (machine or read_machine()).num_cores - 1
    num_threads = config.threads_per_replica or max(1, num_free // _num_engines(config))
    return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)}


def model_source(uri: str) -> str | dict[str, str]:
    """Where Ray Serve LLM finds the weights: a local folder, or a bucket that it mirrors to each node."""
    return {"bucket_uri": uri} if "://" in uri else uri


def context_tokens(config: ServeConfig) -> int:
    """Tokens of prompt and answer together. Raises ValueError when neither the config nor the model says it."""
    if config.max_model_len:
        return config.max_model_len
    found = _model_settings(config).get("max_position_embeddings")
    if not found:
        raise ValueError(f"max_model_len: {config.model_uri}/config.json does not tell the context; set it")
    return int(found)


def _num_engines(config: ServeConfig) -> int:
    """The most that run at the same time."""
    return config.max_replicas * (2 if config.candidate.model_uri else 1)


def _cache_bytes(config: ServeConfig, machine: Machine) -> int:
    """Of one replica: what some sequences of full length take, within a share of the machine; at least one of them."""
    block = BLOCK_TOKENS * _token_bytes(config)
    blocks_of_one = -(-context_tokens(config) // BLOCK_TOKENS)
    one, some = (block * (count * blocks_of_one + 1) for count in (1, FULL_SEQUENCES))  # vLLM keeps a block for itself
    share = machine.available_bytes // CACHE_SHARE // _num_engines(config)
    return max(one, min(share, max(some, MIN_CACHE_BYTES)))


def _token_bytes(config: ServeConfig) -> int:
    """Of the keys and values of one token in all layers."""
    settings = _model_settings(config)
    try:
        num_heads = settings["num_attention_heads"]
        width = settings.get("head_dim") or settings["hidden_size"] // num_heads
        num_key_value_heads = settings.get("num_key_value_heads") or num_heads
        if settings.get("model_type") == "deepseek_v3":
            width, num_key_value_heads = _latent_head_size(settings), num_heads
        elements = 2 * settings["num_hidden_layers"] * num_key_value_heads * width
    except KeyError as missing:
        raise ValueError(f"kv_cache_gib: {config.model_uri}/config.json has no {missing}; set it") from None
    return int(elements * ELEMENT_BYTES[_dtype(config, use_gpu=False)])


def _has_latent_attention(config: ServeConfig) -> bool:
    """Whether it is a DeepSeek-V3; one without a config.json is left to who reads it next."""
    if not storage.exists(f"{config.model_uri}/config.json"):
        return False
    return _model_settings(config).get("model_type") == "deepseek_v3"


def _latent_head_size(settings: Mapping[str, Any]) -> int:
    return int(settings["qk_rope_head_dim"] + settings["qk_nope_head_dim"])


def _refuse_other_answers(config: ServeConfig, use_gpu: bool) -> None:
    settings = _model_settings(config)
    if missing := {name: value for name, value in DEEPSEEK_ROUTER.items() if settings.get(name) != value}:
        told = " and ".join(f'"{name}": "{value}"' for name, value in missing.items())
        raise ValueError(
            f"model_uri: {config.model_uri}/config.json must say {told}: vLLM would send tokens to other experts than "
            "transformers"
        )
    if use_gpu:
        return
    size, value_size = _latent_head_size(settings), settings["v_head_dim"]
    if size not in HEAD_SIZES or value_size > size:
        raise ValueError(
            f"model_uri: its heads are {size} wide, their values {value_size}; vLLM's attention on a CPU takes heads "
            f"of {', '.join(map(str, HEAD_SIZES))} and values that are no wider"
        )


def _model_settings(config: ServeConfig) -> dict[str, Any]:
    with storage.open_file(f"{config.model_uri}/config.json") as file:
        settings: dict[str, Any] = json.load(file)
    inner: dict[str, Any] = settings.get("text_config", {})
    return settings | inner


def _dtype(config: ServeConfig, use_gpu: bool) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if use_gpu else "float32"  # few CPUs multiply in bfloat16


def _words(path: str) -> tuple[str, ...]:
    """Of a file of the kernel; none where it does not exist."""
    return tuple(Path(path).read_text().split()) if Path(path).exists() else ()
