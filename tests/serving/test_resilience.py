"""A real endpoint of two engine and two ingress replicas that is killed, flooded with junk and deployed anew.

One deployment, in this order. Whoever kills waits for nothing: the next test finds the endpoint as a client would.
"""

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from app.artifacts import Manifest, publish
from app.cluster import LocalCluster
from app.config import RunConfig
from app.serving import auth
from app.serving.config import APPLICATION, DeployConfig, Limits
from tests.serving.generated import Request, requests
from tests.serving.test_endpoint import MALFORMED
from tests.serving.test_generated_requests import generate, schemas
from tests.warm_workers import family

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "zero-to-one"
ENGINE, INGRESS = "StreamServer", "Gateway"
NUM_REQUESTS, NUM_WARM = 1_000, 300
MAX_GROWTH_BYTES = 48 << 20  # of a process, over the requests after the warm ones
PER_MINUTE = 60
LIMITS = {
    "res-killed": Limits(requests_per_minute=PER_MINUTE),
    "res-deployed": Limits(requests_per_minute=PER_MINUTE),
    "res-tokens": Limits(tokens_per_minute=100),
}


@pytest.fixture(scope="module", name="keys")
def keys_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The keys file, and the keys in it by name."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {name: auth.create_key(path, name, {"limits": limits}) for name, limits in LIMITS.items()}
    made["res-free"] = auth.create_key(path, "res-free", {})
    made["res-expired"] = auth.create_key(path, "res-expired", {"expires_at": datetime(2026, 1, 1, tzinfo=UTC)})
    return path, made


@pytest.fixture(scope="module", name="deploy")
def deploy_fixture(
    cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, dict[str, str]]
) -> Iterator[Callable[..., None]]:
    """Deploys the endpoint, with changes to its settings, and waits until all of it runs."""
    import ray
    from ray import serve

    from app.serving import stage
    from app.serving.gateway import LEDGER, NAMESPACE
    from tests.serving.tiny import write_models

    _, twin = write_models(tmp_path_factory.mktemp("resilience"))
    publish(Manifest.draft("model", str(twin), RunConfig(), {}), {})
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    document["applications"][0]["args"] |= {
        "keys_file": str(keys[0]),
        "ingress_replicas": 2,
        "min_replicas": 2,
        "max_replicas": 2,
        "enforce_eager": True,  # tests/test_pipeline.py serves compiled
    }

    def deploy(**changes: Any) -> None:
        document["applications"][0]["args"] |= changes
        path = twin.parent / "given.yaml"
        path.write_text(yaml.safe_dump(document))
        stage.run(
            DeployConfig(
                storage_uri=str(twin.parent),
                model_uri="twin",
                serve_config=str(path),
                port=cluster.endpoint_port,
            )
        )

    deploy()
    yield deploy
    serve.shutdown()
    ray.kill(ray.get_actor(LEDGER, namespace=NAMESPACE))  # one that was killed before gives the next test nothing


