"""What every measured program says at its end: one JSON line, and the ids it kept as a file beside its output.

`seconds` is the pipeline alone, `seconds_with_start` counts from the birth of the process: imports, and the start of
Ray where there is one. Counting documents is part of neither. Standard library only: it runs in every environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

BEGAN = "BENCHMARK_BEGAN"  # time.time() when the process was started


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every program takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("documents", type=Path, help="folder of jsonl files with id and text")
    arguments.add_argument("output", type=Path, help="folder for everything it writes")
    arguments.add_argument("--workers", type=int, default=2, help="processes, or CPUs of its Ray")
    return arguments


def measure(run: Callable[[], object], documents: Path, output: Path, kept_ids: Callable[[], Iterable[str]]) -> None:
    """Time `run`, then count and print the JSON line."""
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    seconds_with_start = time.time() - float(os.environ[BEGAN]) if BEGAN in os.environ else seconds
    kept = list(kept_ids())
    path = output / "kept_ids.txt"
    path.write_text("".join(f"{identity}\n" for identity in kept))
    num_in = sum(file.read_bytes().count(b"\n") for file in documents.glob("*.jsonl"))
    answer = {"seconds": seconds, "seconds_with_start": seconds_with_start}
    answer |= {"documents_in": num_in, "documents_out": len(kept), "kept_ids": str(path)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def ids_in_jsonl(folder: Path) -> list[str]:
    """The ids of all documents in a folder of jsonl files."""
    files = sorted(folder.glob("*.json*"))
    return [json.loads(line)["id"] for file in files for line in file.open(encoding="utf-8")]
