"""A training run as one self-contained HTML page: its figures, its curves, and what went wrong on the way.

Curves are thinned to bins, so that a page stays small however long the run was. No scripts and nothing loaded from
elsewhere; readable on a phone. It computes no figure of its own but those of goodput.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from app.page import page, shown, svg, table
from app.training.goodput import Event, Goodput, Restart, summarize

Line = Mapping[str, Any]
Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

MAX_BINS = 500
EXPLANATIONS = {
    "loss": "median training loss of the last tenth of the steps, nats per token",
    "held_out_bits_per_byte": "held-out cross-entropy in bits, divided by UTF-8 bytes; the last measured",
    "replay_bits_per_byte": "the same on the replayed corpus",
    "tokens_per_second": "median over steps, all workers; checkpoints and evaluations left out",
    "mfu": "model FLOPs over the peak of the devices, median",
    "communication_share": "exposed communication over the step's time, median",
    "goodput": "time of the surviving steps over all time since the first attempt began",
    "wall_seconds": "since the first attempt began",
    "restarts": "attempts after the first",
    "rewinds": "times that the run went back for a bad loss and skipped data",
    "steps_redone": "steps computed again after a restart",
    "steps_rewound": "steps taken back by rewinds",
}
RESTART_HEADS = ["time (UTC)", "cause", "from step", "workers", "steps redone", "seconds to recover"]
INCIDENTS = {  # kind of event -> title of its table, and the event's fields by head
    "rewound": ("Rewinds", {"at step": "at_step", "to step": "to_step", "reason": "reason"}),
    "alarm": ("Alarms", {"step": "step", "figure": "name", "median": "value", "level": "level"}),
    "rejected": ("Rejected checkpoints", {"step": "step", "reason": "reason"}),
}
BLUE, ORANGE, RED, GREY = "#2f6f9f", "#c2570c", "#b3261e", "#7b8794"
SPLIT = {
    "data": "#e0a458",
    "forward_backward": "#2f6f9f",
    "communication": "#b3261e",
    "optimizer": "#6aa57a",
    "checkpoint": "#8e6bab",
    "evaluation": "#5bb5c5",
    "other": "#cbd2d9",
}


@dataclass(frozen=True)
class Curve:
    """A name of the lines, how it is called and drawn; `reduce` makes one value of a bin."""

    name: str
    label: str
    color: str
    scale: float = 1.0
    reduce: Callable[[npt.NDArray[np.float64]], np.float64] = np.mean
    style: str = "-"


def render(lines: Sequence[Line], events: Sequence[Event], figures: Mapping[str, Any]) -> str:
    """The page of a run from its lines, its events in order of time, and the figures of its manifest."""
    ledger = summarize(events, lines)
    marks = [(restart.step, GREY) for restart in ledger.restarts] + [
        (event["at_step"], RED) for event in ledger.rewinds
    ]
    parts = [f"<h1>Training</h1>{_table(('figure', 'value', ''), _headline(lines, ledger) | dict(figures))}"]
    if "skipped_sequences" in figures:
        parts.append(
            "<p>Every step trained on the rows that were due: the digests of the log are those of the sampler, none is "
            f"there twice and none is missing. Rewinds skipped {shown(figures['skipped_sequences'])} sequences.</p>"
        )
    parts += [f"<h2>{title}</h2><div>{picture}</div>" for title, picture in _pictures(lines, marks)]
    if marks:
        parts.append("<p class=note>Dashed lines: grey is a restart, red a rewind.</p>")
    parts += _incidents(ledger, events)
    return page("Training", parts)


def _headline(lines: Sequence[Line], ledger: Goodput) -> dict[str, Any]:
    """What the lines and events say in one number each; the manifest's figures of the same name win."""
    figures: dict[str, Any] = {"steps": len(lines)}
    if losses := _values(lines[-max(1, len(lines) // 10) :], "loss"):
        figures["loss"] = median(losses)
    for name in ("held_out_bits_per_byte", "replay_bits_per_byte"):
        if measured := _values(lines, name):
            figures[name] = measured[-1]
    for name in ("tokens_per_second", "mfu", "communication_share"):
        if measured := _values(lines, name):
            figures[name] = median(measured)
    if ledger.wall_seconds:
        figures |= {"wall_seconds": ledger.wall_seconds, "goodput": ledger.goodput}
    counts = {"restarts": len(ledger.restarts), "rewinds": len(ledger.rewinds)}
    return figures | counts | {"steps_redone": ledger.steps_redone, "steps_rewound": ledger.steps_rewound}


def _values(lines: Sequence[Line], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def _table(heads: Sequence[str], figures: Mapping[str, Any]) -> str:
    rows = [(name, value, EXPLANATIONS.get(name, "")) for name, value in figures.items()]
    return table(heads, rows)


def _incidents(ledger: Goodput, events: Sequence[Event]) -> list[str]:
    """Tables of what happened, those that are not empty."""
    tables = [(RESTART_HEADS, "Restarts", [_restart_row(restart) for restart in ledger.restarts])]
    for kind, (title, fields) in INCIDENTS.items():
        rows = [[event[name] for name in fields.values()] for event in events if event["kind"] == kind]
        tables.append((list(fields), title, rows))
    return [f"<h2>{title}</h2>{table(heads, rows)}" for heads, title, rows in tables if rows]


def _restart_row(restart: Restart) -> list[Any]:
    when = datetime.fromtimestamp(restart.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    took = ", ".join(f"{name.removesuffix('_seconds')} {value:.1f}" for name, value in restart.breakdown.items())
    total = "" if restart.seconds_to_recover is None else f"{restart.seconds_to_recover:.1f}: "
    workers = f"{restart.from_workers} → {restart.to_workers}"
    return [when, restart.cause, restart.step, workers, restart.steps_redone, total + took]


def _pictures(lines: Sequence[Line], marks: Sequence[tuple[float, str]]) -> list[tuple[str, str]]:
    """(title, SVG) of what the lines hold."""
    loss = [Curve("loss", "training loss (nats per token)", BLUE)]
    held_out = [
        Curve("held_out_bits_per_byte", "held-out bits per byte", ORANGE, style="o-"),
        Curve("replay_bits_per_byte", "replay", "#8e6bab", style="o-"),
    ]
    rate = [Curve("learning_rate", "learning rate", BLUE)]
    norm = [Curve("grad_norm", "gradient norm (largest)", ORANGE, reduce=np.max)]
    speed = [Curve("tokens_per_second", "tokens per second", BLUE)]
    mfu = [Curve("mfu", "MFU (%)", ORANGE, scale=100)]
    memory = [Curve("memory_bytes", "memory of the largest rank (GiB)", BLUE, scale=2**-30, reduce=np.max)]
    spread = [Curve("rank_spread", "rank spread (% of the step)", ORANGE, scale=100)]
    utilization = [Curve("gpu_utilization", "GPU utilization (%)", BLUE, scale=100)]
    power = [Curve("gpu_power_watts", "power of a GPU (W)", ORANGE)]
    drawn = {
        "Loss": _two_axes(lines, loss, held_out, marks),
        "Learning rate and gradient norm": _two_axes(lines, rate, norm, marks),
        "Speed": _two_axes(lines, speed, mfu, marks),
        "Time of a step": _step_split(lines),
        "Memory and ranks": _two_axes(lines, memory, spread, marks),
        "GPU": _two_axes(lines, utilization, power, marks),
    }
    return [(title, picture) for title, picture in drawn.items() if picture]


def binned(lines: Sequence[Line], curve: Curve) -> Points:
    """(steps, values) of a curve in at most MAX_BINS bins of equal count; what is missing or not finite is left out."""
    found = [(line["step"], line[curve.name]) for line in lines if curve.name in line]
    points = np.array(found, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    bins = np.array_split(points, min(MAX_BINS, len(points))) if len(points) else []
    steps = np.array([part[:, 0].mean() for part in bins])
    return steps, np.array([curve.reduce(part[:, 1]) for part in bins]) * curve.scale


def _two_axes(
    lines: Sequence[Line], left: Sequence[Curve], right: Sequence[Curve], marks: Sequence[tuple[float, str]]
) -> str:
    """Curves over the step with an axis on each side, as SVG; "" when the lines hold none of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    first = figure.add_subplot()
    first.set_xlabel("step")
    drawn = _draw(first, lines, left)
    if drawn:
        drawn += _draw(first.twinx(), lines, right)
    else:
        drawn = _draw(first, lines, right)
    for step, color in marks:
        first.axvline(step, color=color, linewidth=0.8, linestyle="--")
    return svg(figure) if drawn else ""


def _draw(axes: Any, lines: Sequence[Line], curves: Sequence[Curve]) -> int:
    """Draw the curves that have points; how many."""
    shown = []
    for curve in curves:
        steps, values = binned(lines, curve)
        if len(steps):
            style = "o" if len(steps) == 1 else curve.style
            axes.plot(steps, values, style, color=curve.color, linewidth=1.2, markersize=3)
            shown.append(curve)
    if shown:
        axes.set_ylabel("; ".join(curve.label for curve in shown), color=shown[0].color)
    else:
        axes.set_axis_off()
    return len(shown)


def _step_split(lines: Sequence[Line]) -> str:
    """Seconds of a step by part, stacked, as SVG; "" when the lines do not hold them."""
    from matplotlib.figure import Figure

    timed = [_filled(line) for line in lines if "step_seconds" in line]
    if not timed:
        return ""
    curves = {name: binned(timed, Curve(name, name, color)) for name, color in SPLIT.items()}
    steps = curves["data"][0]
    heights = [values for _, values in curves.values()]
    if len(steps) == 1:  # an area needs two points
        steps, heights = np.array([steps[0] - 0.5, steps[0] + 0.5]), [np.repeat(values, 2) for values in heights]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(steps, heights, labels=[name.replace("_", " and ") for name in SPLIT], colors=list(SPLIT.values()))
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return svg(figure)


def _filled(line: Line) -> dict[str, float]:
    """The parts of a line's step, 0 where one is missing, and the rest of the step as `other`."""
    parts = {name: float(line.get(f"{name}_seconds", 0.0)) for name in SPLIT if name != "other"}
    return {"step": line["step"], **parts, "other": max(0.0, line["step_seconds"] - sum(parts.values()))}
