import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from app.training.report import MAX_BINS, Curve, binned, render

STARTED = {"import_seconds": 3.0, "setup_seconds": 2.0, "load_seconds": 1.0, "world_size": 2}
EVENTS: list[dict[str, Any]] = [
    {"kind": "started", "time": 1e9, "step": 0, "reached": -1, "last_alive": 0.0, **STARTED},
    {"kind": "first_step", "time": 1e9 + 2, "step": 0},
    {"kind": "alarm", "time": 1e9 + 9, "step": 20, "name": "grad_norm", "value": 300.0, "level": 100.0},
    {"kind": "failed", "time": 1e9 + 20, "cause": "<b>rank 1</b> & co: killed"},
    {"kind": "rejected", "time": 1e9 + 25, "step": 12, "reason": "rank_1.pt: digest differs"},
    {"kind": "started", "time": 1e9 + 30, "step": 10, "reached": 13, "last_alive": 1e9 + 18, **STARTED},
    {"kind": "first_step", "time": 1e9 + 32, "step": 10},
    {"kind": "rewound", "time": 1e9 + 50, "to_step": 20, "at_step": 27, "reason": "loss is nan"},
    {"kind": "finished", "time": 1e9 + 90, "step": 99},
]


def lines_of(num_steps: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(size=num_steps)
    parts = {"data_seconds": 0.02, "forward_backward_seconds": 0.6, "optimizer_seconds": 0.1}
    gpu = {"gpu_utilization": 0.93, "gpu_power_watts": 612.0}
    lines = []
    for step in range(num_steps):
        line: dict[str, Any] = {"step": step, "loss": 9 * (step + 2) ** -0.2 + 0.1 * noise[step], **parts, **gpu}
        line |= {"grad_norm": 1 + abs(noise[step]), "learning_rate": 1e-3 * min(1, step / 20), "step_seconds": 0.8}
        line |= {"tokens_per_second": 4e4 + 900 * noise[step], "mfu": 0.31, "memory_bytes": 3e9, "rank_spread": 0.04}
        line |= {"communication_seconds": 0.05, "rows": f"{step:016x}"}
        if step % max(1, num_steps // 10) == 0:
            line["held_out_bits_per_byte"] = 2.5 - step / num_steps
        lines.append(line)
    return lines


class _Tags(HTMLParser):
    """Checks that tags nest, as far as HTML asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> list[str]:
    parser = _Tags()
    parser.feed(page.removeprefix("<!doctype html>"))
    assert not parser.open
    return parser.seen


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 1, 2, 100])
def test_a_page_of_any_length(num_steps: int) -> None:
    page = render(lines_of(num_steps), [], {})
    seen = tags(page)
    assert seen.count("svg") == (6 if num_steps else 0)
    assert "script" not in seen
    assert "Restarts</h2>" not in page


def test_what_went_wrong_is_told_and_escaped() -> None:
    page = render(lines_of(100), EVENTS, {"epochs": 1.25, "skipped_sequences": 64, "note <i>": "a & b"})
    tags(page)
    assert "&lt;b&gt;rank 1&lt;/b&gt; &amp; co: killed" in page
    assert "note &lt;i&gt;" in page
    assert "a &amp; b" in page
    assert "detection 2.0, restart 4.0, import 3.0, setup 2.0, load 1.0, first_step 2.0" in page
    for title in ("Restarts", "Rewinds", "Alarms", "Rejected checkpoints"):
        assert f"<h2>{title}</h2>" in page
    assert "Rewinds skipped 64 sequences" in page
    row = re.search(r"<td>goodput</td><td class=number>([\d.]+)</td>", page)
    assert row
    assert float(row[1]) == pytest.approx(80 / 96, abs=1e-3)


def test_lines_that_hold_little() -> None:
    page = render([{"step": 0, "loss": 3.0}, {"step": 1, "loss": math.nan}], EVENTS[:1], {})
    assert tags(page).count("svg") == 1


def test_the_manifest_has_the_last_word() -> None:
    page = render(lines_of(10), [], {"tokens_per_second": 123})
    assert "<td>tokens_per_second</td><td class=number>123</td>" in page


def test_bins_keep_the_mean_and_the_peak() -> None:
    lines = [{"step": step, "grad_norm": 50.0 if step == 4321 else 1.0} for step in range(10_000)]
    steps, means = binned(lines, Curve("grad_norm", "", ""))
    assert len(steps) == MAX_BINS
    assert means.mean() == pytest.approx(1.0049)
    assert binned(lines, Curve("grad_norm", "", "", reduce=np.max))[1].max() == 50


@pytest.mark.slow
def test_a_long_run_makes_a_small_page() -> None:
    assert len(render(lines_of(100_000), EVENTS, {}).encode()) < 1_000_000
