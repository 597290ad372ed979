"""What a key may take: token buckets of requests and tokens, open requests; and the queue in front of the engine.

One `Ledger` counts for all ingress replicas, so that their sum obeys the limits exactly; a replica talks to it through
a `Teller`, which bundles what waits into one call; `Door` sheds load in front of the engine. In any t minutes a key
gets at most limit · (1 + t), the burst after a pause included. There are no leases of slices to replicas: they would
save calls, but refuse what another replica holds unused, cannot share concurrent requests, and die with their holder;
bundled calls stay exact. Nothing here knows Ray, HTTP or how tokens are counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from app.serving.config import DoorConfig, Limits

logger = logging.getLogger(__name__)

MINUTE_SECONDS = 60
CONCURRENT_RETRY_SECONDS = 1.0  # when an open request ends is not known
ROUNDING = 1e-6  # of a request or token: who waits as long as told must not fail by the last bit


@dataclass(frozen=True)
class Balance:
    """How one bucket stands."""

    limit: int  # a minute
    remaining: int
    reset_seconds: float  # until it is full


Standing = Mapping[str, Balance]  # of "requests" and "tokens", if they are limited


@dataclass(frozen=True)
class Grant:
    """A request may run; to be settled or released once it ended."""

    id: str  # empty: not counted
    key_name: str
    tokens: int  # reserved
    standing: Standing


@dataclass(frozen=True)
class Refusal:
    """A request may not run now. `retry_after_seconds` is infinite when it never may."""

    retry_after_seconds: float
    which: Literal["requests", "tokens", "concurrent_requests", "queue", "deadline"]
    standing: Standing = field(default_factory=dict)


@dataclass
class _Account:
    """One key's buckets and open requests."""

    limits: Limits
    updated_at: float
    levels: dict[str, float] = field(default_factory=dict)  # of the limited ones, as of updated_at
    grants: dict[str, tuple[int, float]] = field(default_factory=dict)  # id -> reserved tokens, expiry; oldest first

    def capacities(self) -> dict[str, int]:
        every = {"requests": self.limits.requests_per_minute, "tokens": self.limits.tokens_per_minute}
        return {what: limit for what, limit in every.items() if limit}

    def refill(self, now: float) -> None:
        for what, capacity in self.capacities().items():
            gained = (now - self.updated_at) * capacity / MINUTE_SECONDS
            self.levels[what] = min(capacity, self.levels[what] + gained)
        self.updated_at = now
        while self.grants and next(iter(self.grants.values()))[1] <= now:
            self.grants.pop(next(iter(self.grants)))  # its holder is dead: the slot is free, the tokens stay taken

    def adopt(self, limits: Limits, starts_empty: bool) -> None:
        """Change the limits: a bucket keeps its level, a new one starts full, or empty."""
        self.limits = limits
        self.levels = {
            what: min(capacity, self.levels.get(what, 0 if starts_empty else capacity))
            for what, capacity in self.capacities().items()
        }

    def refuse(self, wanted: Mapping[str, int]) -> Refusal | None:
        waits: dict[Any, float] = {}
        for what, capacity in self.capacities().items():
            missing = wanted[what] - self.levels[what]
            if missing > ROUNDING:
                waits[what] = math.inf if wanted[what] > capacity else missing * MINUTE_SECONDS / capacity
        if 0 < self.limits.concurrent_requests <= len(self.grants):
            waits["concurrent_requests"] = CONCURRENT_RETRY_SECONDS
        if not waits:
            return None
        which = max(waits, key=waits.__getitem__)
        return Refusal(waits[which], which, self.standing())

    def standing(self) -> dict[str, Balance]:
        return {
            what: Balance(
                limit=capacity,
                remaining=max(0, math.floor(self.levels[what] + ROUNDING)),
                reset_seconds=(capacity - self.levels[what]) * MINUTE_SECONDS / capacity,
            )
            for what, capacity in self.capacities().items()
        }


