"""What the gateway measures of a request: names, kinds and tags of its metrics, and their values from an audit record.

The gateway holds Ray's instruments of these; deploy/grafana/serving.json shows them, beside vLLM's own (queue, batch
size, KV use). Tags are key and model names and paths, never what a client may invent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from app.serving.audit import AuditRecord
from app.serving.pipeline import OPERATIONS

PREFIX = "zero_to_one_serving_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 15.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.3, 2.6)


class Metric(NamedTuple):
    """One metric; `boundaries` are a histogram's."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


METRICS = {
    "requests": Metric("counter", "requests answered", ("key", "path", "status")),
    "rate_limited": Metric("counter", "requests refused with 429", ("key",)),
    "tokens": Metric("counter", "tokens of prompts and of answers", ("key", "model", "side")),
    "filter_verdicts": Metric("counter", "requests and answers masked or blocked", ("key", "side", "action")),
    "request_seconds": Metric("histogram", "from the request to the end of its answer", ("path",), SECONDS),
    "time_to_first_token_seconds": Metric("histogram", "to the first token, streams only", ("model",), SECONDS),
    "time_per_output_token_seconds": Metric("histogram", "after the first, streams only", ("model",), TOKEN_SECONDS),
    "door_running": Metric("gauge", "requests handed to the engine by this replica", ()),
    "door_waiting": Metric("gauge", "requests that wait for their turn at this replica", ()),
    "audit_lost": Metric("gauge", "audit records lost by this replica", ()),
}

Measurement = tuple[str, float, dict[str, str]]


def measure(record: AuditRecord) -> Iterator[Measurement]:
    """Name, value and tags of what one request adds."""
    key, model = record.key_name or "", record.model or ""
    path = record.path if record.path in OPERATIONS or record.path == "/v1/models" else "other"
    yield "requests", 1, {"key": key, "path": path, "status": str(record.status)}
    yield "request_seconds", record.latency_seconds, {"path": path}
    if record.status == 429:
        yield "rate_limited", 1, {"key": key}
    for side, count in (("prompt", record.prompt_tokens), ("answer", record.completion_tokens)):
        if count:
            yield "tokens", count, {"key": key, "model": model, "side": side}
    for verdict in record.verdicts:
        yield "filter_verdicts", 1, {"key": key, "side": verdict["side"], "action": verdict["action"]}
    first = record.time_to_first_token_seconds
    if first is not None and record.completion_tokens:
        yield "time_to_first_token_seconds", first, {"model": model}
        rest = record.latency_seconds - first
        if record.completion_tokens > 1 and rest > 0:
            yield "time_per_output_token_seconds", rest / (record.completion_tokens - 1), {"model": model}
