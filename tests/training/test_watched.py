"""Every figure of a run is in W&B's offline files, on Ray's metrics endpoint and in the report."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from app.cluster import LocalCluster
from app.training import stage
from app.training.config import TrainConfig
from app.training.telemetry import METRIC_PREFIX
from tests.training.tiny import config_of, log_of, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
FIGURES = {
    "loss", "grad_norm", "learning_rate", "tokens_per_second", "tokens_per_second_per_worker", "mfu", "step_seconds",
    "data_seconds", "forward_backward_seconds", "communication_seconds", "optimizer_seconds", "checkpoint_seconds",
    "evaluation_seconds", "communication_share", "rank_spread", "memory_bytes", "held_out_bits_per_byte",
}  # fmt: skip

IN_REPORT = [
    "loss", "held_out", "learning rate", "gradient norm", "tokens_per_second", "mfu", "communication_share", "goodput",
    "forward", "optimizer", "checkpoint", "evaluation", "memory", "rank",
]  # fmt: skip
RARE = {"held_out_bits_per_byte"}


@contextmanager
def scraping() -> Iterator[set[str]]:
    """Names on the metrics endpoint of this node, collected until the block ends; a dead worker's gauges vanish."""
    port = ray.nodes()[0]["MetricsExportPort"]
    found: set[str] = set()
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(1.0):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            found.update(line.split("{")[0] for line in lines if line.startswith(f"ray_{METRIC_PREFIX}"))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def test_every_figure_is_everywhere(cluster: LocalCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    changes = {"num_steps": 200, "wandb_mode": "offline", "evaluation_interval_steps": 20}
    with scraping() as on_endpoint:
        stage.run(TrainConfig.model_validate(config_of(tmp_path, tmp_path, **changes)))
    in_log = {name for line in log_of(tmp_path) for name in line}
    assert in_log >= FIGURES
    (file,) = (tmp_path / "checkpoints").glob("wandb/offline-run-*/*.wandb")
    recorded = file.read_bytes()  # names are there in plain
    assert {name: recorded.count(name.encode()) >= 200 for name in FIGURES - RARE} == dict.fromkeys(
        FIGURES - RARE, True
    )
    assert {name: recorded.count(name.encode()) >= 10 for name in RARE} == dict.fromkeys(RARE, True)
    wanted = FIGURES | {"step", "goodput", "restarts", "rewinds", "rank_busy_seconds", "rank_memory_bytes"}
    assert on_endpoint >= {f"ray_{METRIC_PREFIX}{name}" for name in wanted}
    page = (tmp_path / "checkpoints" / "report.html").read_text()
    for words in IN_REPORT:
        assert words in page.lower(), words
    assert json.loads((tmp_path / "checkpoints" / "run.json").read_text())["name"]
