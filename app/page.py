"""What every report page shares: the frame, the style, tables, bars, and pictures as inline SVG.

A page is one file without scripts that loads nothing from elsewhere, readable on a phone. It knows no report: each
stage says what its page holds. `body_of` gives that back, so that one page can take in another.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
div { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .35rem .6rem .35rem 0; vertical-align: top; border-bottom: 1px solid #e4e7eb; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small, th small { display: block; color: #627d98; line-height: 1.35; font-weight: normal; }
.bar { width: 40%; } .bar i { display: block; height: .8rem; margin-top: .4rem; background: #2f6f9f; }
.bar i.after { background: #5a9367; } .bar i.rejected { background: #c2570c; }
svg { width: 100%; min-width: 30rem; height: auto; }
.note { color: #627d98; font-size: .85rem; overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
mark { background: #e3f2e6; } mark.failed { background: #fbe3d6; }
.warning { border-left: 4px solid #c2570c; padding-left: .8rem; }
details { margin: .4rem 0; } summary { cursor: pointer; }
section { border-top: 3px solid #e4e7eb; margin-top: 2.5rem; }
"""
BODY, END = "<body>", "</body>"
Bar = tuple[str, float, str, str]  # label, value for the bar, value as text, class of the bar


def page(title: str, parts: Iterable[str], language: str = "en") -> str:
    """The whole page; `parts` are HTML."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    head += f"<style>{STYLE}</style>"
    return f"<!doctype html><html lang={language}><head>{head}</head>{BODY}{''.join(parts)}{END}</html>"


def body_of(made: str) -> str:
    """The parts of a page that `page` made."""
    return made[made.index(BODY) + len(BODY) : made.rindex(END)]


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table, everything escaped; numbers to the right."""
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<div><table><tr>{head}</tr>{body}</table></div>"


def _cell(value: Any) -> str:
    attribute = " class=number" if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{attribute}>{html.escape(shown(value))}</td>"


def shown(value: Any) -> str:
    """Whole numbers in groups of three, others to four digits.

    >>> shown(1234567), shown(0.123456), shown(81234.5), shown(None), shown("a")
    ('1,234,567', '0.1235', '81,234', '', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def bars(rows: Iterable[Bar]) -> str:
    """A table with a bar in each row, the longest for the largest value."""
    rows = list(rows)
    largest = max((value for _, value, _, _ in rows), default=0) or 1
    lines = (
        f"<tr><td>{html.escape(label)}<td class=number>{text}<td class=bar>"
        f"<i class='{kind}' style='width:{100 * value / largest:.1f}%'></i>"
        for label, value, text, kind in rows
    )
    return f"<table>{''.join(lines)}</table>"


def svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG, the same for the same figure."""
    import matplotlib

    picture = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zero-to-one", "font.family": "sans-serif"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()[picture.getvalue().index("<svg") :]
