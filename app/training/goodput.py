"""What a run's time was spent on: the ledger of its attempts, from its events and the lines of its steps.

Goodput is the time of the steps that the result is made of, over the time since the first attempt began. The hours
that a stopped job waits to be submitted again count as lost. Why a step is slow is not its matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Event = Mapping[str, Any]

LOST = "driver or cluster lost"
_PREPARATION = ("import_seconds", "setup_seconds", "load_seconds")


@dataclass(frozen=True)
class Restart:
    """An attempt after the first; its breakdown sums to seconds_to_recover, None before its first step is done."""

    time: float
    step: int
    cause: str
    from_workers: int
    to_workers: int
    steps_redone: int
    seconds_to_recover: float | None
    breakdown: dict[str, float]


@dataclass(frozen=True)
class Goodput:
    """The ledger. steps_redone were lost by a restart; steps_rewound were taken back, the bad step among them."""

    wall_seconds: float
    productive_seconds: float
    goodput: float
    steps_redone: int
    steps_rewound: int
    restarts: list[Restart]
    rewinds: list[Event]
    alarms: list[Event]


def summarize(events: Sequence[Event], lines: Sequence[Mapping[str, Any]], now: float = 0.0) -> Goodput:
    """The ledger of a run from its events, in order of time, and its surviving lines; up to `now` if it still runs."""
    return account(events, sum(float(line.get("step_seconds", 0.0)) for line in lines), now)


def account(events: Sequence[Event], productive_seconds: float, now: float = 0.0) -> Goodput:
    """The same where the lines' step_seconds are summed already."""
    starts = [place for place, event in enumerate(events) if event["kind"] == "started"]
    restarts = [
        _restart(events[before], events[before + 1 : place], events[place], _first_step(events[place + 1 :]))
        for before, place in pairwise(starts)
    ]
    wall = 0.0
    if starts:
        wall = max(now, *(event["time"] for event in events)) - _begun(events[starts[0]])
    rewinds = [event for event in events if event["kind"] == "rewound"]
    return Goodput(
        wall_seconds=wall,
        productive_seconds=productive_seconds,
        goodput=min(1.0, productive_seconds / wall) if wall > 0 else 0.0,
        steps_redone=sum(restart.steps_redone for restart in restarts),
        steps_rewound=sum(event["at_step"] - event["to_step"] + 1 for event in rewinds),
        restarts=restarts,
        rewinds=rewinds,
        alarms=[event for event in events if event["kind"] == "alarm"],
    )


def _first_step(events: Sequence[Event]) -> Event | None:
    """The first_step event of an attempt, given the events since it started."""
    for event in events:
        if event["kind"] in ("first_step", "started"):
            return event if event["kind"] == "first_step" else None
    return None


def _begun(started: Event) -> float:
    """When the attempt's workers began to import."""
    return float(started["time"] - sum(started[name] for name in _PREPARATION))


def _restart(before: Event, between: Sequence[Event], started: Event, first_step: Event | None) -> Restart:
    ended = next((event for event in between if event["kind"] in ("failed", "stopped")), None)
    from_workers, to_workers = int(before["world_size"]), int(started["world_size"])
    if ended:
        cause = str(ended["cause"])
    elif from_workers != to_workers:
        cause = f"resized from {from_workers} to {to_workers} workers"
    else:
        cause = LOST
    alive, begun = started["last_alive"] or before["time"], _begun(started)
    noticed = min(max(ended["time"], alive), begun) if ended else alive
    breakdown = {"detection_seconds": noticed - alive, "restart_seconds": begun - noticed}
    breakdown |= {name: float(started[name]) for name in _PREPARATION}
    if first_step:
        breakdown["first_step_seconds"] = first_step["time"] - started["time"]
    return Restart(
        time=float(started["time"]),
        step=int(started["step"]),
        cause=cause,
        from_workers=from_workers,
        to_workers=to_workers,
        steps_redone=max(0, started["reached"] + 1 - started["step"]),
        seconds_to_recover=sum(breakdown.values()) if first_step else None,
        breakdown=breakdown,
    )
