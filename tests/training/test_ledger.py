"""Exactly once: over any history of kills, resizes and rewinds, and in the log of a finished run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training.ledger import Rewind, check, combine, data_step_of, digest_rows, skipped_windows
from app.training.sampler import Plan, rows_of_rank, rows_of_step


@dataclass
class Run:
    """A run in miniature: its surviving lines with the rows they trained on, and all data that it ever gave up."""

    plan: Plan
    lines: list[dict[str, Any]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    rewinds: list[Rewind] = field(default_factory=list)
    given_up: set[int] = field(default_factory=set)

    def train(self, steps: int, world_size: int) -> None:
        for _ in range(steps):
            step = len(self.lines)
            data_step = data_step_of(step, self.rewinds)
            rows = rows_of_step(self.plan, data_step)
            shares = [rows_of_rank(rows, rank, world_size) for rank in range(world_size)]
            digest = combine(digest_rows(share) for share in reversed(shares))
            self.lines.append({"step": step, "data_step": data_step, "rows": f"{digest:016x}"})
            self.rows.append(rows.tolist())

    def resume(self, step: int) -> None:
        """After a kill: the checkpoint of `step` is the newest that is left."""
        del self.lines[step:], self.rows[step:]

    def rewind(self, step: int) -> None:
        """The step that would come next has failed."""
        at_step = len(self.lines)
        used = [data_step_of(step, self.rewinds), data_step_of(at_step, self.rewinds)]
        self.given_up |= set(range(used[0], used[1] + 1))
        self.rewinds.append(Rewind(step, at_step, "spike"))
        self.resume(step)


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 6),  # steps trained
        st.integers(1, 9),  # on so many workers
        st.sampled_from(["go on", "kill", "rewind"]),
        st.floats(0, 1),  # where the checkpoint lies that is gone back to
    ),
    min_size=1,
    max_size=12,
)
PLANS = st.builds(
    Plan,
    seed=st.integers(0, 5),
    fingerprint=st.just("ab"),
    num_rows=st.integers(1, 25),
    global_batch=st.integers(1, 7),
    replay_rows=st.integers(1, 9),
    replay_share=st.sampled_from([0.0, 0.3]),
)


def live(plan: Plan, events: list[tuple[int, int, str, float]]) -> Run:
    """A run that goes through these events and then a few steps to its end."""
    run = Run(plan)
    for steps, world_size, event, place in events:
        run.train(steps, world_size)
        if event != "go on":
            checkpoint = round(place * len(run.lines))
            run.resume(checkpoint) if event == "kill" else run.rewind(checkpoint)
    run.train(3, 2)
    return run


@given(plan=PLANS, events=EVENTS)
def test_every_row_is_consumed_once_or_skipped(plan: Plan, events: list[tuple[int, int, str, float]]) -> None:
    run = live(plan, events)
    used = [line["data_step"] for line in run.lines]
    end = used[-1] + 1
    skipped = {step for first, last in skipped_windows(run.rewinds) for step in range(first, last + 1)}
    assert skipped == run.given_up
    assert sorted([*used, *(step for step in skipped if step < end)]) == list(range(end))
    rows = dict(zip(used, run.rows, strict=True))
    stream = [row for step in range(end) for row in rows.get(step, rows_of_step(plan, step).tolist())]
    corpus = [row for row in stream if row < plan.num_rows]
    for epoch in range(len(corpus) // plan.num_rows):
        assert sorted(corpus[epoch * plan.num_rows : (epoch + 1) * plan.num_rows]) == list(range(plan.num_rows))
    figures = check(run.lines, plan, run.rewinds)
    assert figures["skipped_sequences"] == sum(step < end for step in skipped) * plan.global_batch
    assert figures["epochs"] == pytest.approx(len(corpus) / plan.num_rows, abs=1e-4)


@given(plan=PLANS, events=EVENTS, place=st.floats(0, 1, exclude_max=True), harm=st.integers(0, 5))
def test_a_harmed_line_is_found(plan: Plan, events: list[tuple[int, int, str, float]], place: float, harm: int) -> None:
    run = live(plan, events)
    lines, index = run.lines, int(place * (len(run.lines) - 1))  # not the last: after it nothing can be missing
    if harm == 0:
        del lines[index]
    elif harm == 1:
        lines.insert(index, lines[index])
    elif harm == 2:
        lines[index], lines[index + 1] = lines[index + 1], lines[index]
    elif harm == 3:
        lines[index]["data_step"] += 1
    elif harm == 4:
        lines[index]["rows"] = f"{int(lines[index]['rows'], 16) ^ 1:016x}"
    else:
        run.rewinds.append(Rewind(lines[index]["step"], len(lines), "that the run did not make"))
    with pytest.raises(ValueError, match="training log: step"):
        check(lines, plan, run.rewinds)


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([1, 2, 3], "step 0 is missing"),
        ([0, 1, 3, 4], "step 2 is missing"),
        ([0, 1, 1, 2, 2], "step 1 is there twice"),
        ([0, 2, 1, 3], "step 1 is out of order, after step 2"),
    ],
)
def test_the_first_wrong_step_is_named(steps: list[int], found: str) -> None:
    run = Run(Plan(0, "ab", 10, 2))
    run.train(5, 1)
    with pytest.raises(ValueError, match=f"^training log: {found}$"):
        check([run.lines[step] for step in steps], run.plan, [])


def test_the_rows_of_another_seed_are_noticed() -> None:
    run = Run(Plan(0, "ab", 100, 4))
    run.train(3, 1)
    with pytest.raises(ValueError, match="step 0 did not train on the rows of data step 0"):
        check(run.lines, Plan(1, "ab", 100, 4), [])
    del run.lines[1]["rows"]
    with pytest.raises(ValueError, match="step 1 did not train on the rows of data step 1"):
        check(run.lines, run.plan, [])


def test_the_figures_of_a_log_without_lines() -> None:
    assert check([], Plan(0, "ab", 100, 4), []) == {"epochs": 0, "skipped_sequences": 0}


def test_data_step_after_rewinds() -> None:
    first = Rewind(10, 15, "spike")  # skips 10..15
    again = Rewind(10, 12, "spike again")  # of data 16..18
    older = Rewind(5, 11, "spike")  # of data 5..20: the two windows lie in it
    assert [data_step_of(step, [first]) for step in (9, 10, 11)] == [9, 16, 17]
    assert [data_step_of(step, [first, again]) for step in (9, 10, 11)] == [9, 19, 20]
    assert skipped_windows([first, again, older]) == [(5, 20)]
    assert [data_step_of(step, [first, again, older]) for step in (4, 5, 10)] == [4, 21, 26]


def test_a_rewind_before_an_older_one_keeps_its_window() -> None:
    """The run was killed and went on from step 5, before the step that the first rewind went back to."""
    rewinds = [Rewind(10, 15, "spike"), Rewind(5, 7, "spike")]
    assert skipped_windows(rewinds) == [(5, 7), (10, 15)]
    assert [data_step_of(step, rewinds) for step in range(4, 9)] == [4, 8, 9, 16, 17]


def test_digests_add_up() -> None:
    rows = np.random.default_rng(0).integers(0, 2**40, 1000)
    whole = digest_rows(rows)
    assert 0 <= whole < 2**64
    assert digest_rows(rows[::-1]) == whole
    for world_size in (1, 3, 7):
        assert combine(digest_rows(rows_of_rank(rows, rank, world_size)) for rank in range(world_size)) == whole
    assert digest_rows(np.append(rows, rows[:1])) != whole
    assert combine([]) == digest_rows(rows[:0]) == 0
    assert digest_rows(np.array([0])) == 0xE220A8397B1DCDAF  # the first number of splitmix64 seeded with 0
