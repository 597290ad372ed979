"""The corpus report: report.json and one self-contained page with the funnel, histograms, excerpts and times.

Bars are plain HTML.
It computes no figures of its own; shards.py counted them.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from app import storage
from app.corpus.shards import Counts
from app.page import Bar, bars, page

ITEMS_SHOWN = 50  # all are in report.json
BYTES_A_TOKEN = 4  # about what a byte-level BPE of 6,000 tokens or more reaches on Chinese text


def write(uri: str, figures: Mapping[str, Any], total: Counts) -> None:
    """Write report.json and report.html beside the documents."""
    content = {**figures, "seconds": dict(total.seconds), "wall_seconds": total.wall_seconds}
    content |= {"estimated_tokens": figures["train"]["bytes"] // BYTES_A_TOKEN, "counters": dict(total.counters)}
    content["excerpts"] = {rule: [text for _, _, text in found] for rule, found in sorted(total.excerpts.items())}
    text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
    storage.write_atomic(f"{uri}/report.json", text.encode())
    storage.write_atomic(f"{uri}/report.html", render(content).encode())


def render(content: Mapping[str, Any]) -> str:
    """The page of what report.json holds."""
    counters: Counter[str] = Counter(content["counters"])
    parts = ["<h1>Corpus</h1>", _summary(content), "<h2>What was rejected, and why</h2>", _funnel(content)]
    parts += ["<h2>By source</h2>", _sources(counters, content["upsampling"])]
    parts += ["<h2>Length in characters</h2>", _lengths(counters)]
    parts += ["<h2>Language</h2><p class=note>of one document in 64, chosen by hash</p>", _languages(counters)]
    if personal := {name: number for name, number in counters.items() if name.startswith("personal_data.")}:
        rows = [(name.split(".")[1], number, f"{number:,}", "") for name, number in sorted(personal.items())]
        parts += ["<h2>Personal data replaced</h2>", bars(rows)]
    if found := {name.removeprefix("found."): number for name, number in counters.items() if name.startswith("found.")}:
        rows = [(name, number, f"{number:,}", "") for name, number in Counter(found).most_common(ITEMS_SHOWN)]
        parts += ["<h2>Evaluation items found</h2>", bars(rows)]
    parts += ["<h2>Time</h2>", _times(content, counters), "<h2>Excerpts</h2>"]
    for rule, excerpts in content["excerpts"].items():
        items = "".join(f"<li>{html.escape(excerpt)}</li>" for excerpt in excerpts)
        parts.append(f"<details><summary>{html.escape(rule)}</summary><ol>{items}</ol></details>")
    return page("Corpus", parts, "zh")


def _summary(content: Mapping[str, Any]) -> str:
    train, held_out = content["train"], content["held_out"]
    text = (
        f"{content['raw']:,} raw documents: {content['clean']:,} clean and {content['rejected']:,} rejected. "
        f"{train['documents']:,} to train on ({train['bytes'] / 1e6:,.1f} MB, about "
        f"{content['estimated_tokens']:,} tokens at {BYTES_A_TOKEN} bytes), {held_out['documents']:,} held out."
    )
    if "evaluation_items" in content:
        text += (
            f" {content['by_rule'].get('contaminated', 0):,} held text of the {content['evaluation_items']:,} "
            f"evaluation items ({content['evaluation_items_too_short']:,} items were too short to look for)."
        )
    return f"<p>{text}</p>"


def _funnel(content: Mapping[str, Any]) -> str:
    raw = content["raw"]
    rows: list[Bar] = [("raw", raw, f"{raw:,}", "")]
    for rule, number in sorted(content["by_rule"].items(), key=lambda item: -item[1]):
        rows.append((rule, number, f"− {number:,}", "rejected"))
    return bars([*rows, ("clean", content["clean"], f"{content['clean']:,}", "after")])


def _sources(counters: Counter[str], upsampling: Mapping[str, float]) -> str:
    lines = []
    for name, factor in upsampling.items():
        prefix = f"source.{name}."
        reasons = {key.removeprefix(f"{prefix}rejected."): number for key, number in counters.items()}
        reasons = {rule: number for rule, number in reasons.items() if f"{prefix}rejected.{rule}" in counters}
        raw, kept = counters[f"{prefix}raw"], counters[f"{prefix}train"] + counters[f"{prefix}held_out"]
        largest = ", ".join(f"{rule} {number:,}" for rule, number in Counter(reasons).most_common(4))
        cells = "".join(f"<td class=number>{cell}" for cell in (f"{raw:,}", f"{kept:,}", f"{factor:g}"))
        lines.append(f"<tr><td>{html.escape(name)}{cells}<td>{html.escape(largest)}")
    head = (
        "<tr><th>source<th class=number>raw<th class=number>clean<th class=number>upsampling<th>most frequent reasons"
    )
    return f"<table>{head}{''.join(lines)}</table>"


def _lengths(counters: Counter[str]) -> str:
    return _before_and_after(
        counters, "length", lambda bits: f"{1 << int(bits) >> 1:,} to {(1 << int(bits)) - 1:,}", int
    )


def _languages(counters: Counter[str]) -> str:
    return _before_and_after(counters, "language", str, str)


def _before_and_after(counters: Counter[str], what: str, label: Any, order: Any) -> str:
    names = {key.rsplit(".", 1)[1] for key in counters if key.split(".")[1:2] == [what]}
    rows: list[Bar] = []
    for name in sorted(names, key=order):
        for stage in ("before", "after"):
            number = counters[f"{stage}.{what}.{name}"]
            rows.append((f"{label(name)} {stage}", number, f"{number:,}", stage))
    return bars(rows)


def _times(content: Mapping[str, Any], counters: Counter[str]) -> str:
    rows: list[Bar] = []
    for name, seconds in content["seconds"].items():
        rate = f"{seconds:,.1f} s, {content['raw'] / max(seconds, 1e-9):,.0f} documents a second and core"
        rows.append((name, seconds, rate, ""))
    wall = " · ".join(f"{name} {seconds:,.1f} s" for name, seconds in content["wall_seconds"].items())
    return f"<p class=note>By the clock: {wall}. Below: seconds of one core.</p>{bars(rows)}"
