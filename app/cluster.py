"""The Ray cluster: join the one that runs a job, or start a private one on this machine.

The local cluster is a real one (`ray start --head`): token authentication, loopback only, free ports, its own temp
folder, dashboard up. Its folder holds the token, the API key, the log and `env`, a shell file to source.
It does not describe remote clusters; ray_cluster.yaml and deploy/ do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from app.config import Config

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "ZERO_TO_ONE_API_KEY"
START_SECONDS = 90
GAVE_UP = "Timed out waiting for node info"  # after 30 s, which no setting of Ray's changes
STOP_SECONDS = 30
# Of processes that run tasks: large arrays go back to the system as soon as they are freed (glibc would raise the size
# from which they do with each one, Arrow's allocator keep what it had), and results above 4 KB go through Ray's store
# (not above 100): the driver would hold the others, and there are the more small ones the larger a corpus is.
_LEAN = {
    "env_vars": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(256 * 1024),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "RAY_max_direct_call_object_size": "4096",
    }
}
# Of processes that compute on a CPU. By default glibc gives the memory of large tensors back to the kernel, which then
# clears it a moment later: a twentieth of a training step, more than half of AutoAWQ's search. Arenas of other threads
# than the first, and Ray Train's loop runs in one, do so most.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# Without the second, Ray turns --node-ip-address=127.0.0.1 into the machine's outer address and listens there; a client
# must have it too, before `import ray`. Without the third, Ray reports what runs, and a driver that has used Ray Data
# asks a Prometheus for figures to report every ten seconds, whether there is one or not.
PRIVATE = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class LocalClusterConfig(Config):
    """Settings of the private cluster of this machine."""

    folder: str = Field(".cluster", description="where its token, log and address are kept")
    num_cpus: int = Field(0, description="logical CPUs; 0 means cores + 2, so that a served model and a job both fit")
    object_store_bytes: int = Field(1 << 30, description="shared memory for Ray objects")
    dashboard_port: int = Field(8265, description="preferred port; the next free one is taken")
    endpoint_port: int = Field(8000, description="preferred port of the OpenAI endpoint; the next free one is taken")


class LocalCluster(BaseModel):
    """A running private cluster: how to reach it and what to remove when it stops."""

    pid: int
    address: str  # host:port for ray.init
    dashboard_url: str
    endpoint_port: int
    folder: Path
    temp_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the ray command, a driver and the openai client need."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,  # `ray job`
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,  # `serve deploy`
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            **PRIVATE,
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self.endpoint_port}/v1",
            "OPENAI_API_KEY": (self.folder / "api_key").read_text().strip(),
        }


def connect() -> str:
    """Join the cluster this process belongs to, or start a local one; the address of its dashboard."""
    import ray

    context = ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def exchange(
    inputs: Sequence[tuple[Any, ...]],
    split: Callable[..., Iterable[Any]],
    merge: Callable[..., Any],
    num_partitions: int,
    extra: Sequence[Any] | None = None,
) -> list[Any]:
    """All-to-all on Ray tasks: `split(*input)` gives a part for each partition, `merge(parts[, extra])` joins them.

    Returns references to the merged partitions; inputs and extras may be references. The order of parts is that of the
    inputs, so the result does not depend on who runs what. Only parts in flight take memory, and of a split
    that yields them only one at a time; Ray spills the rest.
    """
    import ray

    if num_partitions == 1:  # Ray would hand on the list of one part as the part
        splitting = ray.remote(_only).options(runtime_env=_LEAN)
        parts = [[splitting.remote(split, *one)] for one in inputs]
    else:
        splitting = ray.remote(split).options(num_returns=num_partitions, runtime_env=_LEAN)
        parts = [splitting.remote(*one) for one in inputs]
    merging = ray.remote(_merge).options(runtime_env=_LEAN)
    extras = [None] * num_partitions if extra is None else extra
    return [
        merging.remote(merge, extra is not None, one, *[part[index] for part in parts])
        for index, one in enumerate(extras)
    ]


def map_tasks(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """What the function returns for each item, in the order in which Ray tasks end; a killed worker's task runs again.

    Twice as many are submitted at a time as there are CPUs, so that neither driver nor scheduler holds all of them.
    """
    import ray

    task = ray.remote(function).options(runtime_env=_LEAN)
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(items)
    running = [task.remote(item) for item in islice(waiting, window)]
    while running:
        (done,), running = ray.wait(running, num_returns=1)
        running += [task.remote(item) for item in islice(waiting, 1)]
        yield ray.get(done)


def _only(split: Callable[..., Iterable[Any]], *one: Any) -> Any:
    (part,) = split(*one)
    return part


def _merge(merge: Callable[..., Any], has_extra: bool, extra: Any, *parts: Any) -> Any:
    return merge(list(parts), extra) if has_extra else merge(list(parts))


def has_gpu() -> bool:
    """Whether any node of the joined cluster has a GPU."""
    import ray

    return bool(ray.cluster_resources().get("GPU", 0))


def start_local(config: LocalClusterConfig) -> LocalCluster:
    """Start the private cluster, or return the one that already runs in the folder.

    Raises ValueError with the end of its log when it does not come up.
    """
    folder = Path(config.folder).resolve()
    if running := find_local(folder):
        return running
    folder.mkdir(parents=True, exist_ok=True)
    with _one_start_at_a_time():
        try:
            return _start(config, folder)
        except ValueError as error:
            if GAVE_UP not in str(error):
                raise
            logger.warning("a part of Ray waited in vain for another, on a cold disk or busy cores; once more")
            return _start(config, folder)


def _start(config: LocalClusterConfig, folder: Path) -> LocalCluster:
    for name in ("token", "api_key"):
        _write_secret(folder / name, secrets.token_hex(32))
    temp_dir = Path("/tmp") / f"z21-{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"  # socket paths are short
    gcs_port, dashboard_port, endpoint_port = _free_ports(6379, config.dashboard_port, config.endpoint_port)
    command = _command(config, temp_dir, gcs_port, dashboard_port)
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(folder),
        )
    cluster = LocalCluster(
        pid=process.pid,
        address=f"127.0.0.1:{gcs_port}",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        endpoint_port=endpoint_port,
        folder=folder,
        temp_dir=temp_dir,
    )
    (folder / "cluster.json").write_text(cluster.model_dump_json(indent=2))
    exports = "".join(f"export {name}='{value}'\n" for name, value in cluster.environment.items())
    _write_secret(folder / "env", exports)
    _wait_until_up(cluster, process)
    return cluster


@contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    """From the choice of free ports until they are taken: two clusters would choose the same ones."""
    with open(f"/tmp/z21-start-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_local(folder: Path) -> LocalCluster | None:
    """The cluster that runs in the folder, or None."""
    record = folder / "cluster.json"
    if not record.exists():
        return None
    cluster = LocalCluster.model_validate(json.loads(record.read_text()))
    return cluster if _is_ours(cluster) else None


def stop_local(folder: Path) -> bool:
    """Stop the cluster of the folder, remove its temp folder and secrets; False if none was running."""
    folder = folder.resolve()
    cluster = find_local(folder)
    if cluster:
        os.kill(cluster.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _is_ours(cluster) and time.monotonic() < deadline:
            time.sleep(0.2)
        _kill_group(cluster.pid)
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    for name in ("cluster.json", "token", "api_key", "env"):
        (folder / name).unlink(missing_ok=True)
    return cluster is not None


def _command(config: LocalClusterConfig, temp_dir: Path, gcs_port: int, dashboard_port: int) -> list[str]:
    client_port, agent_port = _free_ports(20001, 20002)
    options = {
        "port": gcs_port,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": agent_port,
        "ray-client-server-port": client_port,
        "min-worker-port": 0,  # any free port: two clusters on one machine do not collide
        "max-worker-port": 0,
        "num-cpus": config.num_cpus or (os.cpu_count() or 1) + 2,
        "object-store-memory": config.object_store_bytes,
        "temp-dir": temp_dir,
    }
    flags = ["--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *flags]


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # a job's `python` is this one
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        **PRIVATE,
        API_KEY_VARIABLE: (folder / "api_key").read_text().strip(),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the only node has none to hand its work to: else 30 s to stop
        "HF_HUB_OFFLINE": "1",
    }


def _wait_until_up(cluster: LocalCluster, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _has_alive_node(cluster):
            return
        time.sleep(0.3)
    log = (cluster.folder / "ray.log").read_text(errors="replace")
    stop_local(cluster.folder)
    raise ValueError(f"the Ray cluster did not start within {START_SECONDS} s; its log ends:\n{log[-2000:]}")


def _has_alive_node(cluster: LocalCluster) -> bool:
    """Whether the dashboard answers and knows the node; both need some seconds."""
    request = urllib.request.Request(f"{cluster.dashboard_url}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {(cluster.folder / 'token').read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except OSError:
        return False
    return any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)


def _is_ours(cluster: LocalCluster) -> bool:
    """Whether the recorded process still runs and is that cluster, not another program with a reused pid."""
    try:
        command = Path(f"/proc/{cluster.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return f"--temp-dir={cluster.temp_dir}".encode() in command


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it ended by itself


def _write_secret(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def _free_ports(*preferred: int) -> list[int]:
    """A free loopback port for each wish: itself or the next ones upward."""
    taken: list[int] = []
    for port in preferred:
        while port in taken or not _is_free(port):
            port += 1
        taken.append(port)
    return taken


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
