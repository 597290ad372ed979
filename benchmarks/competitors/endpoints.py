"""Two endpoints for one model: vLLM's own server, and ours on a private Ray cluster with everything on.

The model has the demo's shape, or about 100 million parameters, and random weights that can only say Chinese words, as
the content filter has other work with words than with noise. Both engines get the same settings, of
app/serving/engine.py. It measures nothing but the CPU time of the processes.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from competitors.endpoint_load import words

from app.cluster import PRIVATE, LocalClusterConfig, start_local, stop_local
from app.serving import auth
from app.serving.config import Limits, ServeConfig
from app.serving.engine import engine_arguments, engine_environment

ROOT = Path(__file__).resolve().parents[2]
MODEL = "zero-to-one"
CONTEXT_TOKENS = 512
DEMO = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
LARGE = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12}
RAY_CPUS = 4
START_SECONDS = 180
HIGH = Limits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000, concurrent_requests=10_000)
PATHS = {  # what HAProxy keeps for itself
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_BASE": ".",
    "SERVER_STATE_FILE": "server-state",
}
COLUMNS = {  # of the table of CPU time: what a process's command line says
    "engine": ("VLLM::",),
    "gateway": (":Gateway",),
    "replica": ("LLMServer", "StreamServer", "api_server"),
    "proxy": ("ProxyActor", "HAProxyManager", "haproxy"),
}


class Endpoint(NamedTuple):
    """A server that answers, and the process that its processes descend from."""

    url: str
    key: str
    pid: int


def write_model(folder: Path, shape: dict[str, int]) -> Path:
    """The model's artifact in a subfolder, made when it is missing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app.artifacts import Manifest, publish
    from app.config import RunConfig
    from app.tokens import tokenizer as bpe

    path = folder / "model-{hidden_size}".format(**shape)
    if (path / "manifest.json").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    tokenizer = bpe.train(("\uff0c".join(words()) for _ in range(2)), 6000, 2)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    config = LlamaConfig(
        vocab_size=6000, num_key_value_heads=4, max_position_embeddings=CONTEXT_TOKENS, **shape, **special
    )
    model = LlamaForCausalLM(config)
    silent = [token for token in range(6000) if not re.fullmatch("[\u4e00-\u9fff]+", tokenizer.decode([token]))]
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0  # of many random logits the largest is above 0
    model.save_pretrained(path)
    bpe.save(tokenizer, path)
    publish(Manifest.draft("model", str(path), RunConfig(), {}), {})
    return path


def settings_of(model: Path, folder: Path) -> ServeConfig:
    """Ours, with keys, quota, content filter and audit log; the engine's settings are for both."""
    arguments = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]
    ours = {"model_uri": str(model), "keys_file": str(folder / "keys.yaml"), "audit": {"path": str(folder / "audit")}}
    return ServeConfig.model_validate(arguments | ours)


@contextmanager
def bare(settings: ServeConfig, folder: Path) -> Iterator[Endpoint]:
    """vLLM's own OpenAI server."""
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model_uri]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in engine_arguments(settings, use_gpu=False).items():
        flag = name.replace("_", "-")
        command += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    environment = os.environ | engine_environment(settings, use_gpu=False)
    with (folder / "bare.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{port}", "none", process.pid)
        _wait(endpoint, lambda: process.poll() is None, folder / "bare.log")
        yield endpoint
    finally:
        process.terminate()
        process.wait(60)


def direct_ingress() -> dict[str, str]:
    """Ray's own settings for throughput: HAProxy in front of replicas that speak HTTP themselves, and fewer threads."""
    own = Path(tempfile.mkdtemp(prefix="haproxy-"))  # a socket's path has at most 97 characters
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    switches = dict.fromkeys(("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"), "1")
    paths = {f"RAY_SERVE_HAPROXY_{name}": str(own / path) for name, path in PATHS.items()}
    switches["RAY_SERVE_HAPROXY_RETRY_ON"] = "conn-failure empty-response"  # a replica died before it answered
    return {**switches, **paths, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}


@contextmanager
def ours(settings: ServeConfig, folder: Path, variables: dict[str, str]) -> Iterator[Endpoint]:
    """Our endpoint on a Ray cluster of its own, started with these variables."""
    keys = Path(settings.keys_file)
    keys.unlink(missing_ok=True)
    key = auth.create_key(keys, "benchmark", {"limits": HIGH})
    os.environ.update(variables)
    running = start_local(LocalClusterConfig(folder=str(folder / "cluster"), num_cpus=RAY_CPUS))
    try:
        document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        document["applications"][0]["args"] = settings.model_dump(mode="json", exclude_defaults=True)
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(document))
        options = {"storage_uri": folder, "model_uri": settings.model_uri, "port": running.endpoint_port}
        options |= {"serve_config": folder / "serve_config.yaml", "output_uri": "deployed.yaml"}
        command = [sys.executable, "jobs/deploy_model.py"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        environment = os.environ | PRIVATE | running.environment
        with (folder / "ours.log").open("w") as log:
            deployed = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        endpoint = Endpoint(f"http://127.0.0.1:{running.endpoint_port}", key, running.pid)
        _wait(endpoint, lambda: deployed.returncode == 0, folder / "ours.log")
        yield endpoint
    finally:
        stop_local(folder / "cluster")
        for name in variables:
            os.environ.pop(name)


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time so far of a process and all its descendants, by COLUMNS; what is in none of them is `rest`."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        number = int(path.parent.name)
        parents[number], used[number] = int(fields[1]), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = defaultdict(float)
    for number, seconds in used.items():
        ancestor = number
        while ancestor not in (0, pid):
            ancestor = parents.get(ancestor, 0)
        if ancestor == pid:
            found[_column(number)] += seconds
    return found


def _column(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return "rest"
    return next((name for name, parts in COLUMNS.items() if any(part in command for part in parts)), "rest")


def _wait(endpoint: Endpoint, lives: Callable[[], bool], log: Path) -> None:
    request = urllib.request.Request(f"{endpoint.url}/v1/models", headers={"authorization": f"Bearer {endpoint.key}"})
    deadline = time.monotonic() + START_SECONDS
    while lives() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"{log} ends:\n{log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
    return int(port)
