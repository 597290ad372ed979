"""One line for each step before the checkpoint, whatever was written later; events that nothing takes back."""

from pathlib import Path

import pytest

from app.training.journal import Journal, add_event, read_events, read_log, read_rewinds


def write(journal: Journal, steps: range, attempt: int) -> None:
    for step in steps:
        journal.append({"step": step, "attempt": attempt})


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = Journal(str(tmp_path), 0)
    for end in (4, 8, 12):
        write(first, range(end - 4, end), 1)
        first.flush()
    write(first, range(12, 14), 1)  # lost: no checkpoint was made after them
    second = Journal(str(tmp_path), 8)  # the checkpoint of step 12 was damaged
    assert [line["step"] for line in read_log(str(tmp_path))] == list(range(8))
    write(second, range(8, 11), 2)
    assert [line["step"] for line in second.lines()] == list(range(11))
    second.flush()
    second.flush()
    assert [line["attempt"] for line in read_log(str(tmp_path))] == [1] * 8 + [2] * 3


def test_a_rewind_forgets_lines_on_storage_and_in_memory(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), 0)
    write(journal, range(4), 1)
    journal.flush()
    write(journal, range(4, 6), 1)
    journal.rewind(4)
    write(journal, range(4, 7), 2)
    journal.flush()
    assert [line["attempt"] for line in read_log(str(tmp_path))] == [1] * 4 + [2] * 3


def test_lines_that_are_missing_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 steps, the checkpoint 8; delete the run's folder"):
        Journal(str(tmp_path), 8)


def test_events_come_in_order(tmp_path: Path) -> None:
    for kind, fields in (("started", {"step": 0}), ("rewound", {"to_step": 4, "at_step": 7, "reason": "loss is nan"})):
        add_event(str(tmp_path), kind, **fields)
    assert [event["kind"] for event in read_events(str(tmp_path))] == ["started", "rewound"]
    assert [event["step"] for event in read_events(str(tmp_path), "started")] == [0]
    (rewind,) = read_rewinds(str(tmp_path))
    assert (rewind.to_step, rewind.at_step, rewind.reason) == (4, 7, "loss is nan")
