import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from app.training import telemetry
from app.training.config import AlarmConfig, TrainConfig
from app.training.journal import Journal, add_event, read_events
from app.training.telemetry import METRIC_PREFIX, METRICS, RANK_METRICS, Telemetry

CONFIG = TrainConfig(num_steps=4, wandb_mode="disabled", alarms=AlarmConfig(window_steps=1))
DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/training.json"


NAME = "20261124-0123"


class FakeGauge:
    """Remembers the last value by name and tags, as a gauge does."""

    shown: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self._tag_keys
        self.shown[self._name.removeprefix(METRIC_PREFIX), *tags.values()] = value


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    monkeypatch.setattr(telemetry, "Gauge", FakeGauge)
    FakeGauge.shown = {}
    return FakeGauge.shown


def speaker(run_uri: Path, first_step: int = 0) -> tuple[Telemetry, Journal]:
    journal = Journal(str(run_uri), first_step)
    return Telemetry(CONFIG, str(run_uri), NAME, journal, first_step), journal


def test_a_step_is_a_line_and_a_gauge(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    speaks, journal = speaker(tmp_path / "run")
    by_rank = {"memory_bytes": [1.0, 2.0], "gpu_utilization": [math.nan, 0.5]}
    speaks.record(0, {"loss": 3.0, "rows": "00ff", "step_seconds": 0.5}, by_rank)
    assert journal.lines() == [{"step": 0, "loss": 3.0, "rows": "00ff", "step_seconds": 0.5}]
    assert shown["loss", NAME] == 3.0
    assert shown["step", NAME] == 1
    assert shown["rank_memory_bytes", NAME, "1"] == 2.0
    assert ("rank_gpu_utilization", NAME, "0") not in shown
    assert ("rows", NAME) not in shown


def test_the_heartbeat_says_how_far_the_run_is(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    speaks, _ = speaker(tmp_path)
    for step in range(4):
        speaks.record(step, {"loss": 3.0})
    alive = json.loads((tmp_path / telemetry.HEARTBEAT).read_text())
    assert alive["step"] == 3
    assert alive["time"] > 1e9


def test_the_other_ranks_are_silent(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    silent = Telemetry(CONFIG, str(tmp_path), NAME, None, 0)
    silent.record(0, {"loss": 3.0, "grad_norm": 1e9})
    silent.finish()
    assert not shown
    assert not list(tmp_path.rglob("*"))


def test_an_alarm_is_an_event_and_a_warning(
    tmp_path: Path, shown: dict[tuple[str, ...], float], caplog: pytest.LogCaptureFixture
) -> None:
    speaks, _ = speaker(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            speaks.record(step, {"grad_norm": 500.0})
    assert [event["step"] for event in read_events(str(tmp_path), "first_step")] == [0]
    (alarm,) = read_events(str(tmp_path), "alarm")
    assert {name: alarm[name] for name in ("kind", "step", "name", "value", "level")} == {
        "kind": "alarm",
        "step": 0,
        "name": "grad_norm",
        "value": 500.0,
        "level": 100.0,
    }
    assert "step 0: grad_norm 500 is above 100" in caplog.text


def test_goodput_counts_a_step_once_however_often_it_was_done(
    tmp_path: Path, shown: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry.time, "time", lambda: 1000.0)
    prepared = {"import_seconds": 0, "setup_seconds": 0, "load_seconds": 0}
    add_event(str(tmp_path), "started", step=0, world_size=2, reached=-1, last_alive=0, **prepared)
    add_event(str(tmp_path), "rewound", to_step=1, at_step=2, reason="loss is nan")
    monkeypatch.setattr(telemetry.time, "time", lambda: 1100.0)
    speaks, _ = speaker(tmp_path)
    for step in (0, 1, 2, 1, 2, 3):
        speaks.record(step, {"step_seconds": 10.0})
    assert (shown["goodput", NAME], shown["rewinds", NAME]) == (0.4, 1)
    assert shown["restarts", NAME] == 0


def test_a_resumed_run_counts_the_steps_before(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    first, journal = speaker(tmp_path)
    for step in range(2):
        first.record(step, {"step_seconds": 10.0})
    journal.flush()
    resumed, _ = speaker(tmp_path, first_step=2)
    resumed.record(2, {"step_seconds": 10.0})
    assert sum(resumed._step_seconds) == 30.0


def test_ray_takes_the_gauges(tmp_path: Path) -> None:
    speaks, _ = speaker(tmp_path)
    everything: dict[str, float | str] = dict.fromkeys(METRICS, 1.0)
    speaks.record(0, everything, {name: [1.0, 2.0] for name in RANK_METRICS})
    assert len(speaks._gauges._made) == len(METRICS) + len(RANK_METRICS)


@pytest.mark.slow
def test_a_wandb_run_is_named_by_the_run_and_may_go_back(
    tmp_path: Path, shown: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"wandb_mode": "offline"})
    for first_step in (0, 1):
        speaks = Telemetry(config, str(tmp_path), NAME, Journal(str(tmp_path), 0), first_step)
        for step in (0, 1, 0):
            speaks.record(step, {"loss": 3.0, "rows": "00"})
        speaks.finish()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{NAME}.wandb"}


def test_the_dashboard_shows_all_metrics_and_no_others() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = [re.findall(r"\b\w+(?=\{)", expression) for expression in expressions]
    assert all(len(names) == 1 for names in named)
    exported = {f"ray_{METRIC_PREFIX}{name}" for name in (*METRICS, *(f"rank_{name}" for name in RANK_METRICS))}
    assert {names[0] for names in named} == exported
    assert all('{run=~"$run"}' in expression for expression in expressions)


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
