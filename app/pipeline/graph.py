"""The lineage as a picture: an artifact is a box, an arrow goes from what it was made of, in generations from the top.

Arrows to the next generation are drawn straight; those that pass over one run down a lane of their own at the left, so
that none crosses a box. Raw files are one box for each artifact that was made from them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from app.artifacts import Manifest

WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, LANE = 640, 168, 48, 44, 16  # units of the picture
COLORS = ("#2f6f9f", "#c2570c", "#5a9367", "#8e6bab", "#b3261e", "#7b8794")


@dataclass
class Box:
    """An artifact, or raw files; `sources` are the keys of what it was made from."""

    title: str
    note: str
    sources: list[str] = field(default_factory=list)


def boxes_of(manifests: Iterable[Manifest]) -> dict[str, Box]:
    """Digest -> box of the artifacts, and of the raw files that the first of them came from."""
    made = {manifest.digest: manifest for manifest in manifests}
    boxes: dict[str, Box] = {}
    for digest, manifest in made.items():
        known = [given.digest for given in manifest.inputs.values() if given.digest in made]
        raw = len(manifest.inputs) - len(known)
        if raw:
            boxes[f"raw {digest}"] = Box(f"{raw} raw file{'s' if raw > 1 else ''}", "by name, size and time")
            known.append(f"raw {digest}")
        name = manifest.uri.rstrip("/").rsplit("/", 1)[-1]
        boxes[digest] = Box(name, f"{manifest.kind} {digest[:12]}", known)
    return boxes


def generations(boxes: Mapping[str, Box]) -> list[list[str]]:
    """The keys by the longest way from what has no source."""
    depth: dict[str, int] = {}

    def measure(key: str) -> int:
        if key not in depth:
            depth[key] = 1 + max(map(measure, boxes[key].sources), default=-1)
        return depth[key]

    rows: list[list[str]] = []
    for key in boxes:
        rows += [[] for _ in range(measure(key) + 1 - len(rows))]
        rows[measure(key)].append(key)
    return rows


def draw(boxes: Mapping[str, Box]) -> str:
    """Inline SVG; "" without boxes."""
    rows = generations(boxes)
    if not rows:
        return ""
    level = {key: row for row, keys in enumerate(rows) for key in keys}
    skipping = [source for source in level if any(level[key] > level[source] + 1 for key in _users(boxes, source))]
    left = LANE * (len(skipping) + 1)
    place = {
        key: (left + (WIDTH - left) * (2 * column + 1) // (2 * len(keys)), row * (BOX_HEIGHT + GAP))
        for row, keys in enumerate(rows)
        for column, key in enumerate(keys)
    }
    parts = [_arrows(boxes, source, place, skipping) for source in boxes]
    parts += [_box(box, *place[key]) for key, box in boxes.items()]
    height = len(rows) * (BOX_HEIGHT + GAP)
    start = (
        f"<svg viewBox='0 -4 {WIDTH} {height}' font-family='system-ui, sans-serif' role='img' aria-label='lineage'>"
        "<defs><marker id='head' viewBox='0 0 6 6' refX='6' refY='3' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 6 3 0 6' fill='context-stroke'/></marker></defs>"
    )
    return f"{start}{''.join(parts)}</svg>"


def _users(boxes: Mapping[str, Box], source: str) -> list[str]:
    return [key for key, box in boxes.items() if source in box.sources]


def _arrows(
    boxes: Mapping[str, Box], source: str, place: Mapping[str, tuple[int, int]], skipping: Sequence[str]
) -> str:
    x, y = place[source]
    number = skipping.index(source) if source in skipping else 0
    color = COLORS[number % len(COLORS)] if source in skipping else COLORS[-1]
    lane = LANE * number + LANE // 2
    paths = []
    for user in _users(boxes, source):
        to_x, to_y = place[user]
        if to_y - y == BOX_HEIGHT + GAP:
            paths.append(f"M{x} {y + BOX_HEIGHT}L{to_x} {to_y}")
            continue
        across, enter = to_y - 8 - 5 * number, to_x - BOX_WIDTH // 2 + 14 + 12 * number
        begin = x - BOX_WIDTH // 2 + 14
        paths.append(f"M{begin} {y + BOX_HEIGHT}v{8 + 3 * number}H{lane}V{across}H{enter}V{to_y}")
    lines = "".join(f"<path d='{path}' marker-end='url(#head)'/>" for path in paths)
    return f"<g fill='none' stroke='{color}' stroke-width='1.5'>{lines}</g>"


def _box(box: Box, x: int, y: int) -> str:
    title, note = html.escape(box.title), html.escape(box.note)
    return (
        f"<rect x='{x - BOX_WIDTH // 2}' y='{y}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='6' fill='#f5f7fa' "
        f"stroke='#9aa5b1'/><text x='{x}' y='{y + 20}' font-size='14' text-anchor='middle'>{title}</text>"
        f"<text x='{x}' y='{y + 37}' font-size='10' fill='#627d98' text-anchor='middle'>{note}</text>"
    )