class Ledger:
    """The accounts of all keys. Not thread-safe; one holder for the whole cluster.

    `clock` is the time of day, which a successor on another machine shares. A grant that is neither settled nor
    released within `grant_seconds` (the longest that a request may take) gives its slot back, but not its tokens.
    A successor that cannot `restore` starts empty, so that nothing is granted twice.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, grant_seconds: float = 900, starts_empty: bool = False
    ) -> None:
        self._clock = clock
        self._grant_seconds = grant_seconds
        self._starts_empty = starts_empty
        self._latest = clock()
        self._accounts: dict[str, _Account] = {}

    def reserve(self, key_name: str, limits: Limits, requests: int, tokens: int) -> Grant | Refusal:
        """Take all that is wanted, or nothing."""
        account = self._open(key_name, limits)
        refusal = account.refuse({"requests": requests, "tokens": tokens})
        if refusal:
            return refusal
        for what, amount in (("requests", requests), ("tokens", tokens)):
            if what in account.levels:
                account.levels[what] -= amount
        grant_id = uuid.uuid4().hex
        account.grants[grant_id] = (tokens, self._latest + self._grant_seconds)
        return Grant(grant_id, key_name, tokens, account.standing())

    def settle(self, grant: Grant, used_tokens: int) -> None:
        """End a grant and give back, or take, what was reserved too much or too little. An ended one stays as it is."""
        account = self._accounts.get(grant.key_name)
        if account is None:
            return
        account.refill(self._now())
        reserved, _ = account.grants.pop(grant.id, (None, 0))
        if reserved is not None and "tokens" in account.levels:
            level = account.levels["tokens"] + reserved - used_tokens
            account.levels["tokens"] = min(account.limits.tokens_per_minute, level)

    def release(self, grant: Grant) -> None:
        """End a grant of which nothing is known: what it reserved counts as used. An ended one stays as it is."""
        self.settle(grant, grant.tokens)

    def standing(self, key_name: str, limits: Limits) -> Standing:
        """How the key stands now."""
        return self._open(key_name, limits).standing()

    def apply(self, operations: Sequence[Operation]) -> list[Grant | Refusal | None]:
        """Do several in their order; what each returns."""
        return [operation(self) for operation in operations]

    def state(self) -> dict[str, Any]:
        """All of it, as JSON takes it. Stored before the answers leave, it makes a successor exact."""
        return {
            name: {
                "limits": account.limits.model_dump(),
                "updated_at": account.updated_at,
                "levels": dict(account.levels),
                "grants": {grant_id: list(grant) for grant_id, grant in account.grants.items()},
            }
            for name, account in self._accounts.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a predecessor's state."""
        self._accounts = {
            name: _Account(
                limits=Limits(**saved["limits"]),
                updated_at=saved["updated_at"],
                levels=dict(saved["levels"]),
                grants={grant_id: (tokens, expiry) for grant_id, (tokens, expiry) in saved["grants"].items()},
            )
            for name, saved in state.items()
        }
        self._latest = max([self._latest, *(account.updated_at for account in self._accounts.values())])

    def _open(self, key_name: str, limits: Limits) -> _Account:
        now = self._now()
        account = self._accounts.setdefault(key_name, _Account(limits=Limits(), updated_at=now))
        account.refill(now)
        if account.limits != limits:
            account.adopt(limits, self._starts_empty)
        return account

    def _now(self) -> float:
        self._latest = max(self._latest, self._clock())  # the time of day may be set back
        return self._latest


@dataclass(frozen=True)
class Reserve:
    """`Ledger.reserve`, to be sent."""

    key_name: str
    limits: Limits
    requests: int
    tokens: int

    def __call__(self, ledger: Ledger) -> Grant | Refusal:
        return ledger.reserve(self.key_name, self.limits, self.requests, self.tokens)


@dataclass(frozen=True)
class Settle:
    """`Ledger.settle`, to be sent."""

    grant: Grant
    used_tokens: int

    def __call__(self, ledger: Ledger) -> None:
        ledger.settle(self.grant, self.used_tokens)


Operation = Reserve | Settle
Call = Callable[[Sequence[Operation]], Awaitable[Sequence[Grant | Refusal | None]]]


