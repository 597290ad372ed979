"""Measures as modules of the `evaluate` library; `evaluate.load` would fetch theirs from a hub, these need no network.

`Module(measure).compute(predictions=…, references=…)` gives value, low, high, n and tokenisation. Nothing is written
to disk.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from app.evaluation import metrics


class Module(evaluate.Metric):  # type: ignore[misc]
    """One measure over columns of Arrow types, as `evaluate` wants it."""

    def __init__(self, measure: metrics.Measure) -> None:
        self.measure = measure
        super().__init__(config_name=measure.name, keep_in_memory=True)

    def _info(self) -> Any:
        features = {name: datasets.Value(kind) for name, kind in self.measure.columns.items()}
        description = f"{self.measure.name}, tokenisation: {self.measure.tokenisation}"
        return evaluate.MetricInfo(description=description, citation="", features=datasets.Features(features))

    def _compute(self, **columns: Any) -> dict[str, Any]:
        return metrics.evaluate(self.measure, self.measure.rows(**columns))._asdict()


def figure_of(measure: metrics.Measure, **columns: Any) -> metrics.Figure:
    """The measure of items given as columns."""
    return metrics.Figure(**Module(measure).compute(**columns))
