"""The report of a pipeline run: the summary, the gates, the lineage, and every stage's own page, in one file.

The stages' pages are taken in as they are; figures of stages without a page come from their manifests. It computes no
figure of its own.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.artifacts import GATE, Manifest
from app.config import flatten
from app.page import page, table
from app.pipeline.graph import boxes_of, draw

TITLES = {
    "prepare_corpus": "Corpus",
    "train_tokenizer": "Tokenizer",
    "pack_tokens": "Tokens",
    "train_model": "Training",
    "evaluate_model": "Evaluation",
    "quantize_model": "Quantization",
    "evaluate_quantized": "Evaluation of the quantized model",
    "check_parity": "Parity",
}


@dataclass(frozen=True)
class Row:
    """A line of the summary: what a stage took, made and cost."""

    stage: str
    seconds: float
    skipped: bool
    flow: str
    key_figure: str


@dataclass(frozen=True)
class Made:
    """What a stage made, and what its own page holds, if it has one."""

    manifest: Manifest
    body: str = ""


def render(rows: Sequence[Row], made: Mapping[str, Made], error: str) -> str:
    """The page of the stages that ended, in order; `error` is that of the one that did not."""
    parts = ["<h1>zero-to-one</h1>"]
    if error:
        parts.append(f"<p class=warning>The run did not end: {html.escape(error)}</p>")
    parts += [_gate(TITLES[name], one.manifest) for name, one in made.items() if GATE in one.manifest.figures]
    lines = [
        (row.stage.replace("_", " "), "skipped" if row.skipped else round(row.seconds, 1), row.flow, row.key_figure)
        for row in rows
    ]
    parts += ["<h2>Summary</h2>", table(("stage", "seconds", "in → out", "key figure"), lines)]
    boxes = boxes_of(one.manifest for one in made.values())
    parts += [
        "<h2>Lineage</h2><p class=note>Of what each artifact was made, by digest.</p>",
        f"<div>{draw(boxes)}</div>",
    ]
    if {"evaluate_model", "evaluate_quantized"} <= set(made):
        both = (made[name].manifest.figures for name in ("evaluate_model", "evaluate_quantized"))
        parts += [
            "<h2>Before and after quantization</h2>",
            table(("figure", "before", "after", "change"), _changes(*both)),
        ]
    for name, one in made.items():
        body = one.body or f"<h1>{TITLES[name]}</h1>{table(('figure', 'value'), flatten(one.manifest.figures).items())}"
        parts.append(f"<section id={name}>{body}</section>")
    return page("zero-to-one: a run", parts)


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[tuple[str, float, float, str]]:
    """What both evaluations measured, with an interval, of their models; and by how much it differs."""
    for name, value in before.items():
        now = after.get(name)
        if f"{name}_interval" in before and isinstance(value, int | float) and isinstance(now, int | float):
            yield name, value, now, f"{100 * (now / value - 1):+.2f} %" if value else ""


def _gate(title: str, manifest: Manifest) -> str:
    told = str(manifest.figures[GATE])
    state = "passed" if told == "passed" else "failed"
    return f"<p>{title} gate: <mark class={state}>{html.escape(told)}</mark></p>"
