"""The sweep as figures and as one self-contained HTML page: the gain, the trials' curves, score against each setting.

Everything is taken from the trials' folders. No scripts and nothing loaded from elsewhere; readable on a phone.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from app.page import page, svg, table
from app.tuning.trial import Trial

BLUE, ORANGE, GREY, RED = "#2f6f9f", "#c2570c", "#b8c2cc", "#b3261e"
LOG_RANGE = 20  # values that differ more are drawn on a logarithmic axis


def figures(trials: Sequence[Trial], best: Trial) -> dict[str, Any]:
    """The figures of the manifest."""
    outcomes = [trial.outcome for trial in trials]
    found: dict[str, Any] = {"trials": len(trials), "best_trial": best.number, "best_score": _rounded(best.score)}
    for name in ("finished", "ended early", "failed"):
        found[name.replace(" ", "_")] = sum(outcome == name for outcome in outcomes)
    found["retries"] = sum(len(trial.failures) - (trial.outcome == "failed") for trial in trials)
    found["steps"] = sum(trial.last_step for trial in trials)
    is_start = (trial for trial in trials if trial.number == 0 and not trial.values and trial.outcome == "finished")
    start = next(is_start, None)  # in a population, trial 0 does not stay what it was
    if start and start.score and best.score is not None:
        found["start_score"] = _rounded(start.score)
        found["gain_percent"] = round(100 * (1 - best.score / start.score), 2)
    return found | {"best": {key: float(v) if isinstance(v, bool) else v for key, v in best.values.items()}}


def content(trials: Sequence[Trial], best: Trial, metric: str) -> dict[str, Any]:
    """What the page shows, as JSON."""
    return {
        "metric": metric,
        "figures": figures(trials, best),
        "trials": [
            {
                "number": trial.number,
                "outcome": trial.outcome,
                "score": trial.score,
                "values": trial.values,
                "curve": [[report["step"], report["measured"]] for report in trial.reports],
                "failures": trial.failures,
            }
            for trial in trials
        ],
    }


def render(shown: Mapping[str, Any]) -> str:
    """The page."""
    metric, trials = shown["metric"].replace("_", " "), shown["trials"]
    numbers = {name: value for name, value in shown["figures"].items() if name != "best"}
    best = next(trial for trial in trials if trial["number"] == numbers["best_trial"])
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    order = sorted(trials, key=lambda trial: (trial["outcome"] != "finished", trial["score"] is None, trial["score"]))
    rows = [
        (str(trial["number"]), trial["score"], trial["outcome"], *(trial["values"].get(key, "") for key in keys))
        for trial in order
    ]
    parts = [f"<h1>Sweep</h1>{table(('figure', 'value'), list(numbers.items()))}"]
    parts.append(
        f"<p class=note>Scores are {metric}, low is good: of the model that a finished trial made, else the last "
        "measured. Trial 0 starts from the config as it stands. steps are those of all trials.</p>"
    )
    parts.append(f"<h2>Trials</h2><div>{_curves(trials, best, metric)}</div>")
    legend = "Orange: the best. Blue: trial 0. A red cross: where a trial ended early or failed."
    parts.append(f"<p class=note>{legend} {_outcomes(trials)}.</p>")
    parts.append(f"<h2>Settings</h2><div>{_settings(trials, keys, metric)}</div>")
    parts.append("<p class=note>Filled: finished trials. Hollow: ended early, at their last score.</p>")
    parts.append(table(("trial", "score", "outcome", *keys), rows))
    failures = [(str(trial["number"]), said) for trial in trials for said in trial["failures"]]
    if failures:
        parts.append(f"<h2>Failures</h2>{table(('trial', 'error'), failures)}")
    return page("Sweep", parts)


def _outcomes(trials: Sequence[Mapping[str, Any]]) -> str:
    told = {name: [str(trial["number"]) for trial in trials if trial["outcome"] == name] for name in _names(trials)}
    return html.escape("; ".join(f"{name} {', '.join(numbers)}" for name, numbers in told.items()))


def _names(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(trial["outcome"] for trial in trials))


def _curves(trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any], metric: str) -> str:
    """What was measured, by step, a line a trial; a cross where one was ended early."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for trial in sorted(trials, key=lambda one: one is best):
        if not trial["curve"]:
            continue
        steps, values = zip(*trial["curve"], strict=True)
        color = ORANGE if trial is best else BLUE if trial["number"] == 0 else GREY
        axes.plot(steps, values, "o-", color=color, linewidth=1.4 if color != GREY else 0.9, markersize=2.5)
        if trial["outcome"] != "finished":
            axes.plot(steps[-1:], values[-1:], "x", color=RED, markersize=6)
        axes.annotate(str(trial["number"]), (steps[-1], values[-1]), xytext=(4, -3), textcoords="offset points", size=8)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    return svg(figure)


def _settings(trials: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> str:
    """Score against each setting, a small picture a key; trials that have no figure are left out."""
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(keys)))
    rows = -(-len(keys) // columns) or 1
    figure = Figure(figsize=(8, 2.6 * rows), layout="constrained")
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [(one["values"][key], one["score"], one["outcome"]) for one in trials if key in one["values"]]
        points = [point for point in points if point[1] is not None]
        is_word = any(isinstance(value, str | bool) for value, _, _ in points)
        for value, score, outcome in points:
            filled = BLUE if outcome == "finished" else "none"
            axes.plot([str(value) if is_word else value], [score], "o", color=BLUE, markerfacecolor=filled)
        values = [value for value, _, _ in points]
        if not is_word and values and min(values) > 0 and max(values) / min(values) > LOG_RANGE:
            axes.set_xscale("log")
        axes.set_xlabel(key, fontsize=8)
        axes.set_ylabel(metric if index % columns == 0 else "", fontsize=8)
        axes.tick_params(labelsize=7)
    return svg(figure)


def _rounded(score: float | None) -> float:
    assert score is not None
    return round(score, 4)