@pytest.fixture(name="web")
def web_fixture(
    cluster: LocalCluster, deploy: Callable[..., None], keys: tuple[Path, dict[str, str]]
) -> Iterator[Callable[[str], httpx.Client]]:
    """`web(name)`: a client with the key of that name."""
    made: list[httpx.Client] = []

    def web(name: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {keys[1].get(name, name)}"} if name else {}
        made.append(httpx.Client(base_url=f"http://127.0.0.1:{cluster.endpoint_port}", headers=headers, timeout=60))
        return made[-1]

    yield web
    for client in made:
        client.close()


def replicas(cluster: LocalCluster, kind: str) -> list[psutil.Process]:
    """The live replicas of a kind."""
    found = []
    for process in family(cluster):
        try:
            line = process.cmdline()[:1]
        except psutil.Error:
            continue  # it has just ended
        if line and line[0].startswith(f"ray::ServeReplica:{APPLICATION}:{kind}"):
            found.append(process)
    return found


def resident_bytes(cluster: LocalCluster) -> dict[int, int]:
    """Of each replica, and of the processes of its engine, by process id."""
    families = [[one, *one.children(recursive=True)] for kind in (ENGINE, INGRESS) for one in replicas(cluster, kind)]
    return {process.pid: process.memory_info().rss for family in families for process in family}


def test_a_thousand_generated_requests_over_http_end_without_5xx_and_memory_stays_flat(
    cluster: LocalCluster, web: Callable[[str], httpx.Client], keys: tuple[Path, dict[str, str]]
) -> None:
    clients = {"right": web("res-free"), "wrong": web("wrong"), "": web("")}
    made = generate(requests(schemas(), MODEL), NUM_REQUESTS)

    def send(one: Request) -> int:
        reply = clients[one.key].request(one.method, one.path, content=one.body)
        assert 0 < reply.status_code < 500, (one, reply.text)
        return reply.status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(send, made[:NUM_WARM]))
        before = resident_bytes(cluster)
        statuses += Counter(pool.map(send, made[NUM_WARM:]))
    for raw in (one.replace(b"KEY", keys[1]["res-free"].encode()) for one in MALFORMED):
        reply = exchange(cluster.endpoint_port, raw)
        assert not reply.startswith(b"HTTP/1.1 5"), (raw[:200], reply[:500])
    after = resident_bytes(cluster)
    assert statuses.total() >= NUM_REQUESTS
    assert statuses[200] > NUM_REQUESTS / 10
    assert set(after) == set(before), "a process ended"
    assert max(after[pid] - before[pid] for pid in before) < MAX_GROWTH_BYTES
    assert clients[""].get("/ready").status_code == 200


