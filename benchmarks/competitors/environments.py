"""Competitors in their own virtual environments: made on first use, pinned, from PyPI only; and how to run one.

A competitor's script prints one JSON line with seconds and counts, last, and writes the ids it kept to a file.
Nothing is downloaded at run time, and nothing of this reaches the project's own environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from competitors import report

CACHE = Path.home() / ".cache" / "zero-to-one-benchmarks"
SCRIPTS = Path(__file__).resolve().parent
PINS = {
    "datatrove": (
        "datatrove==0.10.1",
        "orjson==3.13.0",
        "xxhash==3.8.2",  # datatrove[processing] asks for < 4
        "ftfy==6.3.1",
        "regex==2026.11.19",
        "numpy==2.4.6",
        "tokenizers==0.23.3",  # imported by its filters package
        "spacy==3.8.18",  # with jieba: datatrove's own words for Chinese, see --words
        "jieba==0.42.1",
    ),
    "data-juicer": ("py-data-juicer==1.6.1", "ray[default]==2.60.0", "ftfy==6.3.1", "numpy==2.4.6", "pandas==3.1.1"),
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PIP_NO_INDEX": "1",
    "UV_OFFLINE": "1",
}


def python_of(name: str) -> Path:
    """The interpreter of a competitor's environment, which is made when it is missing or its pins have changed."""
    folder, pins = CACHE / name, PINS[name]
    mark = folder / f"ready-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:10]}"
    if not mark.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *pins], check=True)
        mark.touch()
    return folder / "bin" / "python"


def run(python: Path, script: str, documents: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run a script of this folder on a folder of jsonl; its JSON line (see report.py).

    Raises RuntimeError with the end of its log when it fails.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [str(python), str(SCRIPTS / script), str(documents), str(output), *options]
    log = output / "log.txt"
    environment = os.environ | OFFLINE | {report.BEGAN: str(time.time())}
    with log.open("w") as errors:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    if process.returncode:
        raise RuntimeError(f"{script} failed ({process.returncode}); {log} ends:\n{log.read_text()[-3000:]}")
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"seconds"')]  # some tools talk on
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
