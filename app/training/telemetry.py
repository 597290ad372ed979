"""What a run says of itself while it trains: journal, W&B, Ray metrics, alarms, heartbeat, a progress line.

One rank speaks; on the others every call returns at once. Ray exports the gauges to Prometheus, deploy/grafana shows
them. It does not measure (meters.py), nor stop a run (alarms.py's detector does, through the loop).
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from app import storage
from app.training.alarms import Alarms
from app.training.config import TrainConfig
from app.training.goodput import account
from app.training.journal import HEARTBEAT, Journal, add_event, read_events

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0
LEDGER_SECONDS = 30.0
HEARTBEAT_SECONDS = {True: 10.0, False: 1.0}  # by whether the run's folder is remote, where a write takes a while
METRIC_PREFIX = "zero_to_one_training_"
METRICS = {
    "step": "steps done",
    "loss": "training loss, nats per token",
    "grad_norm": "global gradient norm before clipping",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens trained on, over all workers",
    "tokens_per_second_per_worker": "tokens trained on, by one worker",
    "mfu": "model FLOPs over the peak FLOPs of the devices",
    "step_seconds": "time of a step",
    "data_seconds": "time of a step spent on reading data",
    "forward_backward_seconds": "time of a step spent in the forward and backward pass",
    "communication_seconds": "time of a step spent in communication that nothing hides",
    "optimizer_seconds": "time of a step spent in the optimizer",
    "checkpoint_seconds": "time of a step spent on a checkpoint",
    "evaluation_seconds": "time of a step spent on held-out evaluation",
    "communication_share": "communication over the step's time",
    "bubble_share": "planned share of a step that a pipeline's stage waits for the others",
    "rank_spread": "busy time of the slowest rank less the fastest's, over the step's time",
    "memory_bytes": "memory of the rank that has most",
    "gpu_utilization": "share of time that the GPUs ran a kernel, mean over ranks",
    "gpu_power_watts": "power of a GPU, mean over ranks",
    "world_size": "workers",
    "data_step": "position in the data; it runs ahead of the step after a rewind",
    "held_out_bits_per_byte": "held-out cross-entropy, bits per byte",
    "preference_accuracy": "share of the pairs whose chosen answer gained more than the rejected one",
    "reward_margin": "implicit reward of the chosen answer less the rejected one's, mean over pairs",
    "held_out_preference_loss": "preference loss on held-out pairs",
    "held_out_preference_accuracy": "share of held-out pairs that are told right",
    "held_out_reward_margin": "reward margin on held-out pairs",
    "replay_bits_per_byte": "held-out cross-entropy of the replayed corpus, bits per byte",
    "balance_loss": "loss that evens out the load of the experts, before its coefficient",
    "expert_load_max": "tokens of the busiest expert over the mean, in the worst layer",
    "expert_load_min": "tokens of the idlest expert over the mean, in the worst layer",
    "expert_load_entropy": "entropy of the experts' load over the most that it can be, mean over layers",
    "router_bias_max": "largest bias of a router that evens out the load of its experts, in absolute value",
    "restarts": "attempts after the first",
    "rewinds": "times that the run went back for a bad loss",
    "goodput": "time of the surviving steps over all time since the first attempt began",
}
RANK_METRICS = {
    "busy_seconds": "time of a step that a rank did not spend in communication",
    "memory_bytes": "memory of a rank",
    "gpu_utilization": "share of time that a rank's GPU ran a kernel",
    "gpu_power_watts": "power of a rank's GPU",
}


class Telemetry:
    """Takes each finished step. `journal` holds the lines before `first_step`; a rank without one is silent."""

    def __init__(
        self, config: TrainConfig, run_uri: str, run_name: str, journal: Journal | None, first_step: int
    ) -> None:
        self._config, self._run_uri, self._journal = config, run_uri, journal
        self._is_first = True
        if journal is None:
            return
        self._step_seconds = [float(line.get("step_seconds", 0.0)) for line in journal.lines()[:first_step]]
        self._alarms = Alarms(config.alarms)
        self._gauges = _Gauges(run_name)
        self._beats, self._accounts = _Every(HEARTBEAT_SECONDS["://" in run_uri]), _Every(LEDGER_SECONDS)
        self._progress = _Progress(config.num_steps)
        self._wandb = _WandbRun(config, run_uri, run_name) if config.wandb_mode != "disabled" else None

    def record(
        self, step: int, values: Mapping[str, float | str], by_rank: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Note a finished step; after a rewind it may be one that was noted before. `by_rank` is for metrics only."""
        if self._journal is None:
            return
        if self._is_first:
            add_event(self._run_uri, "first_step", step=step)
            self._is_first = False
        self._journal.append({"step": step, **values})
        del self._step_seconds[step:]
        self._step_seconds.append(float(values.get("step_seconds", 0.0)))
        numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str)}
        if self._wandb:
            self._wandb.log(step, numbers)
        self._gauges.show({"step": step + 1, **numbers}, by_rank or {})
        for alarm in self._alarms.look(step, numbers):
            logger.warning("step %d: %s, median of the last %d", step, alarm, self._config.alarms.window_steps)
            add_event(self._run_uri, "alarm", **asdict(alarm))
        last = step + 1 == self._config.num_steps
        if self._accounts.due(last):
            self._account()
        if self._beats.due(last):
            alive = json.dumps({"step": step, "time": time.time()}).encode()
            storage.write_atomic(f"{self._run_uri}/{HEARTBEAT}", alive)
        self._progress.show(step, numbers)

    def _account(self) -> None:
        ledger = account(read_events(self._run_uri), sum(self._step_seconds), time.time())
        counts = {"restarts": len(ledger.restarts), "rewinds": len(ledger.rewinds), "goodput": ledger.goodput}
        self._gauges.show(counts, {})

    def finish(self) -> None:
        """Close the W&B run and bring its files to the run's storage."""
        if self._journal is not None and self._wandb:
            self._wandb.finish()


