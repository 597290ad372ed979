"""What clients see while replicas are killed, a new version is deployed and ten times too many requests come.

Two engine and two ingress replicas with a small model; 32 clients with one request at a time each, half of them
streaming. `--requests 10000` sends generated requests as well, right ones and wrong ones, and malformed HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from competitors import endpoint, endpoints, generated_requests
from competitors.clients import Clients, Outcome, longest_gap, percentile

from app.cluster import LocalCluster

MODEL = "zero-to-one"
NUM_CLIENTS, NUM_STREAMING = 32, 16
MAX_TOKENS = 48
WARM_SECONDS, BEFORE_SECONDS, AFTER_SECONDS, STEADY_SECONDS = 30, 5, 8, 15
DEADLINE_SECONDS = 10
DOOR = {"max_running": 16, "max_waiting": 32, "deadline_seconds": DEADLINE_SECONDS}  # of an ingress; for two cores
OVERLOAD, OVERLOAD_SECONDS = 10, 60
ARGUMENTS = {"min_replicas": 2, "max_replicas": 2, "ingress_replicas": 2, "enforce_eager": True, "door": DOOR}
PHASES = "engine replica killed", "engine process killed", "new version deployed", "ingress replica killed"


@dataclass(frozen=True)
class Phase:
    """What ended between the event and a little after all was whole again."""

    name: str
    outcomes: Sequence[Outcome]
    recovery_seconds: float
    gap_seconds: float

    @property
    def wholes(self) -> list[Outcome]:
        """The requests that were not streamed."""
        return [one for one in self.outcomes if not one.is_stream]

    @property
    def num_failed(self) -> int:
        return sum(one.status != 200 for one in self.wholes)

    @property
    def num_unclean(self) -> int:
        """Streams that ended without saying so, or did not begin."""
        return sum(one.is_stream and (one.status != 200 or one.ending in ("short", "broken")) for one in self.outcomes)


@dataclass(frozen=True)
class Flood:
    """The overload; `before` and `after` are of 32 clients."""

    rate: float  # answers a second, of 32 clients
    before: Sequence[Outcome]
    outcomes: Sequence[Outcome]
    after: Sequence[Outcome]

    @property
    def answered(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.is_answered]

    @property
    def num_refused(self) -> int:
        """With 429 and a time to come again."""
        return sum(one.last_status == 429 and one.retry_after.isdigit() for one in self.outcomes)

    @property
    def limit_seconds(self) -> float:
        """The longest wait, and the longest answer of a full door."""
        return DEADLINE_SECONDS + max(one.seconds for one in self.before)


async def disturb(name: str, act: Callable[[], None], clients: Clients) -> Phase:
    """Do something under load; `act` returns when the endpoint is whole again."""
    clients.outcomes.clear()
    async with clients.closed(NUM_CLIENTS, NUM_STREAMING):
        await asyncio.sleep(BEFORE_SECONDS)
        began = time.monotonic()
        await asyncio.to_thread(act)
        recovered = time.monotonic()
        await asyncio.sleep(AFTER_SECONDS)
        ended = time.monotonic()
    outcomes = [outcome for outcome in clients.outcomes if outcome.ended > began]
    for message, count in Counter(one.message for one in outcomes if one.message).most_common(3):
        tell(f"{name}: {count} x {message}")
    return Phase(name, outcomes, recovered - began, longest_gap(outcomes, began, ended))


def kill(running: LocalCluster, kind: str, only_engine: bool = False) -> Callable[[], None]:
    """SIGKILL for one replica of a kind, or for the process of its engine alone."""

    def act() -> None:
        victim = random.choice(list(endpoint.processes(running, kind).values()))
        (endpoint.engine_process(victim) if only_engine else victim).send_signal(signal.SIGKILL)
        endpoint.wait_until_whole(running, kind, {victim.pid})

    return act


def deploy_other(folder: Path, running: LocalCluster) -> Callable[[], None]:
    """The other model, in place of the one that is served."""

    def act() -> None:
        old = set(endpoint.processes(running, endpoint.ENGINE))
        endpoint.deploy(folder, "second", running, ARGUMENTS)
        endpoint.wait_until_whole(running, endpoint.ENGINE, old)

    return act


async def steady(clients: Clients) -> list[Outcome]:
    """32 clients and no disturbance: what ended in a while."""
    clients.outcomes.clear()
    async with clients.closed(NUM_CLIENTS, NUM_STREAMING):
        await asyncio.sleep(STEADY_SECONDS)
        return list(clients.outcomes)


async def overload(clients: Clients) -> Flood:
    """Ten times the rate that 32 clients reach, and 32 clients again."""
    before = await steady(clients)
    rate = sum(one.is_answered for one in before) / STEADY_SECONDS
    clients.outcomes.clear()
    await clients.open_loop(OVERLOAD * rate, OVERLOAD_SECONDS)
    outcomes = list(clients.outcomes)
    return Flood(rate, before, outcomes, await steady(clients))


def print_phases(phases: Sequence[Phase]) -> None:
    """One line each, and what the columns are."""
    print(f"{NUM_CLIENTS} clients, {NUM_STREAMING} of them streaming; {MAX_TOKENS} tokens an answer")
    heads = ("answered", "failed", "lost", "streams", "told", "short", "broken", "median", "p99", "gap", "whole")
    print(f"{'':24}" + "".join(f"{head:>9}" for head in heads))
    for phase in phases:
        endings = Counter(one.ending for one in phase.outcomes if one.is_stream)
        seconds = [one.seconds for one in phase.outcomes if one.is_answered]
        counts = (
            len(phase.wholes) - phase.num_failed,
            phase.num_failed,
            sum(not one.is_answered for one in phase.wholes),
            len(phase.outcomes) - len(phase.wholes),
            *(endings[ending] for ending in ("told", "short", "broken")),
        )
        times = (percentile(seconds, 50), percentile(seconds, 99), phase.gap_seconds, phase.recovery_seconds)
        print(f"{phase.name:24}" + "".join(f"{n:9d}" for n in counts) + "".join(f"{t:9.2f}" for t in times))
    print("answered, failed: not streamed, at the first try; lost: nor at two more, which the official client makes.")
    print("streams: all; told: ended by an error event and [DONE]; short: by neither; broken: by the connection.")
    print("Seconds: of an answer, median and p99; gap: longest without any answer; whole: until all replicas ran.\n")


def print_flood(flood: Flood) -> None:
    """The overload, in a few lines."""
    times, rate = [one.seconds for one in flood.answered], OVERLOAD * flood.rate
    num_other = len(flood.outcomes) - len(times) - flood.num_refused
    began = [one.began for one in flood.outcomes]
    print(f"overload: {NUM_CLIENTS} clients got {flood.rate:.1f} answers a second; {rate:.0f} requests a second due")
    print(f"for {OVERLOAD_SECONDS} s and sent in {max(began) - min(began):.0f}: {len(times)} answered, ", end="")
    print(f"{flood.num_refused} refused by 429, {num_other} else")
    print(f"seconds of the answered: median {percentile(times, 50):.1f}, p99 {percentile(times, 99):.1f}, ", end="")
    print(f"longest {max(times):.1f}")
    for name, outcomes in (("before", flood.before), ("after", flood.after)):
        times = [one.seconds for one in outcomes if one.is_answered]
        print(f"{NUM_CLIENTS} clients {name:7}{len(times):5d} answered, {len(outcomes) - len(times)} not; ", end="")
        print(f"seconds: median {percentile(times, 50):.2f}, p99 {percentile(times, 99):.2f}")
    print()


def print_aims(phases: Sequence[Phase], flood: Flood | None) -> None:
    """Each figure that has an aim, with it."""
    for phase in phases:
        print(f"{phase.name + ': failed requests':58} {phase.num_failed:6d}   (aim: 0)")
        print(f"{phase.name + ': streams not cut cleanly':58} {phase.num_unclean:6d}   (aim: 0)")
    if flood:
        num_other = len(flood.outcomes) - len(flood.answered) - flood.num_refused
        longest = max(one.seconds for one in flood.answered)
        print(f"{'overload: neither answered nor told when to come again':58} {num_other:6d}   (aim: 0)")
        print(f"{'overload: longest answer, seconds':58} {longest:6.1f}   (aim: at most {flood.limit_seconds:.1f})")


async def measure(given: argparse.Namespace, running: LocalCluster) -> None:
    """All that was asked for, in order."""
    clients = Clients(running.environment["OPENAI_BASE_URL"], running.environment["OPENAI_API_KEY"], MODEL, MAX_TOKENS)
    acts = dict(
        zip(
            PHASES,
            (
                kill(running, endpoint.ENGINE),
                kill(running, endpoint.ENGINE, only_engine=True),
                deploy_other(given.folder, running),
                kill(running, endpoint.INGRESS),
            ),
            strict=True,
        )
    )
    await disturb("warming", lambda: time.sleep(WARM_SECONDS), clients)
    phases, flood = [], None
    if "overload" in given.only:
        flood = await overload(clients)
    for name, act in acts.items():
        if name in given.only:
            phases.append(await disturb(name, act, clients))
            tell(f"{name}: whole after {phases[-1].recovery_seconds:.0f} s")
    generated = await generated_requests.send(given.requests, clients, running) if given.requests else None
    print_phases(phases)
    if flood:
        print_flood(flood)
    if generated:
        generated_requests.show(generated)
    print_aims(phases, flood)
    if generated:
        generated_requests.show_aims(generated)


def come_first() -> None:
    """Clients are elsewhere as a rule, and wait for no core of the endpoint's; nor does this thread, if it may."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        tell("no right to come first: where cores are few, the clients send less than they should")


def tell(line: str) -> None:
    """How far it is."""
    print(f"  {line}", file=sys.stderr, flush=True)


def main() -> None:
    given = arguments()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("first", 1), ("second", 2)):
        if not (given.folder / name / "manifest.json").exists():
            endpoint.write_model(given.folder / name, seed)
    os.environ.update(endpoints.direct_ingress() if given.haproxy else {})
    with endpoint.cluster(given.folder / "cluster") as running:
        began = time.monotonic()
        endpoint.deploy(given.folder, "first", running, ARGUMENTS)
        tell(f"deployed after {time.monotonic() - began:.0f} s")
        come_first()
        asyncio.run(measure(given, running))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path.home() / ".cache" / "zero-to-one-benchmarks" / "endpoint-resilience"
    parser.add_argument("--folder", type=Path, default=default, help="models, and the cluster's folder")
    parser.add_argument("--only", nargs="*", default=["overload", *PHASES], help="these alone, of the default ones")
    parser.add_argument("--haproxy", action="store_true", help="HAProxy before replicas that speak HTTP themselves")
    parser.add_argument("--requests", type=int, default=0, help="generated requests to send as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