class Teller:
    """The ledger as an ingress replica sees it: `call` reaches `Ledger.apply`, wherever that is.

    While one call is under way, all else waits and goes with the next, so that load makes calls longer and not more.
    Keys without limits cause none. A failed call fails the reservations in it with the same error; the grants that it
    should have settled expire.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._waiting: list[tuple[Operation, asyncio.Future[Grant | Refusal] | None]] = []
        self._sending: asyncio.Task[None] | None = None

    async def reserve(self, key_name: str, limits: Limits, requests: int, tokens: int) -> Grant | Refusal:
        """As `Ledger.reserve`. Cancelled, it gives back what it may still be granted."""
        if limits.is_unlimited:
            return Grant("", key_name, tokens, {})
        answer: asyncio.Future[Grant | Refusal] = asyncio.get_running_loop().create_future()
        self._send(Reserve(key_name, limits, requests, tokens), answer)
        return await answer

    def settle(self, grant: Grant, used_tokens: int) -> None:
        """As `Ledger.settle`, without waiting for it."""
        if grant.id:
            self._send(Settle(grant, used_tokens), None)

    def release(self, grant: Grant) -> None:
        """As `Ledger.release`, without waiting for it."""
        self.settle(grant, grant.tokens)

    async def drain(self) -> None:
        """Wait until all is sent."""
        while self._sending and not self._sending.done():
            await asyncio.wait([self._sending])

    def _send(self, operation: Operation, answer: asyncio.Future[Grant | Refusal] | None) -> None:
        self._waiting.append((operation, answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await self._call([operation for operation, _ in batch])
            except Exception as error:
                logger.error("quota: the ledger did not answer: %s", error)
                for _, answer in batch:
                    if answer and not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if answer and not answer.done():
                    assert result is not None
                    answer.set_result(result)
                elif answer and isinstance(result, Grant):  # who asked is gone
                    self._waiting.append((Settle(result, 0), None))


class Door:
    """Load shedding: so many requests run, so many wait in their order and no longer than the deadline.

    `enter` before the engine is asked, `leave` when it has answered: exactly once for each `enter` that returned None.
    A cancelled `enter` holds no place. It belongs to one event loop.
    """

    def __init__(self, config: DoorConfig) -> None:
        self._config = config
        self._waiting: deque[asyncio.Future[Refusal | None]] = deque()
        self._left_at = 0.0
        self._leave_seconds = config.deadline_seconds / max(1, config.max_waiting)  # between two that leave
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def refuse_at_once(self) -> Refusal | None:
        """Why `enter` would not even let one wait now; None if it would. For before any work is done."""
        is_full = self.num_running >= self._config.max_running and self.num_waiting >= self._config.max_waiting
        return self._refuse("queue") if is_full else None

    async def enter(self, waited_seconds: float = 0.0) -> Refusal | None:
        """Wait for a turn: None when it has come, else why not. What was waited elsewhere counts."""
        left_seconds = self._config.deadline_seconds - waited_seconds
        if left_seconds <= 0:
            return self._refuse("deadline")
        if self.num_running < self._config.max_running:
            self.num_running += 1
            return None
        if refusal := self.refuse_at_once():
            return refusal
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Refusal | None] = loop.create_future()
        self._waiting.append(turn)
        timer = loop.call_later(left_seconds, self._expire, turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # `leave` may have passed over it
                    self._waiting.remove(turn)
            elif turn.result() is None:  # its turn came in the same moment
                self.leave()
            raise
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Let the next one in."""
        assert self.num_running > 0, "leave without enter"
        self._measure(asyncio.get_running_loop().time())
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # not cancelled
                turn.set_result(None)
                return
        self.num_running -= 1

    def _expire(self, turn: asyncio.Future[Refusal | None]) -> None:
        if not turn.done():
            self._waiting.remove(turn)
            turn.set_result(self._refuse("deadline"))

    def _measure(self, now: float) -> None:
        """A moving average over the last ten or so, only while there is a queue: else nobody had to leave."""
        if self._waiting and self._left_at:
            self._leave_seconds += (now - self._left_at - self._leave_seconds) / 10
        self._left_at = now if self._waiting else 0.0

    def _refuse(self, which: Literal["queue", "deadline"]) -> Refusal:
        seconds = self._leave_seconds * (self.num_waiting + 1)
        return Refusal(min(max(1.0, seconds), 2 * self._config.deadline_seconds), which)
