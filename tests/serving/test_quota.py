import asyncio
import json
import math
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.config import DoorConfig, Limits
from app.serving.quota import Door, Grant, Ledger, Operation, Refusal, Teller

LIMITS = Limits(requests_per_minute=6, tokens_per_minute=600, concurrent_requests=3)
GRANT_SECONDS = 50.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(name="clock")
def clock_fixture() -> Clock:
    return Clock()


@pytest.fixture(name="ledger")
def ledger_fixture(clock: Clock) -> Ledger:
    return Ledger(clock, GRANT_SECONDS)


def granted(outcome: Grant | Refusal) -> Grant:
    assert isinstance(outcome, Grant), outcome
    return outcome


def refused(outcome: Grant | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    return outcome


def test_requests_refill_evenly(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(requests_per_minute=6)
    for left in (5, 4, 3, 2, 1, 0):
        assert granted(ledger.reserve("a", limits, 1, 0)).standing["requests"].remaining == left
    refusal = refused(ledger.reserve("a", limits, 1, 0))
    assert (refusal.which, refusal.retry_after_seconds) == ("requests", 10)
    assert refusal.standing["requests"].reset_seconds == 60
    assert set(refusal.standing) == {"requests"}
    clock.now += 10
    granted(ledger.reserve("a", limits, 1, 0))
    refused(ledger.reserve("a", limits, 1, 0))
    granted(ledger.reserve("another key", limits, 1, 0))
    clock.now += 3600  # saves up no more than a minute's
    assert granted(ledger.reserve("a", limits, 1, 0)).standing["requests"].remaining == 5


def test_what_was_reserved_too_much_comes_back_and_too_little_is_taken(ledger: Ledger) -> None:
    limits = Limits(tokens_per_minute=600)
    ledger.settle(granted(ledger.reserve("a", limits, 1, 500)), used_tokens=100)
    assert ledger.standing("a", limits)["tokens"].remaining == 500
    ledger.settle(granted(ledger.reserve("a", limits, 1, 100)), used_tokens=700)
    assert ledger.standing("a", limits)["tokens"].remaining == 0
    assert refused(ledger.reserve("a", limits, 1, 100)).retry_after_seconds == pytest.approx(30)  # 200 in debt
    ledger.release(granted(ledger.reserve("b", limits, 1, 500)))
    assert ledger.standing("b", limits)["tokens"].remaining == 100


def test_a_refusal_takes_nothing(ledger: Ledger) -> None:
    refusal = refused(ledger.reserve("a", LIMITS, 1, 601))
    assert (refusal.which, refusal.retry_after_seconds) == ("tokens", math.inf)
    assert ledger.standing("a", LIMITS)["requests"].remaining == 6


def test_an_ended_grant_stays_ended(ledger: Ledger) -> None:
    grants = [granted(ledger.reserve("a", LIMITS, 1, 100)) for _ in range(3)]
    assert refused(ledger.reserve("a", LIMITS, 1, 100)).which == "concurrent_requests"
    for _ in range(2):
        ledger.settle(grants[0], 0)
        ledger.release(grants[0])
        ledger.release(grants[1])
        ledger.settle(grants[1], 0)
    assert ledger.standing("a", LIMITS)["tokens"].remaining == 400
    for _ in range(2):
        granted(ledger.reserve("a", LIMITS, 1, 1))
    refused(ledger.reserve("a", LIMITS, 1, 1))


def test_a_dead_replicas_grants_expire(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(tokens_per_minute=600, concurrent_requests=1)
    forgotten = granted(ledger.reserve("a", limits, 1, 600))
    clock.now += GRANT_SECONDS - 1
    refused(ledger.reserve("a", limits, 1, 1))
    clock.now += 1
    granted(ledger.reserve("a", limits, 1, 1))
    ledger.settle(forgotten, 0)  # too late: its tokens stay taken
    assert ledger.standing("a", limits)["tokens"].remaining == 499


def test_new_limits_count_at_once(ledger: Ledger) -> None:
    granted(ledger.reserve("a", Limits(tokens_per_minute=100), 1, 60))
    assert ledger.standing("a", Limits(tokens_per_minute=20))["tokens"].remaining == 20
    assert ledger.standing("a", Limits(tokens_per_minute=1000))["tokens"].remaining == 20
    assert ledger.standing("a", Limits()) == {}


def test_a_clock_set_back_neither_takes_nor_refills(ledger: Ledger, clock: Clock) -> None:
    limits = Limits(requests_per_minute=2)
    granted(ledger.reserve("a", limits, 1, 0))
    clock.now -= 500
    granted(ledger.reserve("a", limits, 1, 0))
    clock.now += 529
    refused(ledger.reserve("a", limits, 1, 0))
    clock.now += 1
    granted(ledger.reserve("a", limits, 1, 0))


def test_a_successor_without_the_state_grants_nothing_twice(clock: Clock) -> None:
    ledger = Ledger(clock, GRANT_SECONDS, starts_empty=True)
    assert refused(ledger.reserve("a", LIMITS, 1, 10)).retry_after_seconds == 10
    clock.now += 10
    granted(ledger.reserve("a", LIMITS, 1, 10))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "reserve", "settle", "release", "die", "holder dies", "wait"]),
        st.integers(0, 3),  # replica
        st.integers(0, 250),  # tokens
        st.floats(0, 30),  # seconds
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_the_sum_over_replicas_obeys_the_limits(steps: Sequence[tuple[str, int, int, float]]) -> None:
    """Whatever two to four replicas do and whoever dies, with the state stored after each step."""
    clock = Clock()
    ledger = Ledger(clock, GRANT_SECONDS)
    replicas: list[list[Grant]] = [[], [], [], []]
    expiry: dict[str, float] = {}
    history: list[tuple[float, str]] = []  # time and grant of each request
    tokens: dict[str, int] = {}  # of each grant: reserved, then used
    for what, number, amount, seconds in steps:
        mine = replicas[number]
        if what == "reserve":
            outcome = ledger.reserve("a", LIMITS, 1, amount)
            if isinstance(outcome, Grant):
                mine.append(outcome)
                tokens[outcome.id] = amount
                expiry[outcome.id] = clock.now + GRANT_SECONDS
                history.append((clock.now, outcome.id))
        elif what == "settle" and mine:
            grant = mine.pop(0)
            if clock.now < expiry.pop(grant.id, 0):
                tokens[grant.id] = min(amount, grant.tokens)
            ledger.settle(grant, min(amount, grant.tokens))
        elif what == "release" and mine:
            grant = mine.pop()
            expiry.pop(grant.id, None)
            ledger.release(grant)
        elif what == "die":
            mine.clear()
        elif what == "holder dies":
            state = json.loads(json.dumps(ledger.state()))
            ledger = Ledger(clock, GRANT_SECONDS)
            ledger.restore(state)
        elif what == "wait":
            clock.now += seconds
        assert sum(1 for when in expiry.values() if clock.now < when) <= LIMITS.concurrent_requests
    for start, (began, _) in enumerate(history):
        for end in range(start, len(history)):
            window = history[start : end + 1]
            minutes = (window[-1][0] - began) / 60
            assert len(window) <= LIMITS.requests_per_minute * (1 + minutes) + 1e-3
            used = sum(tokens[grant_id] for _, grant_id in window)
            assert used <= LIMITS.tokens_per_minute * (1 + minutes) + 1e-3


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0, 20)), min_size=1, max_size=20))
def test_who_waits_as_long_as_told_is_let_in(requests: list[tuple[int, float]]) -> None:
    clock = Clock()
    ledger = Ledger(clock, GRANT_SECONDS)
    limits = Limits(requests_per_minute=7, tokens_per_minute=600)
    for tokens, pause in requests:
        outcome = ledger.reserve("a", limits, 1, tokens)
        if isinstance(outcome, Refusal):
            clock.now += outcome.retry_after_seconds
            granted(ledger.reserve("a", limits, 1, tokens))
        clock.now += pause


