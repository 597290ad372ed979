"""The vLLM engine's settings: a pure function of ServeConfig and of whether there is a GPU."""

from __future__ import annotations

import json
from typing import Any

from app import storage
from app.serving.config import ServeConfig

CPU_CHUNK_TOKENS = 2048


def engine_arguments(config: ServeConfig, use_gpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine."""
    arguments: dict[str, Any] = {
        "dtype": _dtype(config, use_gpu),
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
    }
    if config.max_model_len:
        arguments["max_model_len"] = config.max_model_len
    if use_gpu:
        arguments["tensor_parallel_size"] = config.gpus_per_replica
    else:
        arguments["max_num_batched_tokens"] = CPU_CHUNK_TOKENS
    return arguments


def adapter_arguments(config: ServeConfig) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine for LoRA: none without a folder of adapters."""
    if not config.adapters.folder:
        return {}
    size = config.adapters.max_loaded
    return {"enable_lora": True, "max_loras": size, "max_cpu_loras": size, "max_lora_rank": config.adapters.max_rank}


def engine_environment(config: ServeConfig, use_gpu: bool) -> dict[str, str]:
    """Environment variables of the replica."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not use_gpu:
        variables |= {"VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
    return variables


def model_source(uri: str) -> str | dict[str, str]:
    """Where Ray Serve LLM finds the weights: a local folder, or a bucket that it mirrors to each node."""
    return {"bucket_uri": uri} if "://" in uri else uri


def context_tokens(config: ServeConfig) -> int:
    """Tokens of prompt and answer together. Raises ValueError when neither the config nor the model says it."""
    if config.max_model_len:
        return config.max_model_len
    with storage.open_file(f"{config.model_uri}/config.json") as file:
        settings = json.load(file)
    found = settings.get("max_position_embeddings") or settings.get("text_config", {}).get("max_position_embeddings")
    if not found:
        raise ValueError(f"max_model_len: {config.model_uri}/config.json does not tell the context; set it")
    return int(found)


def _dtype(config: ServeConfig, use_gpu: bool) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if use_gpu else "float32"  # few CPUs multiply in bfloat16