def exchange(port: int, raw: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or says nothing for a while."""
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(raw)
        with suppress(OSError):  # it has answered and closed already
            connection.shutdown(socket.SHUT_WR)
        try:
            while part := connection.recv(65536):
                reply += part
        except (TimeoutError, ConnectionResetError):
            pass
    return reply


def test_an_expired_key_is_refused_and_a_new_one_counts_within_two_seconds(
    web: Callable[[str], httpx.Client], keys: tuple[Path, dict[str, str]]
) -> None:
    reply = web("res-expired").get("/v1/models")
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "expired_api_key")
    made = web(auth.create_key(keys[0], "res-new", {}))
    time.sleep(2)
    assert [made.get("/v1/models").status_code for _ in range(8)] == [200] * 8  # from both ingress replicas
    auth.revoke_key(keys[0], "res-new")
    time.sleep(2)
    assert [made.get("/v1/models").status_code for _ in range(8)] == [401] * 8


def test_tokens_over_the_quota_are_refused_with_a_time_to_come_again(web: Callable[[str], httpx.Client]) -> None:
    limited = web("res-tokens")
    body = {"model": MODEL, "prompt": "孔明", "max_tokens": 90, "ignore_eos": True}
    wanted = 93  # three for the prompt
    answered = limited.post("/v1/completions", json=body)
    assert answered.status_code == 200
    assert answered.headers["x-ratelimit-limit-tokens"] == "100"
    refused = limited.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    missing = wanted - int(refused.headers["x-ratelimit-remaining-tokens"])
    assert int(refused.headers["retry-after"]) == pytest.approx(missing * 60 / 100, abs=2)
    assert refused.headers["x-ratelimit-reset-tokens"]


def spend(client: httpx.Client, num_requests: int) -> Counter[int]:
    """Statuses of so many small requests, eight at a time."""

    def ask(_: int) -> int:
        return client.post("/tokenize", json={"model": MODEL, "prompt": "孔明"}).status_code

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(ask, range(num_requests)))


def test_a_killed_ledger_and_ingress_give_no_second_quota(
    cluster: LocalCluster, web: Callable[[str], httpx.Client]
) -> None:
    limited, began = web("res-killed"), time.monotonic()
    spent = spend(limited, PER_MINUTE // 2)
    assert spent == {200: PER_MINUTE // 2}
    psutil.Process(ledger_pid()).send_signal(signal.SIGKILL)
    replicas(cluster, INGRESS)[0].send_signal(signal.SIGKILL)
    later = spend(limited, 2 * PER_MINUTE)
    assert set(later) <= {200, 429}
    assert later[429] > 0
    assert spent[200] + later[200] <= PER_MINUTE * (1 + (time.monotonic() - began) / 60) + 1


def ledger_pid() -> int:
    """The process of the one ledger."""
    from ray.util.state import list_actors

    from app.serving.gateway import LEDGER

    (found,) = list_actors(filters=[("name", "=", LEDGER), ("state", "=", "ALIVE")], detail=True)
    return int(found.pid)


@pytest.mark.parametrize("victim", ["replica", pytest.param("engine's process", marks=pytest.mark.long)])
def test_a_killed_engine_fails_no_request_and_cuts_streams_cleanly(
    cluster: LocalCluster, web: Callable[[str], httpx.Client], victim: str
) -> None:
    web("res-free")
    wait_for_replicas(2)
    replica = replicas(cluster, ENGINE)[0]
    target = replica if victim == "replica" else engine_process(replica)
    headers = dict(web("res-free").headers)
    outcomes = asyncio.run(load(f"http://127.0.0.1:{cluster.endpoint_port}", headers, target))
    assert [outcome for outcome in outcomes if outcome not in ("whole", "told")] == []
    assert outcomes.count("whole") > 50
    replica.wait(30)  # a replica without its engine does not stay


def engine_process(replica: psutil.Process) -> psutil.Process:
    """The process of vLLM's engine, a child of its replica."""
    (engine,) = [child for child in replica.children() if "EngineCore" in " ".join(child.cmdline())]
    return engine


async def load(url: str, headers: dict[str, str], target: psutil.Process) -> list[str]:
    """Sixteen clients, half of them streaming, from two seconds before the target is killed until ten after it."""
    outcomes: list[str] = []
    is_over = asyncio.Event()

    async def client(is_stream: bool) -> None:
        body = {"model": MODEL, "prompt": "孔明", "max_tokens": 64, "ignore_eos": True, "stream": is_stream}
        while not is_over.is_set():
            async with web.stream("POST", "/v1/completions", json=body) as reply:
                text = (await reply.aread()).decode()
            lines = [line for line in text.split("\n") if line]  # aiter_lines would also end one within a token's text
            outcomes.append(ending(reply.status_code, lines, is_stream))

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as web:
        clients = [asyncio.create_task(client(number % 2 == 0)) for number in range(16)]
        await asyncio.sleep(2)
        target.send_signal(signal.SIGKILL)
        await asyncio.sleep(10)
        is_over.set()
        await asyncio.gather(*clients)
    return outcomes


def ending(status: int, lines: list[str], is_stream: bool) -> str:
    """How a request ended: whole; told (a stream with an error event before its end); or what is wrong."""
    if status != 200:
        return f"{status}: {lines}"
    if not is_stream:
        return "whole"
    if lines[-1] != "data: [DONE]":
        return f"no end: {lines[-1]}"
    return "told" if any("error" in json.loads(line[6:]) for line in lines[:-1]) else "whole"


def wait_for_replicas(count: int) -> None:
    """Until so many engine replicas run."""
    from ray import serve

    deadline = time.monotonic() + 120
    while True:
        deployments = serve.status().applications[APPLICATION].deployments
        (engines,) = [one for name, one in deployments.items() if name.startswith(ENGINE)]
        if engines.replica_states == {"RUNNING": count}:
            return
        assert time.monotonic() < deadline, engines
        time.sleep(0.5)


def test_a_deployment_keeps_what_was_spent(
    deploy: Callable[..., None], web: Callable[[str], httpx.Client], cluster: LocalCluster
) -> None:
    limited, pid, began = web("res-deployed"), ledger_pid(), time.monotonic()
    before = {replica.pid for replica in replicas(cluster, INGRESS)}
    spent = spend(limited, PER_MINUTE + 10)
    assert spent[429] > 0
    deploy(min_replicas=1, max_replicas=1, ingress_replicas=1)
    assert not before & {replica.pid for replica in replicas(cluster, INGRESS)}
    later = spend(limited, PER_MINUTE + 10)
    assert spent[200] + later[200] <= PER_MINUTE * (1 + (time.monotonic() - began) / 60) + 1
    assert ledger_pid() == pid
