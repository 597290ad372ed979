"""Proof that a run consumed its data exactly once: digests of rows, and the check of a finished run's log.

A digest is a sum of hashes, so those of the ranks add up to the step's, in any order and world size. A rewind skips a
window of data for good; the surviving step s takes the s-th data step outside all windows. So none is used twice and
none is left out, whatever the order of rewinds, kills and checkpoints. It reads and writes no file, and cannot know
that lines are missing at the end of a log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.training.sampler import Plan, Rows, rows_of_step

Window = tuple[int, int]  # first and last data step that are skipped

_MODULUS = 2**64


@dataclass(frozen=True)
class Rewind:
    """While `at_step` ran, the run went back to do `to_step` next, and skipped the data of both and all between."""

    to_step: int
    at_step: int
    reason: str


def digest_rows(rows: Rows) -> int:
    """Sum modulo 2^64 of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) of each row id."""
    mixed = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))


def combine(digests: Iterable[int]) -> int:
    """The digest of all rows from those of disjoint shares."""
    return sum(digests) % _MODULUS


def skipped_windows(rewinds: Sequence[Rewind]) -> list[Window]:
    """The data that these rewinds, in the order in which they happened, skipped: disjoint windows, ascending.

    Each skips from the data step of `to_step` to that of `at_step`, both as they were then, and what lies between;
    windows inside it become part of it.
    """
    windows: list[Window] = []
    for rewind in rewinds:
        assert 0 <= rewind.to_step <= rewind.at_step, rewind
        first, last = _outside(rewind.to_step, windows), _outside(rewind.at_step, windows)
        windows = sorted([(first, last), *(window for window in windows if not first <= window[0] <= last)])
    return windows


def data_step_of(step: int, rewinds: Sequence[Rewind]) -> int:
    """The data step that `step` takes: the one with that index among those that are not skipped.

    >>> [data_step_of(step, [Rewind(2, 3, "spike"), Rewind(2, 2, "spike")]) for step in range(4)]
    [0, 1, 5, 6]
    """
    return _outside(step, skipped_windows(rewinds))


def _outside(step: int, windows: Sequence[Window]) -> int:
    data_step = step
    for first, last in windows:
        if data_step < first:
            break
        data_step += last - first + 1
    return data_step


def check(lines: Sequence[dict[str, Any]], plan: Plan, rewinds: Sequence[Rewind]) -> dict[str, float | int]:
    """Compare the log of a finished run with what the sampler says; how far it came in the data.

    A line has `step`, `data_step` and `rows`, the digest as 16 hexadecimal digits. `epochs` counts passes over the
    corpus, skipped data included. Raises ValueError naming the first step that is wrong.
    """
    windows = skipped_windows(rewinds)
    end = 0
    for step, line in enumerate(lines):
        if line["step"] != step:
            raise ValueError(f"training log: {_misplaced(step, lines)}")
        due = _outside(step, windows)
        if line.get("data_step") != due:
            raise ValueError(f"training log: step {step} took data step {line.get('data_step')}, {due} was due")
        if line.get("rows") != f"{digest_rows(rows_of_step(plan, due)):016x}":
            raise ValueError(f"training log: step {step} did not train on the rows of data step {due}")
        end = due + 1
    return {
        "epochs": round(end * plan.corpus_batch / plan.num_rows, 4),
        "skipped_sequences": (end - len(lines)) * plan.global_batch,
    }


def _misplaced(step: int, lines: Sequence[dict[str, Any]]) -> str:
    found = lines[step]["step"]
    if found < step:
        return f"step {found} is there twice"
    if any(line["step"] == step for line in lines[step:]):
        return f"step {step} is out of order, after step {found}"
    return f"step {step} is missing"