class _Every:
    """Says yes at once, and then after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = -math.inf

    def due(self, at_once: bool) -> bool:
        now = time.monotonic()
        if not at_once and now - self._last < self._seconds:
            return False
        self._last = now
        return True


class _Progress:
    """A log line every few seconds: how far, how good, how fast, how long still."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._every = _Every(PROGRESS_SECONDS)
        self._since: tuple[int, float] | None = None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        if not self._every.due(step + 1 == self._num_steps):
            return
        now = time.monotonic()
        before, self._since = self._since, (step, now)
        speed = (step - before[0]) / (now - before[1]) if before and step > before[0] and now > before[1] else 0.0
        logger.info("%s", progress_line(step, self._num_steps, speed, values))


def progress_line(step: int, num_steps: int, steps_per_second: float, values: Mapping[str, float]) -> str:
    """The step and what is known of it, in a few words.

    >>> progress_line(9, 300, 2.0, {"loss": 5.123, "tokens_per_second": 41234.0, "mfu": 0.31})
    'step 10/300  loss 5.123  41,234 tokens/s  MFU 31.0 %  2 steps/s  2 min 25 s left'
    """
    shown = [f"step {step + 1}/{num_steps}"]
    if "loss" in values:
        shown.append(f"loss {values['loss']:.4g}")
    if "held_out_bits_per_byte" in values:
        shown.append(f"held-out {values['held_out_bits_per_byte']:.4g} bits per byte")
    if "tokens_per_second" in values:
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.1%}".replace("%", " %"))
    if steps_per_second:
        minutes, seconds = divmod(round((num_steps - step - 1) / steps_per_second), 60)
        left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
        shown += [f"{steps_per_second:.3g} steps/s", f"{left} left"]
    return "  ".join(shown)


class _Gauges:
    """Ray gauges by name, made when first shown; those of single ranks are named rank_…, so that no sum mixes both."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._made: dict[str, Any] = {}

    def show(self, values: Mapping[str, float], by_rank: Mapping[str, Sequence[float]]) -> None:
        """Set the gauges of what METRICS and RANK_METRICS name."""
        for name, value in values.items():
            if name in METRICS:
                self._gauge(name, METRICS[name], ("run",)).set(float(value), {"run": self._run_name})
        for name, of_ranks in by_rank.items():
            gauge = self._gauge(f"rank_{name}", RANK_METRICS[name], ("run", "rank"))
            for rank, value in enumerate(of_ranks):
                if not math.isnan(value):
                    gauge.set(float(value), {"run": self._run_name, "rank": str(rank)})

    def _gauge(self, name: str, description: str, tags: tuple[str, ...]) -> Any:
        if name not in self._made:
            self._made[name] = Gauge(METRIC_PREFIX + name, description, tags)
        return self._made[name]


class _WandbRun:
    """A W&B run whose files lie in the run's storage: written there directly when it is local.

    Its id is the run's name, so that a restarted run goes on with it. Its horizontal axis is train_step: W&B's
    own step may not go back.
    """

    def __init__(self, config: TrainConfig, run_uri: str, run_name: str) -> None:
        import wandb

        self._uri = f"{run_uri}/wandb"
        self._temporary = tempfile.TemporaryDirectory() if "://" in run_uri else None
        folder = Path(self._temporary.name if self._temporary else run_uri)
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project="zero-to-one",
            id=run_name,
            resume="allow" if config.wandb_mode == "online" else None,  # offline, `wandb sync` joins them by the id
            mode=config.wandb_mode,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("train_step")
        self._run.define_metric("*", step_metric="train_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train_step": step, **values})

    def finish(self) -> None:
        self._run.finish()
        if self._temporary:
            storage.upload(Path(self._temporary.name) / "wandb", self._uri)
            self._temporary.cleanup()
