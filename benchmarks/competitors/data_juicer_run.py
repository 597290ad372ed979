"""Data-Juicer in Ray mode: run a list of its operators on a folder of jsonl. Runs in Data-Juicer's environment.

Starts a local Ray with as many CPUs as asked for, then its own RayExecutor on a config file, as `dj-process` does.
What is timed is RayExecutor.run, from reading to writing. It lists no operators: see data_juicer_*.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import report
import yaml
from data_juicer.config import init_configs
from data_juicer.core.executor.ray_executor import RayExecutor


def main(description: str | None, process: list[dict[str, Any]]) -> None:
    """Parse DOCUMENTS OUTPUT [--workers N], start Ray, run the operators, print the JSON line."""
    given = report.parser(description).parse_args()
    # "local": never join a cluster that happens to run here
    ray.init("local", num_cpus=given.workers, include_dashboard=False, logging_level="error")
    config = write_config(given.documents, given.output, process)
    executor = RayExecutor(init_configs(["--config", str(config)]))
    report.measure(
        lambda: executor.run(skip_return=True),
        given.documents,
        given.output,
        lambda: report.ids_in_jsonl(given.output / "kept"),
    )


def write_config(documents: Path, output: Path, process: list[dict[str, Any]]) -> Path:
    """The YAML that `dj-process --config` would take."""
    config = {
        "project_name": "zero-to-one-benchmark",
        "executor_type": "ray",
        "ray_address": "auto",
        "dataset_path": str(documents),
        "export_path": str(output / "kept"),
        "export_type": "jsonl",
        "work_dir": str(output / "work"),
        "keep_stats_in_res_ds": False,
        "open_tracer": False,
        "event_logging": {"enabled": False},
        "process": process,
    }
    path = output / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return path
