from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.goodput import LOST, account, summarize

seconds = st.floats(0, 1e4)


def started(time: float, step: int = 0, **fields: Any) -> dict[str, Any]:
    prepared = {"import_seconds": 3.0, "setup_seconds": 2.0, "load_seconds": 1.0}
    first = {"world_size": 2, "reached": -1, "last_alive": 0.0}
    return {"kind": "started", "time": time, "step": step, **prepared, **first, **fields}


def event(kind: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": time, **fields}


KILLED = [
    started(106),
    event("first_step", 108, step=0),
    event("failed", 130, cause="rank 1: killed"),
    started(150, step=10, reached=13, last_alive=120),
    event("first_step", 152, step=10),
    event("finished", 200, step=29),
]
LINES = [{"step": step, "step_seconds": 2.5} for step in range(30)]


def test_an_undisturbed_run() -> None:
    ledger = summarize([started(106), event("first_step", 108, step=0), event("finished", 200, step=29)], LINES)
    assert (ledger.wall_seconds, ledger.productive_seconds, ledger.goodput) == (100, 75, 0.75)
    assert (ledger.restarts, ledger.steps_redone) == ([], 0)


def test_a_killed_worker() -> None:
    ledger = summarize(KILLED, LINES)
    (restart,) = ledger.restarts
    assert restart.cause == "rank 1: killed"
    assert (restart.step, restart.steps_redone, ledger.steps_redone) == (10, 4, 4)
    assert restart.seconds_to_recover == 32
    assert restart.breakdown == {
        "detection_seconds": 10,
        "restart_seconds": 14,
        "import_seconds": 3,
        "setup_seconds": 2,
        "load_seconds": 1,
        "first_step_seconds": 2,
    }


@pytest.mark.parametrize(
    ("between", "workers", "cause"),
    [
        ([event("stopped", 121, step=14, cause="preempted"), event("failed", 130, cause="left")], 2, "preempted"),
        ([event("failed", 130, cause="rank 0: killed"), event("failed", 140, cause="again")], 1, "rank 0: killed"),
        ([event("alarm", 125, step=3)], 1, "resized from 2 to 1 workers"),
        ([], 2, LOST),
    ],
)
def test_the_cause_is_the_first_that_was_noted(between: list[dict[str, Any]], workers: int, cause: str) -> None:
    again = started(150, step=10, world_size=workers, reached=13, last_alive=120)
    (restart,) = summarize([started(106), *between, again], LINES[:10]).restarts
    assert restart.cause == cause
    assert (restart.from_workers, restart.to_workers) == (2, workers)


def test_a_restart_that_did_no_step_yet_has_not_recovered() -> None:
    ledger = summarize([*KILLED[:5], started(190, step=10, reached=10, last_alive=153)], LINES[:10])
    assert [restart.seconds_to_recover for restart in ledger.restarts] == [32, None]
    assert ledger.steps_redone == 5


def test_an_attempt_that_died_before_its_first_step() -> None:
    ledger = summarize([started(106), started(150), event("first_step", 152, step=0)], LINES)
    assert ledger.restarts[0].seconds_to_recover == 46
    assert ledger.restarts[0].steps_redone == 0


def test_rewinds_and_alarms() -> None:
    events = [
        started(106),
        event("alarm", 107, step=20, name="grad_norm", value=200.0, level=100.0),
        event("rewound", 110, to_step=10, at_step=13, reason="loss is nan"),
    ]
    ledger = summarize(events, LINES[:10])
    assert (ledger.steps_rewound, len(ledger.rewinds), len(ledger.alarms)) == (4, 1, 1)
    assert ledger.wall_seconds == 10


def test_a_running_run_is_counted_until_now() -> None:
    assert account([started(106)], productive_seconds=30, now=160).goodput == 0.5


def test_nothing_happened() -> None:
    ledger = summarize([], [])
    assert (ledger.wall_seconds, ledger.goodput, ledger.restarts) == (0, 0, [])


@given(st.lists(seconds, min_size=8, max_size=8), st.integers(-1, 99), st.integers(0, 50), st.booleans())
def test_the_breakdown_is_the_time_to_recover(gaps: list[float], reached: int, step: int, failed: bool) -> None:
    alive = 1000.0 + gaps[0]
    noticed = alive + gaps[1]
    ready = noticed + sum(gaps[2:6])
    prepared = dict(zip(("import_seconds", "setup_seconds", "load_seconds"), gaps[3:6], strict=True))
    events = [
        started(1000),
        *([event("failed", noticed, cause="killed")] if failed else []),
        started(ready, step=step, reached=reached, last_alive=alive, **prepared),
        event("first_step", ready + gaps[6], step=step),
    ]
    (restart,) = summarize(events, []).restarts
    assert restart.seconds_to_recover == pytest.approx(ready + gaps[6] - alive, abs=1e-6)
    assert all(value >= -1e-6 for value in restart.breakdown.values())
    assert restart.steps_redone == max(0, reached + 1 - step)
