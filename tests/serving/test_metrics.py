"""What a request adds to the metrics, and that the dashboard shows what there is."""

import json
import re
from pathlib import Path
from typing import Any

from app.serving.audit import AuditRecord
from app.serving.metrics import METRICS, PREFIX, measure

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/serving.json"
ENGINES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}  # vLLM's, seen at its endpoint


def measured(**fields: Any) -> dict[str, list[tuple[float, dict[str, str]]]]:
    known = {"key_name": "alice", "path": "/v1/completions", "status": 200, "latency_seconds": 1.5, "model": "m"}
    found: dict[str, list[tuple[float, dict[str, str]]]] = {}
    for name, value, tags in measure(AuditRecord(request_id="r", **known | fields)):
        assert tuple(tags) == METRICS[name].tags
        found.setdefault(name, []).append((value, tags))
    return found


def test_a_stream_has_all_times() -> None:
    found = measured(prompt_tokens=3, completion_tokens=11, time_to_first_token_seconds=0.5)
    assert found["time_to_first_token_seconds"] == [(0.5, {"model": "m"})]
    assert found["time_per_output_token_seconds"] == [(0.1, {"model": "m"})]
    assert [value for value, _ in found["tokens"]] == [3, 11]
    assert found["requests"] == [(1, {"key": "alice", "path": "/v1/completions", "status": "200"})]


def test_a_refused_request_has_no_tokens() -> None:
    found = measured(status=429)
    assert found["rate_limited"] == [(1, {"key": "alice"})]
    assert set(found) == {"requests", "request_seconds", "rate_limited"}


def test_each_verdict_counts_for_its_key() -> None:
    verdicts = [{"side": "input", "action": "mask"}, {"side": "output", "action": "block"}]
    tags = [tags for _, tags in measured(verdicts=verdicts)["filter_verdicts"]]
    assert tags == [{"key": "alice", **verdict} for verdict in verdicts]


def test_a_client_cannot_invent_tags() -> None:
    assert measured(path="/v1/" + "x" * 99)["requests"][0][1]["path"] == "other"


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = {name for expression in expressions for name in re.findall(r"\b\w+(?=\{)", expression)}
    ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    ours = {f"ray_{PREFIX}{name}{ending[metric.kind]}" for name, metric in METRICS.items()}
    assert named == ours | {f"ray_vllm_{name}" for name in ENGINES}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
