"""Runs several tools on the same corpus in turn and prints medians, rates per core and ratios.

Rounds are interleaved (ours, theirs, ours, ...), so that a slow minute of the machine hits all of them; each run is a
process of its own. It makes no claim about quality: see quality.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from competitors import environments

ROOT = Path(__file__).resolve().parents[2]
OURS = "zero-to-one"


class Tool(NamedTuple):
    """A program to measure, and how many times as fast ours is meant to be; 0 where nothing is claimed."""

    environment: str
    script: str
    options: tuple[str, ...] = ()
    aim: float = 0


def arguments(description: str | None, num_documents: int, runs: int) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--raw", type=Path, default=ROOT / "runs/demo/raw", help="the demo's raw jsonl (make demo)")
    parser.add_argument("--folder", type=Path, default=environments.CACHE / "work", help="corpus and outputs")
    parser.add_argument("--documents", type=int, default=num_documents)
    parser.add_argument("--runs", type=int, default=runs, help="rounds; medians are printed")
    parser.add_argument("--workers", type=int, default=2, help="processes, or CPUs of Ray, of each tool")
    parser.add_argument("--only", nargs="*", default=[], metavar="TOOL", help="run these alone")
    parser.add_argument("--all", action="store_true", help="also the slower settings that nothing is claimed against")
    return parser.parse_args()


def chosen(tools: Mapping[str, Tool], given: argparse.Namespace) -> dict[str, Tool]:
    """The tools that the command line asks for. Raises ValueError when the raw texts are missing."""
    if not list(given.raw.glob("*.jsonl")):
        raise ValueError(f"--raw: no jsonl files in {given.raw}: run `make demo`, or jobs/fetch_demo_corpus.py alone")
    if given.only:
        return {name: tool for name, tool in tools.items() if name in given.only}
    return {name: tool for name, tool in tools.items() if name == OURS or tool.aim or given.all}


def run(name: str, tool: Tool, documents: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One run of one tool; its answer, see report.py."""
    python = Path(sys.executable) if name == OURS else environments.python_of(tool.environment)
    output = given.folder / "output" / name.replace(" ", "-").replace(",", "")
    return environments.run(python, tool.script, documents, output, "--workers", str(given.workers), *tool.options)


def compare(tools: Mapping[str, Tool], documents: Path, given: argparse.Namespace) -> None:
    """Run every tool `--runs` times, print a table of medians and then the ratios."""
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for round_number in range(given.runs):
        for name, tool in tools.items():
            answers[name].append(run(name, tool, documents, given))
            seconds = answers[name][-1]["seconds"]
            print(f"  round {round_number + 1}: {name} {seconds:.1f} s", file=sys.stderr, flush=True)
    print(
        f"{given.documents:,} documents, {given.workers} processes of {os.cpu_count()} cores, medians of {given.runs}"
    )
    print(f"{'':34}   seconds   with start   documents/s/core      kept")
    for name, runs in answers.items():
        seconds, with_start = (_median(runs, key) for key in ("seconds", "seconds_with_start"))
        rate = given.documents / seconds / given.workers
        print(f"{name:34} {seconds:9.1f} {with_start:12.1f} {rate:18.0f} {runs[-1]['documents_out']:9,}")
    for name, tool in tools.items():
        if name != OURS and OURS in tools:
            ratio, with_start = (
                _median(answers[name], key) / _median(answers[OURS], key) for key in ("seconds", "seconds_with_start")
            )
            aim = f", aim {tool.aim:g}" if tool.aim else ""
            print(f"{name} / {OURS}: {ratio:.2f} ({with_start:.2f} with start{aim})")


def _median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(answer[key] for answer in runs)
