"""What everything on costs: keys, quota, content filter and audit log on Ray Serve, beside vLLM's own server.

One server runs at a time: the bare one before and after ours, so that a machine that became slower shows. The table has
medians of all rounds and the CPU time of each kind of process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from competitors import endpoints
from competitors.endpoints import Endpoint

BARE, OURS = "vLLM alone", "zero-to-one"
CLIENTS = (1, 8, 32)
REQUESTS = {1: 24, 8: 96, 32: 256}
LARGE_REQUESTS = {1: 5, 8: 24, 32: 64}
AIM_THROUGHPUT, AIM_FIRST_MS, AIM_QPS = 0.95, 10, 8
LOAD = Path(__file__).parent / "competitors" / "endpoint_load.py"
Setting = tuple[bool, int]  # stream, clients
Runs = dict[Setting, list[dict[str, Any]]]


def ask(endpoint: Endpoint, setting: Setting, num_requests: int, seed: int) -> dict[str, Any]:
    """One load; its figures, with the milliseconds of CPU time a request by kind of process."""
    stream, clients = setting
    command = [sys.executable, str(LOAD), f"{endpoint.url}/v1/chat/completions", "--clients", str(clients)]
    command += ["--requests", str(num_requests), "--seed", str(seed), *(["--stream"] if stream else [])]
    before = endpoints.cpu_seconds(endpoint.pid)
    result = subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": endpoint.key}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the load failed:\n{result.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(result.stdout)
    spent = {name: seconds - before.get(name, 0) for name, seconds in endpoints.cpu_seconds(endpoint.pid).items()}
    spent["client"] = figures["client_cpu"]
    return figures | {f"cpu_{name}": 1000 * seconds / num_requests for name, seconds in spent.items()}


def rounds(name: str, endpoint: Endpoint, given: argparse.Namespace, found: Runs) -> None:
    """All settings, `--runs` times."""
    requests = LARGE_REQUESTS if given.large else REQUESTS
    for stream in (True, False):  # warm-up
        ask(endpoint, (stream, 8), 16, 10**6)
    for _ in range(given.runs):
        for stream in kinds(given):
            for clients in CLIENTS:
                runs = found[stream, clients]
                runs.append(ask(endpoint, (stream, clients), requests[clients], len(runs)))
                line = f"{name}: {clients} clients, {'stream' if stream else 'whole'}: {runs[-1]['qps']:.2f} requests/s"
                print(f"  {line}", file=sys.stderr, flush=True)


def kinds(given: argparse.Namespace) -> tuple[bool, ...]:
    """Streams and answers at once; of the large model streams alone, as they take long."""
    return (True,) if given.large else (True, False)


def measure(given: argparse.Namespace) -> dict[str, Runs]:
    """Figures of every run of both."""
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = endpoints.write_model(folder, endpoints.LARGE if given.large else endpoints.DEMO)
    settings = endpoints.settings_of(model, folder)
    found: dict[str, Runs] = {BARE: defaultdict(list), OURS: defaultdict(list)}
    with endpoints.bare(settings, folder) as alone:
        rounds(BARE, alone, given, found[BARE])
    variables = {} if given.python_proxy else endpoints.direct_ingress()
    with endpoints.ours(settings, folder, variables) as full:
        rounds(OURS, full, given, found[OURS])
    with endpoints.bare(settings, folder) as alone:
        rounds(BARE, alone, given, found[BARE])
    lines = [
        {"name": name, "setting": setting} | run
        for name in found
        for setting in found[name]
        for run in found[name][setting]
    ]
    (folder / f"figures-{model.name}.json").write_text(json.dumps(lines))
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = {name for run in runs for name in run}
    return {name: statistics.median(run.get(name, 0) for run in runs) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "endpoint-overhead"
    parser.add_argument("--folder", type=Path, default=default, help="model and logs")
    parser.add_argument("--runs", type=int, default=2, help="rounds each time a server has its turn")
    parser.add_argument("--large", action="store_true", help="a model of about 100 million parameters")
    parser.add_argument(
        "--python-proxy", action="store_true", help="Ray's defaults instead of HAProxy and its throughput settings"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped
    found = measure(given)
    show({name: {setting: medians(runs[setting]) for setting in runs} for name, runs in found.items()}, kinds(given))


def show(median: dict[str, dict[Setting, dict[str, float]]], both: tuple[bool, ...]) -> None:
    """The table, and the ratios last."""
    columns = ("client", "proxy", "gateway", "replica", "engine", "rest")
    print(f"{'':30} requests/s tokens/s  first ms (p90)  each ms | CPU ms a request: {' '.join(columns)}")
    for stream, clients in product(both, CLIENTS):
        for name in (BARE, OURS):
            one = median[name][stream, clients]
            what = f"{name}, {clients} {'streams' if stream else 'at once'}"
            cpu = " ".join(f"{one.get(f'cpu_{column}', 0):.1f}".rjust(len(column)) for column in columns)
            first = f"{1000 * one['first_median']:7.1f} ({1000 * one['first_p90']:.1f})" if stream else ""
            each = f"{1000 * one['each_median']:7.2f}" if stream else ""
            print(f"{what:30} {one['qps']:10.2f} {one['tokens_per_second']:8.0f} {first:16} {each:8} | {cpu}")
    for stream in both:
        kind = "streams" if stream else "at once"
        for name in (BARE, OURS):
            ratio = median[name][stream, 32]["qps"] / median[name][stream, 1]["qps"]
            print(f"{name}, {kind}: requests/s of 32 clients / 1 client: {ratio:.2f} (aim {AIM_QPS})")
        for clients in CLIENTS:
            alone, full = (median[name][stream, clients] for name in (BARE, OURS))
            if stream:
                later = 1000 * (full["first_median"] - alone["first_median"])
                print(f"{clients} {kind}: first text after vLLM's: {later:+.1f} ms (aim {AIM_FIRST_MS:+d})")
            ratio = full["qps"] / alone["qps"]
            print(f"{clients} {kind}: requests/s of {OURS} / {BARE}: {ratio:.3f} (aim {AIM_THROUGHPUT})")


if __name__ == "__main__":
    main()
