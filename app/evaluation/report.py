"""The report as one self-contained HTML page: figures, the loss curve, sample continuations.

No scripts and nothing loaded from elsewhere; readable on a phone.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .35rem .6rem .35rem 0;
vertical-align: top; border-bottom: 1px solid #e4e7eb; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } .source { color: #627d98; font-size: .85rem; overflow-wrap: anywhere; }
mark { background: #e3f2e6; }
"""
EXPLANATIONS = {
    "bits_per_byte": "held-out cross-entropy in bits, divided by UTF-8 bytes; lower is better",
    "unigram_byte_bits_per_byte": "the same for a model that knows byte frequencies only",
    "unigram_token_bits_per_byte": "the same for a model that knows the tokens' frequencies only",
    "reduction_percent": "how far the model is below unigram bytes; an untrained model with a good tokenizer is too",
    "documents": "held-out documents scored",
    "bleu": "greedy continuations against the documents' own; sacrebleu, Chinese characters, 0 to 100",
    "rouge1": "F-measure over single characters, 0 to 1",
    "rouge2": "F-measure over pairs of characters",
    "rougeL": "F-measure over the longest common subsequence",
    "continuations": "documents continued",
}


def render(
    figures: Mapping[str, float],
    sources: Mapping[str, str],
    log: Sequence[Mapping[str, float]],
    samples: Sequence[tuple[str, str, str]],
) -> str:
    """The page; `log` holds the training steps, `samples` are (prompt, continuation, original)."""
    rows = "".join(
        f"<tr><td>{name}</td><td class=number>{value:g}</td><td>{EXPLANATIONS.get(name, '')}</td></tr>"
        for name, value in figures.items()
    )
    named = "".join(f"<p class=source>{html.escape(f'{name}: {uri}')}</p>" for name, uri in sources.items())
    parts = [f"<h1>Evaluation</h1>{named}<table>{rows}</table>"]
    if log:
        parts.append(f"<h2>Training loss</h2>{loss_curve(log)}")
    if samples:
        parts.append("<h2>Continuations</h2><table><tr><th>prompt and <mark>continuation</mark><th>original</tr>")
        for prompt, continuation, original in samples:
            written, own = f"{html.escape(prompt)}<mark>{html.escape(continuation)}</mark>", html.escape(original)
            parts.append(f"<tr><td>{written}</td><td>{own}</td></tr>")
        parts.append("</table>")
    head = (
        f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title><style>{STYLE}"
    )
    return f"<!doctype html><html lang=zh><head>{head}</style></head><body>{''.join(parts)}</body></html>"


def loss_curve(log: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step, its moving average, and held-out bits per byte where it was measured, as inline SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
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
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def moving_average(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Exponential moving average without bias to the first value (Kingma and Ba 2015, section 3)."""
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        averages.append(total / weight)
    return averages
