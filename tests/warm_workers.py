"""Ray workers forked from a process that has imported torch and DeepSpeed: the tests start some hundreds of them.

A training worker's imports took ten of its fourteen seconds of CPU time. Ray starts workers by the `py_executable` of
the job; here that is this file, which sends its arguments, environment and streams to the server and stays until the
worker that it has forked ends. Engines, whose libraries read the environment when they are imported, and workers with
packages of their own start as usual, and so do all when there is no server.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

    from app.cluster import LocalCluster

MODULES = ("pandas", "pyarrow.parquet", "torch", "transformers.integrations", "deepspeed")
MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3")
NUM_STREAMS = 3  # standard input, output, error
_servers: list[int] = []


@contextmanager
def forking() -> Iterator[dict[str, str]]:
    """Run the server; yields variables of drivers whose workers it shall fork."""
    import subprocess
    import tempfile

    import psutil

    with tempfile.TemporaryDirectory(prefix="z21-workers-", dir="/tmp") as folder:  # paths of sockets are short
        executable = f"{sys.executable} -I -S {__file__} {folder}/socket"
        server = subprocess.Popen([sys.executable, __file__, "serve", f"{folder}/socket"])
        _servers.append(server.pid)
        try:
            yield {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": executable}})}
            assert server.poll() is None, "the server of forked workers has ended"
        finally:
            _servers.remove(server.pid)
            left = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
            for process in (server, *left):
                process.kill()
            server.wait()


def family(cluster: LocalCluster) -> list[psutil.Process]:
    """The processes that the cluster has started, and all that were forked here, be it for another cluster."""
    import psutil

    return [child for pid in (cluster.pid, *_servers) for child in psutil.Process(pid).children(recursive=True)]


def serve(path: str) -> None:
    """Fork a worker for each connection, until killed."""
    import gc
    import importlib

    for name in (*MODULES, *MODELS):
        importlib.import_module(name)
    assert "ray" not in sys.modules  # it reads its settings when it is imported
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _be_worker(connection)  # which keeps the connection open to its end
            connection.close()


def _be_worker(connection: socket.socket) -> None:
    import random
    import runpy

    import numpy as np
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker's whole group with it
    header, streams, _, _ = socket.recv_fds(connection, 4, NUM_STREAMS)
    (size,) = struct.unpack("I", header)
    arguments, environment, folder = json.loads(connection.recv(size, socket.MSG_WAITALL))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = arguments
    sys.path[:1] = [os.path.dirname(arguments[0]), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


def _hand_over(path: str, arguments: list[str]) -> None:
    """Have a worker forked and wait for its end; returns if there is no server."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return
        data = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(connection, [struct.pack("I", len(data))], range(NUM_STREAMS))
        connection.sendall(data)
        connection.recv(1)
        sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    if "/overlays/" not in os.environ.get("PYTHONPATH", "") and not any(
        name.startswith("VLLM_") for name in os.environ
    ):
        _hand_over(sys.argv[1], sys.argv[2:])
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
