"""Generated requests to a live endpoint: what statuses come back, and how much memory its processes take meanwhile.

The requests are those of the tests (tests/serving/generated.py), drawn from the engine's own schemas, and malformed
HTTP between them.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import yarl
from competitors import endpoint
from competitors.clients import Clients

from app.cluster import LocalCluster

sys.path.insert(0, str(endpoint.ROOT))

NUM_SENDERS = 16
PATIENCE_SECONDS = 120
MEASURES = 10  # of memory
FLAT = 0.05  # of memory, that the second half may add


@dataclass
class Generated:
    """What came back, and the memory of the engines and of the ingress replicas after so many requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[Any] = field(default_factory=list)  # requests that got 5xx, or no answer
    sizes: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    num_malformed: int = 0
    num_processes_lost: int = 0

    def growth(self, kind: str) -> float:
        """Of the second half, as a share."""
        first, last = self.sizes[len(self.sizes) // 2][1][kind], self.sizes[-1][1][kind]
        return last / first - 1


async def send(count: int, clients: Clients, running: LocalCluster) -> Generated:
    """Send so many, NUM_SENDERS at a time, and each malformed one between every two measures."""
    from tests.serving.generated import requests
    from tests.serving.test_generated_requests import generate, schemas

    made = generate(requests(schemas(), clients.model), count)
    done = Generated()
    before = {kind: set(endpoint.processes(running, kind)) for kind in (endpoint.ENGINE, endpoint.INGRESS)}
    timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for part in range(MEASURES):
            waiting = made[part::MEASURES]
            await asyncio.gather(*(_sender(waiting, session, clients, done) for _ in range(NUM_SENDERS)))
            await asyncio.to_thread(_send_malformed, clients, done)
            done.sizes.append((done.statuses.total(), endpoint.resident_bytes(running)))
            print(f"  {done.statuses.total()} generated requests", file=sys.stderr, flush=True)
    done.num_processes_lost = sum(len(pids - set(endpoint.processes(running, kind))) for kind, pids in before.items())
    return done


async def _sender(waiting: list[Any], session: aiohttp.ClientSession, clients: Clients, done: Generated) -> None:
    keys = {"right": clients.key, "wrong": "wrong"}
    root = yarl.URL(clients.base_url).origin()
    while waiting:
        one = waiting.pop()
        headers = {"authorization": f"Bearer {keys[one.key]}"} if one.key else {}
        url = yarl.URL.build(scheme=root.scheme, host=root.host or "", port=root.port, path=one.path)
        try:
            async with session.request(one.method, url, data=one.body, headers=headers) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        done.statuses[status] += 1
        if status == 0 or status >= 500:
            done.failures.append((status, one))


def _send_malformed(clients: Clients, done: Generated) -> None:
    from tests.serving.test_resilience import MALFORMED, exchange

    root = yarl.URL(clients.base_url)
    for raw in MALFORMED:
        reply = exchange(root.port or 80, raw.replace(b"KEY", clients.key.encode()))
        done.num_malformed += 1
        if reply.startswith(b"HTTP/1.1 5"):
            done.failures.append((500, raw[:100]))


def show(done: Generated) -> None:
    """Statuses, memory, and the figures that have an aim."""
    told = ", ".join(f"{count} x {status}" for status, count in sorted(done.statuses.items()))
    print(f"{done.statuses.total()} generated requests: {told}; {done.num_malformed} malformed ones between them")
    print(f"{'memory, MiB, after':20}" + "".join(f"{count:8d}" for count, _ in done.sizes))
    for kind, name in ((endpoint.ENGINE, "engines"), (endpoint.INGRESS, "ingress replicas")):
        print(f"{name:20}" + "".join(f"{sizes[kind] >> 20:8d}" for _, sizes in done.sizes))
    for status, one in done.failures[:20]:
        print(f"  {status}: {str(one)[:300]}")
    print()


def show_aims(done: Generated) -> None:
    """The figures that have an aim."""
    print(f"{'generated: answers of 5xx, or none':58} {len(done.failures):6d}   (aim: 0)")
    print(f"{'generated: processes lost':58} {done.num_processes_lost:6d}   (aim: 0)")
    for kind, name in ((endpoint.ENGINE, "engines"), (endpoint.INGRESS, "ingress replicas")):
        what = f"generated: memory of the {name} in the second half, %"
        print(f"{what:58} {100 * done.growth(kind):+6.1f}   (aim: at most {100 * FLAT:+.0f})")