class Wire:
    """A ledger far away: each call takes as long as the test says."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.batches: list[int] = []
        self.arrived = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, operations: Sequence[Operation]) -> list[Grant | Refusal | None]:
        self.batches.append(len(operations))
        await self.arrived.wait()
        if self.error:
            raise self.error
        return self.ledger.apply(operations)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_what_waits_goes_with_one_call(ledger: Ledger) -> None:
    async def test() -> None:
        wire = Wire(ledger)
        teller = Teller(wire)
        asked = [asyncio.create_task(teller.reserve("a", LIMITS, 1, 10)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        late = [asyncio.create_task(teller.reserve("b", LIMITS, 1, 10)) for _ in range(3)]
        await asyncio.sleep(0)
        wire.arrived.set()
        outcomes = await asyncio.gather(*asked, *late)
        assert [isinstance(outcome, Grant) for outcome in outcomes] == [True] * 3 + [False] * 2 + [True] * 3
        assert wire.batches == [5, 3]
        for outcome in outcomes:
            if isinstance(outcome, Grant):
                teller.settle(outcome, 4)
        await teller.drain()
        assert wire.batches == [5, 3, 6]
        assert ledger.standing("a", LIMITS)["tokens"].remaining == 588

    run(test())


def test_keys_without_limits_cause_no_call(ledger: Ledger) -> None:
    async def test() -> None:
        wire = Wire(ledger)
        teller = Teller(wire)
        grant = granted(await teller.reserve("a", Limits(), 1, 10))
        teller.settle(grant, 5)
        teller.release(grant)
        await teller.drain()
        assert wire.batches == []

    run(test())


def test_who_left_before_the_answer_holds_nothing(ledger: Ledger) -> None:
    async def test() -> None:
        wire = Wire(ledger)
        teller = Teller(wire)
        gone = asyncio.create_task(teller.reserve("a", LIMITS, 1, 500))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        wire.arrived.set()
        await teller.drain()
        assert ledger.standing("a", LIMITS)["tokens"].remaining == 600
        assert not ledger.state()["a"]["grants"]

    run(test())


def test_a_dead_ledger_fails_those_who_asked_and_not_the_next(ledger: Ledger) -> None:
    async def test() -> None:
        wire = Wire(ledger)
        wire.arrived.set()
        wire.error = ConnectionError("the ledger died")
        teller = Teller(wire)
        with pytest.raises(ConnectionError, match="the ledger died"):
            await teller.reserve("a", LIMITS, 1, 10)
        wire.error = None
        granted(await teller.reserve("a", LIMITS, 1, 10))

    run(test())


def test_the_door_is_first_come_first_served() -> None:
    async def test() -> None:
        door = Door(DoorConfig(max_running=1, max_waiting=2, deadline_seconds=60))
        assert await door.enter() is None
        order: list[int] = []

        async def visit(number: int) -> None:
            assert await door.enter() is None
            order.append(number)

        waiting = [asyncio.create_task(visit(number)) for number in range(2)]
        await asyncio.sleep(0)
        refusal = await door.enter()
        assert refusal is not None
        assert refusal.which == "queue"
        assert 1 <= refusal.retry_after_seconds <= 120
        for _ in range(2):
            door.leave()
            await asyncio.sleep(0.001)
        await asyncio.gather(*waiting)
        assert order == [0, 1]
        door.leave()
        assert (door.num_running, door.num_waiting) == (0, 0)

    run(test())


def test_who_waits_too_long_is_sent_away() -> None:
    async def test() -> None:
        door = Door(DoorConfig(max_running=1, max_waiting=2, deadline_seconds=0.01))
        assert await door.enter() is None
        refusal = await door.enter()
        assert refusal is not None
        assert refusal.which == "deadline"
        assert (door.num_running, door.num_waiting) == (1, 0)
        door.leave()
        assert await door.enter() is None

    run(test())


def test_what_was_waited_before_the_door_counts() -> None:
    async def test() -> None:
        door = Door(DoorConfig(max_running=1, max_waiting=1, deadline_seconds=60))
        late = await door.enter(60)
        assert late is not None
        assert late.which == "deadline"
        assert door.refuse_at_once() is None
        assert await door.enter(59) is None
        assert door.refuse_at_once() is None  # one may wait
        waiting = asyncio.create_task(door.enter(59.99))
        await asyncio.sleep(0)
        full = door.refuse_at_once()
        assert full is not None
        assert full.which == "queue"
        refusal = await waiting
        assert refusal is not None
        assert refusal.which == "deadline"

    run(test())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(["come", "come", "leave", "leave", "go", "tick"]), st.integers(0, 9))),
)
def test_no_place_is_lost_or_given_twice(max_running: int, max_waiting: int, steps: list[tuple[str, int]]) -> None:
    """Clients come, leave when served, and go away (are cancelled) at any moment, also when their turn just came."""

    async def test() -> None:
        door = Door(DoorConfig(max_running=max_running, max_waiting=max_waiting, deadline_seconds=60))
        inside: set[int] = set()
        done: dict[int, asyncio.Event] = {}
        clients: dict[int, asyncio.Task[None]] = {}

        async def visit(number: int) -> None:
            if await door.enter() is not None:
                return
            inside.add(number)
            try:
                await done[number].wait()
            finally:
                inside.discard(number)
                door.leave()

        for what, number in steps:
            chosen = sorted(inside) if what == "leave" else sorted(clients)
            if what == "come":
                name = len(clients)
                done[name] = asyncio.Event()
                clients[name] = asyncio.create_task(visit(name))
            elif what == "leave" and chosen:
                done[chosen[number % len(chosen)]].set()
            elif what == "go" and chosen:
                clients[chosen[number % len(chosen)]].cancel()
            elif what == "tick":
                await asyncio.sleep(0)
            assert len(inside) <= max_running
            assert door.num_waiting <= max_waiting
        for event in done.values():
            event.set()
        await asyncio.gather(*clients.values(), return_exceptions=True)
        assert (door.num_running, door.num_waiting) == (0, 0)

    run(test())
