"""AWQ by llm-compressor beside AutoAWQ: the same model, calibration windows, rounding and held-out text.

Each run is a process of its own with the backend's overlay; what is timed is the search and the rounding, not the
loading, in CPU seconds of all its threads. Models: SmolLM2-135M by default, or any folders with a `model` and a
`corpus` artifact in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from competitors import random_models, smollm2

from app import overlays
from app.cluster import KEEP_FREED_MEMORY
from app.quantization.config import QuantizeConfig
from app.quantization.stage import OVERLAYS

ROOT = Path(__file__).resolve().parent.parent
WINDOW_TOKENS, HELD_OUT_DOCUMENTS = 512, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", nargs="*", type=Path, help="each with a model and a corpus; none: SmolLM2")
    parser.add_argument("--group_sizes", nargs="+", type=int, default=[64, 32])
    parser.add_argument("--runs", type=int, default=3, help="rounds; medians are printed")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW_TOKENS} tokens to calibrate with")
    parser.add_argument("--rounding", choices=["gptq", "nearest"], default="gptq", help="of the scaled weights")
    parser.add_argument("--child", nargs=3, metavar=("BACKEND", "FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        backend, folder, settings = options.child
        print(json.dumps(measure(Path(folder), QuantizeConfig(backend=backend, **json.loads(settings)))))
        return
    print(random_models.machine())
    print(f"calibration: {options.windows} windows of at most {WINDOW_TOKENS} tokens; rounding: {options.rounding}")
    print(f"medians of {options.runs} runs")
    ratios = []
    for folder in options.folders or [smollm2.make()]:
        for size in options.group_sizes:
            settings = {"group_size": size, "rounding": options.rounding, "num_calibration_samples": options.windows}
            found = compare(folder, settings, options.runs)
            ratios.append(f"{folder.name}, groups of {size}: {found:.2f}")
    print("\n".join(f"calibration, AutoAWQ's time / llm-compressor's, {ratio}" for ratio in ratios))


def compare(folder: Path, settings: dict[str, Any], runs: int) -> float:
    """Both backends in turns; prints their lines, and gives the ratio of their times."""
    seconds = defaultdict(list)
    figures = {}
    for _ in range(runs):
        for backend in OVERLAYS:
            figures[backend] = run(backend, folder, settings)
            seconds[backend].append(figures[backend].pop("seconds"))
    for backend, times in seconds.items():
        told = ", ".join(f"{name} {value}" for name, value in figures[backend].items())
        what = f"{folder.name}, groups of {settings['group_size']}, {backend:15}"
        print(f"{what}{statistics.median(times):7.1f} CPU s  {told}", flush=True)
    return statistics.median(seconds["autoawq"]) / statistics.median(seconds["llm-compressor"])


def run(backend: str, folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """One process; its figures."""
    path = overlays.python_path(OVERLAYS[backend], backend)
    quiet = {"TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join([path, str(ROOT)])}
    environment = os.environ | quiet | KEEP_FREED_MEMORY
    command = [sys.executable, __file__, "--child", backend, str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{backend} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(folder: Path, config: QuantizeConfig) -> dict[str, float]:
    """Quantize in this process."""
    from app.documents import sample_texts
    from app.models import encode, load_model, load_tokenizer
    from app.quantization import autoawq, awq
    from app.quantization.comparison import bits_per_byte

    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    held_out = sample_texts(str(folder / "corpus"), "held_out", HELD_OUT_DOCUMENTS)
    documents = encode(tokenizer, sample_texts(str(folder / "corpus"), "train", 20_000))
    tokens = min(WINDOW_TOKENS, model.config.max_position_embeddings)
    windows = awq.choose_windows(documents, config.num_calibration_samples, tokens, seed=0)
    before = bits_per_byte(model, tokenizer, held_out)
    began = time.process_time()
    if config.backend == "autoawq":
        autoawq.search(model, windows, config)
        awq.round_weights(model, windows, config)
    else:
        awq.quantize(model, windows, config)
    seconds = time.process_time() - began
    after = bits_per_byte(model, tokenizer, held_out)
    with tempfile.TemporaryDirectory() as saved:
        awq.save(model, Path(saved))
        percent = awq.linear_sizes(Path(saved))["linear_percent"]
    loss = round(100 * (after / before - 1), 2)
    return {"seconds": seconds, "bits_per_byte": round(after, 4), "loss_percent": loss, "linear_percent": percent}


if __name__ == "__main__":
    main()
