"""What a sweep keeps of a trial in its folder: number and values, every report, failures, and that it was ended early.

It is written before anybody acts on it. So a sweep that was killed is begun again from the first trial: each repeats
its reports from here without training, the same decisions follow, and the one that was cut off trains on.
It decides nothing and knows nothing of Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from app import storage
from app.training import checkpoint
from app.tuning.space import Overrides

Outcome = Literal["finished", "ended early", "failed", "unfinished"]
Report = dict[str, Any]  # step, measured, score and, when it is the last of a finished trial, finished


@dataclass
class Trial:
    """One trial; `score` is the figure of the model that it made, or the last one measured."""

    uri: str
    number: int
    values: Overrides
    reports: list[Report] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_ended: bool = False
    earlier: list[str] = field(default_factory=list)  # folders of its generations before, in a population

    @classmethod
    def open(cls, uri: str, number: int) -> Self | None:
        """The trial in a folder; None when there is none."""
        if not storage.exists(f"{uri}/trial.json"):
            return None
        reports, failures = _read(f"{uri}/reports.json", []), _read(f"{uri}/failures.json", [])
        values = _read(f"{uri}/trial.json", {})
        return cls(uri, number, values, reports, failures, storage.exists(f"{uri}/ended_early"))

    @classmethod
    def begin(cls, uri: str, number: int, values: Overrides) -> Self:
        """The trial in a folder, begun there if there is none yet. Raises ValueError when another one is in there."""
        found = cls.open(uri, number)
        if found and found.values != values:
            raise ValueError(
                f"{uri}: holds a trial with {found.values}, now {values}; set trials_uri to another folder"
            )
        if not found:
            _write(f"{uri}/trial.json", values)
        return found or cls(uri, number, values)

    def report(self, step: int, measured: float) -> Report:
        """Note a figure that was measured."""
        return self._note({"step": step, "measured": measured, "score": measured})

    def finish(self, step: int, measured: float, score: float) -> Report:
        """Note the last figure, and the one of the model that came out."""
        return self._note({"step": step, "measured": measured, "score": score, "finished": True})

    def _note(self, report: Report) -> Report:
        self.reports.append(report)
        _write(f"{self.uri}/reports.json", self.reports)
        return report

    def fail(self, error: str) -> None:
        """Note that an attempt failed."""
        self.failures.append(error)
        _write(f"{self.uri}/failures.json", self.failures)

    def end_early(self) -> None:
        """Decide that it trains no further; whoever trains it looks with `was_ended`."""
        storage.write_atomic(f"{self.uri}/ended_early", b"")

    def was_ended(self) -> bool:
        """Whether that was decided, asked of the storage."""
        self.is_ended = self.is_ended or storage.exists(f"{self.uri}/ended_early")
        return self.is_ended

    @property
    def last_step(self) -> int:
        """The step of the last report."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def score(self) -> float | None:
        """Low is good."""
        return float(self.reports[-1]["score"]) if self.reports else None

    @property
    def outcome(self) -> Outcome:
        """How it stands when the sweep is over."""
        if self.reports and self.reports[-1].get("finished"):
            return "finished"
        if self.is_ended:
            return "ended early"
        return "failed" if self.failures else "unfinished"

    def drop_weights(self) -> None:
        """Delete checkpoints and model; what it reported stays."""
        for uri in [self.uri, *self.earlier]:
            for name in ("checkpoints", "model"):
                storage.delete(f"{uri}/{name}")


def new_scores(run_uri: str, metric: str, after_step: int) -> list[tuple[int, float]]:
    """(step, figure) of what a run has measured since."""
    scores = checkpoint.read_scores(run_uri)
    return [(step, scores[step][metric]) for step in sorted(scores) if step > after_step and metric in scores[step]]


def choose_best(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the lowest score, the first of equals. Raises ValueError when none has finished."""
    finished = [trial for trial in trials if trial.outcome == "finished" and trial.score is not None]
    if not finished:
        said = next((trial.failures[-1] for trial in trials if trial.failures), "none has begun")
        counts = ", ".join(f"{trial.number}: {trial.outcome}" for trial in trials)
        raise ValueError(f"no trial finished ({counts}); the first error: {said}")
    return min(finished, key=lambda trial: (trial.score, trial.number))


def join(parts: Sequence[Trial]) -> Trial:
    """What a place in a population did in its generations, as one trial that stands as the last of them."""
    last = parts[-1]
    reports = [report for part in parts for report in part.reports]
    failures = [failure for part in parts for failure in part.failures]
    if last.outcome != "finished":
        reports = [{name: value for name, value in report.items() if name != "finished"} for report in reports]
    return Trial(last.uri, last.number, last.values, reports, failures, earlier=[part.uri for part in parts[:-1]])


def _read(uri: str, missing: Any) -> Any:
    if not storage.exists(uri):
        return missing
    with storage.open_file(uri) as file:
        return json.load(file)


def _write(uri: str, value: Sequence[Any] | Mapping[str, Any]) -> None:
    storage.write_atomic(uri, json.dumps(value).encode())
