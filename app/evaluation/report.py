"""The report as one self-contained HTML page: figures with their intervals, the loss curve, sample continuations.

It computes no figure of its own.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.evaluation.metrics import Figure
from app.page import page, svg

EXPLANATIONS = {
    "bits_per_byte": "held-out cross-entropy in bits, divided by UTF-8 bytes; lower is better",
    "perplexity": "of a token; not comparable between tokenizers; lower is better",
    "unigram_byte_bits_per_byte": "bits per byte of a model that knows byte frequencies only",
    "unigram_token_bits_per_byte": "bits per byte of a model that knows the tokens' frequencies only",
    "reduction_percent": "how far the model is below unigram bytes; an untrained model with a good tokenizer is too",
    "documents": "held-out documents scored",
    "bleu": "greedy continuations against the documents' own, 0 to 100",
    "chrf": "F-score over 1 to 6 characters, recall twice as heavy, 0 to 100",
    "rouge1": "F-measure over single units, 0 to 1",
    "rouge2": "F-measure over pairs of units",
    "rougeL": "F-measure over the longest common subsequence",
    "bertscore": "F1 over each sub-word's most similar one, not rescaled, -1 to 1",
    "distinct_1": "share of different units in a continuation",
    "distinct_2": "share of different pairs",
    "repetition": "share of runs of 4 units that a continuation had before; lower is better",
    "continuations": "documents continued",
    "tokens_per_second": "decoded by the endpoint's engine, this many sequences at once; n runs",
}


class Benchmark(NamedTuple):
    """Of a choice benchmark at one number of shots: (accuracy, questions) by subject, and what a reader must know."""

    name: str
    shots: int
    subjects: dict[str, tuple[float, int]]
    notes: list[str]


class Content(NamedTuple):
    """What the page shows: figures without an interval are plain numbers; samples are (prompt, continuation, own)."""

    figures: Mapping[str, Figure | float]
    sources: Mapping[str, str]
    decontamination: Mapping[str, str]
    benchmarks: Sequence[Benchmark]
    log: Sequence[Mapping[str, float]]
    samples: Sequence[tuple[str, str, str]]


def render(content: Content) -> str:
    """The page."""
    head = "<tr><th>figure<th class=number>value<small>95 % interval<br>items</small></tr>"
    rows = "".join(_row(name, figure) for name, figure in content.figures.items())
    named = "".join(f"<p class=note>{html.escape(f'{name}: {uri}')}</p>" for name, uri in content.sources.items())
    parts = [f"<h1>Evaluation</h1>{named}<table>{head}{rows}</table>"]
    parts.append("<p class=note>Intervals: bootstrap over items, 1000 resamples, 2.5 to 97.5 percentile.</p>")
    parts.append("<h2>Was it trained on?</h2><table>")
    for name, state in content.decontamination.items():
        mark = " class=warning" if "NOT" in state else ""
        parts.append(f"<tr><td>{html.escape(name)}</td><td{mark}>{html.escape(state)}</td></tr>")
    parts.append("</table>")
    parts += [_benchmark(one) for one in content.benchmarks]
    if content.log:
        parts.append(f"<h2>Training loss</h2><div>{loss_curve(content.log)}</div>")
    if content.samples:
        parts.append("<h2>Continuations</h2><table><tr><th>prompt and <mark>continuation</mark><th>original</tr>")
        for prompt, continuation, original in content.samples:
            written, own = f"{html.escape(prompt)}<mark>{html.escape(continuation)}</mark>", html.escape(original)
            parts.append(f"<tr><td>{written}</td><td>{own}</td></tr>")
        parts.append("</table>")
    return page("Evaluation", parts, "zh")


def _row(name: str, figure: Figure | float) -> str:
    about = EXPLANATIONS.get(name) or EXPLANATIONS.get(name.rpartition("_")[0], "")
    name = name.replace("_", "_<wbr>")  # else too wide for a phone
    if not isinstance(figure, Figure):
        return f"<tr><td>{name}<small>{about}</small><td class=number>{figure:g}</tr>"
    what = "measured on" if name.startswith("tokens_") else "tokenisation"
    cut = f"<small>{what}: {html.escape(figure.tokenisation)}</small>"
    interval = f"<small>{figure.low:.4g} – {figure.high:.4g}<br>n {figure.n:,}</small>"
    return f"<tr><td>{name}<small>{about}</small>{cut}<td class=number>{figure.value:g}{interval}</tr>"


def _benchmark(one: Benchmark) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(subject)}<td class=number>{share:.3f}<td class=number>{count}</tr>"
        for subject, (share, count) in one.subjects.items()
    )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in one.notes)
    table = f"<table><tr><th>subject<th class=number>accuracy<th class=number>questions</tr>{rows}</table>"
    title = f"{html.escape(one.name)}, {one.shots}-shot: {len(one.subjects)} subjects"
    return f"<h2>{title}</h2>{notes}<details><summary>each subject</summary>{table}</details>"


def loss_curve(log: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step, its moving average, and held-out bits per byte where it was measured, as inline SVG."""
    from matplotlib.figure import Figure as Picture

    figure = Picture(figsize=(8, 3.2), layout="constrained")
    loss = figure.add_subplot()
    steps, values = [line["step"] for line in log], [line["loss"] for line in log]
    loss.plot(steps, values, color="#2f6f9f", linewidth=0.6, alpha=0.35)
    loss.plot(steps, moving_average(values), color="#2f6f9f", linewidth=1.8)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss (nats per token)", color="#2f6f9f")
    measured = [line for line in log if "held_out_bits_per_byte" in line]
    held_out = loss.twinx()
    points = [(line["step"], line["held_out_bits_per_byte"]) for line in measured]
    held_out.plot([x for x, _ in points], [y for _, y in points], "o-", color="#c2570c", markersize=3, linewidth=1)
    held_out.set_ylabel("held-out bits per byte", color="#c2570c")
    return svg(figure)


def moving_average(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Exponential moving average without bias to the first value (Kingma and Ba 2015, section 3)."""
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        averages.append(total / weight)
    return averages
