"""The endpoint on a private Ray cluster, with a small model of random weights: started, watched, deployed anew.

Nothing is installed or fetched. Engines and ingress replicas are told apart by the names of their processes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from app.artifacts import Manifest, publish
from app.cluster import PRIVATE, LocalCluster, LocalClusterConfig, start_local, stop_local
from app.config import RunConfig
from app.serving.config import APPLICATION, DeployConfig

ROOT = Path(__file__).resolve().parents[2]
NUM_CPUS = 4
NUM_REPLICAS = 2  # of engines and of ingress
CONTEXT_TOKENS = 512
ENGINE, INGRESS = "StreamServer", "Gateway"
PATIENCE_SECONDS = 300


def write_model(folder: Path, seed: int) -> None:
    """A Llama of 7 million parameters with random weights and a tokenizer for three sentences, as an artifact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.tokens import tokenizer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    texts = ["却说曹操引兵南下，刘备问计于孔明。孔明曰：「亮夜观天象，操军必败。」The quick brown fox 2024."]
    tokenizer.save(tokenizer.train(texts * 2, 384, 2), folder)
    publish(Manifest.draft("model", str(folder), RunConfig(), {}), {"seed": seed})


@contextmanager
def cluster(folder: Path) -> Iterator[LocalCluster]:
    """A private Ray cluster that this process has joined, up while the block runs."""
    os.environ.update(PRIVATE)  # before the first `import ray`
    running = start_local(LocalClusterConfig(folder=str(folder), num_cpus=NUM_CPUS))
    os.environ.update(running.environment)
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        yield running
    finally:
        ray.shutdown()
        stop_local(folder)


def deploy(folder: Path, model: str, running: LocalCluster, arguments: dict[str, Any]) -> Manifest:
    """Deploy the model of a folder in `folder` and wait until all its replicas run."""
    from app.serving import stage

    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    document["applications"][0]["args"] |= arguments
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(document))
    config = DeployConfig(
        storage_uri=str(folder),
        model_uri=model,
        serve_config=str(path),
        port=running.endpoint_port,
        output_uri=f"{model}.yaml",
        timeout_seconds=PATIENCE_SECONDS,
    )
    return stage.run(config)


def processes(running: LocalCluster, kind: str) -> dict[int, psutil.Process]:
    """Live replicas of a kind, by process id."""
    found = {}
    for process in psutil.Process(running.pid).children(recursive=True):
        try:
            line = process.cmdline()[:1]
        except psutil.Error:
            continue  # it has just ended
        if line and line[0].startswith(f"ray::ServeReplica:{APPLICATION}:{kind}"):
            found[process.pid] = process
    return found


def wait_until_whole(running: LocalCluster, kind: str, gone: set[int]) -> None:
    """Until all replicas run and none of a kind is one of those gone. Raises RuntimeError if that takes too long."""
    from ray import serve

    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        deployments = serve.status().applications[APPLICATION].deployments.values()
        is_whole = all(one.replica_states == {"RUNNING": NUM_REPLICAS} for one in deployments)
        found = set(processes(running, kind))
        if is_whole and len(found) == NUM_REPLICAS and not gone & found:
            return
        time.sleep(0.5)
    raise RuntimeError(f"{kind}: not whole again after {PATIENCE_SECONDS} s")


def engine_process(replica: psutil.Process) -> psutil.Process:
    """The process of vLLM's engine, a child of its replica."""
    (engine,) = [child for child in replica.children() if "EngineCore" in " ".join(child.cmdline())]
    return engine


def resident_bytes(running: LocalCluster) -> dict[str, int]:
    """Memory of all processes of each kind; an engine's child processes count."""
    sizes = {}
    for kind in (ENGINE, INGRESS):
        families = [[one, *one.children(recursive=True)] for one in processes(running, kind).values()]
        sizes[kind] = sum(process.memory_info().rss for family in families for process in family)
    return sizes
