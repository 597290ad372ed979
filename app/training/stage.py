"""Training stage: Ray Train hosts the DeepSpeed workers, restarts them after a failure and resizes their group.

checkpoints_uri is the folder of one run: the same job submitted again continues it, and one with other data or other
settings of what is learned is refused. The workers read the folder themselves, so nothing hangs on Ray's own record of
checkpoints. When they have ended, the best checkpoint becomes the model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors import safe_open

from app import cluster, overlays, storage
from app.artifacts import Input, Manifest, clear, find_complete, folder_input, publish, read_manifest
from app.config import flatten
from app.devices import has_float8
from app.models import END_OF_TEXT
from app.training import checkpoint, goodput, journal, ledger, parallel, record, report, signals
from app.training.batches import PAIRS, open_plan, read_tokens
from app.training.config import TrainConfig
from app.training.families import BIAS, refuse_untried_with_blocks, refuse_unwatched
from app.training.layout import refuse_unshareable
from app.training.refusals import Devices

logger = logging.getLogger(__name__)

CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "1",  # the number of devices; unset, DeepSpeed runs numactl several times a step
    "OMP_NUM_THREADS": "1",
    **cluster.KEEP_FREED_MEMORY,
}
FLOAT8 = {"float8": "torchao"}  # an overlay, and a package in it
RECORD = "run.json"  # settings and data of the run that a folder holds
RAY_RECORD = "checkpoint_manager_snapshot.json"
# Ray Train starts an elastic run with as many workers as a list of nodes has room for that it renews every 20 s. Where
# a node of it is gone, it finds out only when this time is over; 60 s unless set.
START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")
_TYPE = "accelerator_type:"  # Ray has a resource of that name and the GPU's
STOPPED = 143  # exit code after SIGTERM
HOW_NOT_WHAT = {  # settings that a run may go on with when they have changed
    "storage_uri", "overwrite", "tokens_uri", "tokenizer_uri", "checkpoints_uri", "output_uri", "num_workers",
    "sequence_parallel", "min_workers", "resize_check_seconds", "micro_batch_sequences", "attention",
    "offload_optimizer", "offload_parameters", "nvme_dir",
    "activation_checkpointing", "compile", "checkpoint_interval_steps", "keep_checkpoints", "validation", "export",
    "evaluation_interval_steps", "correction", "alarms", "max_failures", "cache_dir", "wandb_mode",
    "stop_at_step",
}  # fmt: skip


def run(config: TrainConfig) -> Manifest:
    """Train, or resume, to the last step and make the model artifact.

    Raises ValueError when the inputs do not fit, checkpoints_uri holds another run, or a worker finds the user's
    mistake; SystemExit after a checkpoint when the job is told to end (SIGTERM).
    """
    uri = config.resolve(config.output_uri)
    draft = Manifest.draft(config.kind, uri, config, read_inputs(config))
    if done := find_complete(draft, config.overwrite):
        return done
    cluster.connect()
    use_gpu = cluster.has_gpu()
    for line in parallel.plan(config, _devices(use_gpu)).lines:
        logger.info("%s", line)
    environment = {} if use_gpu else CPU_ENVIRONMENT
    if config.float8 != "none":
        environment = environment | {"PYTHONPATH": overlays.python_path(FLOAT8, f"float8 {config.float8}")}
    clear(uri)
    run_uri = config.resolve(config.checkpoints_uri)
    run_name = open_run(run_uri, draft, config.overwrite)
    refuse_other_order(run_uri, open_plan(config).fingerprint)
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "run_uri": run_uri,
        "run_name": run_name,
        "use_gpu": use_gpu,
        "environment": environment,
        "vocabulary": _vocabulary(config),
    }
    where = "GPUs" if use_gpu else "CPUs"
    logger.info("run %s in %s: %d workers on %s", run_name, run_uri, config.num_workers, where)
    with _stop_on_sigterm(run_uri):
        outcome: dict[str, Any] = _trainer(config, job).fit().return_value
    _write_report(run_uri, {})
    if error := outcome.get("error"):
        raise ValueError(error)
    if outcome.get("stopped"):
        logger.warning("stopped after a checkpoint at step %d; submit the job again to go on", outcome["step"])
        raise SystemExit(STOPPED)
    return publish(draft, _finish(config, run_uri))


def _devices(use_gpu: bool) -> Devices:
    kind: Literal["gpu", "cpu"] = "gpu" if use_gpu else "cpu"
    resources = ray.cluster_resources()
    types = [name.removeprefix(_TYPE) for name in resources if name.startswith(_TYPE)]
    return Devices(kind, int(resources.get(kind.upper(), 0)), all(map(has_float8, types)))


def read_inputs(config: TrainConfig) -> dict[str, Input]:
    """What a run learns from, by name. Raises ValueError when it is missing or does not fit together."""
    tokenizer = folder_input(config.resolve(config.tokenizer_uri), ("tokenizer", "model"), "tokenizer.json")
    inputs = {"tokenizer": tokenizer}
    for name, tokens in zip(("tokens", "replay"), read_tokens(config), strict=False):
        if tokens.inputs["tokenizer"].digest != tokenizer.digest:
            raise ValueError(f"{tokens.uri}: packed with another tokenizer than {tokenizer.uri}; pack it again")
        if tokens.figures.get("kind") and not config.document_masking:
            raise ValueError(f"document_masking: {tokens.uri} holds conversations, packed together: set it to true")
        if tokens.figures.get("kind") == PAIRS and (name == "replay" or config.replay.share or not config.adapter.rank):
            raise ValueError(
                f"{tokens.uri} holds preferences: they are learned by an adapter, measured against the model without "
                "it, and nothing is replayed: set adapter.rank, and replay.share to 0"
            )
        inputs[name] = tokens.as_input()
        block_tokens = tokens.config["block_tokens"]
    base = None
    if config.init_from_uri:
        uri = config.resolve(config.init_from_uri)
        try:
            inputs["init_from"] = folder_input(uri, ("model",), "config.json")
        except ValueError as error:
            raise ValueError(f"init_from_uri: {error}") from None
        with storage.open_file(f"{uri}/config.json") as file:
            base = json.load(file)
        refuse_unwatched(base)
        refuse_untried_with_blocks(config, base)
    refuse_unshareable(config, block_tokens, base)
    return inputs


def open_run(run_uri: str, draft: Manifest, overwrite: bool) -> str:
    """Begin the run in its folder, or make sure that the one in there is this one; its name.

    Raises ValueError naming what differs, unless overwrite is set: then the old run is deleted.
    """
    is_cut = draft.config["tensor_parallel"] * draft.config["pipeline_stages"] > 1
    fixed = {"num_workers"} if is_cut else set[str]()  # its checkpoints are not cut anew
    settings = flatten({name: draft.config[name] for name in draft.config if name not in HOW_NOT_WHAT - fixed})
    settings.pop("adapter.merge", None)
    data = {name: given.digest for name, given in draft.inputs.items()}
    now = {"settings": settings, "data": data}
    if found := record.find_same(run_uri, RECORD, "checkpoints_uri", now, overwrite):
        signals.forget_stop(run_uri)
        _forget_damaged_snapshot(run_uri)
        return str(found["name"])
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    record.write(run_uri, RECORD, now | {"name": name})
    return name


def refuse_other_order(run_uri: str, fingerprint: str) -> None:
    """Raises ValueError for a run that took its data in another order: it would meet some of it twice, some never."""
    for newest in checkpoint.find_complete(run_uri)[:1]:
        if newest.fingerprint != fingerprint:
            raise ValueError(
                f"checkpoints_uri: {run_uri} took its data in the order of {newest.fingerprint[:12]}…, which is now "
                f"{fingerprint[:12]}…: another version began it; finish it with that one, or begin anew with overwrite"
            )


def _forget_damaged_snapshot(run_uri: str) -> None:
    """Ray Train rewrites its own record in place, so a kill can cut it short; nothing of ours is in it."""
    path = f"{run_uri}/{RAY_RECORD}"
    if not storage.exists(path):
        return
    try:
        with storage.open_file(path) as file:
            json.load(file)
    except ValueError:
        storage.delete(path)


@contextmanager
def _stop_on_sigterm(run_uri: str) -> Iterator[None]:
    """While the workers train, SIGTERM to this process asks them to leave after a checkpoint."""

    def ask(number: int, frame: FrameType | None) -> None:
        logger.warning("told to end: asking the workers for a checkpoint")
        signals.ask_to_stop(run_uri)

    if threading.current_thread() is not threading.main_thread():  # under Tune: its trials end otherwise
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Failures(ray.train.UserCallback):  # type: ignore[misc]
    """Notes in the journal why Ray Train restarts the workers; runs in its controller."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        first = min(worker_exceptions, key=lambda rank: ("Connection" in str(worker_exceptions[rank]), rank))
        error = worker_exceptions[first]  # the others of the group only lost their connection to it
        said = str(error).strip().splitlines() or [""]
        journal.add_event(self._run_uri, "failed", cause=f"rank {first}: {type(error).__name__}: {said[0][:200]}")


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker runs: imports what is heavy there, not in the driver."""
    began = time.time()
    from app.training.loop import train_per_worker

    return train_per_worker(job | {"began": began, "import_seconds": time.time() - began})


def _score(checkpoint: Any, step: int, job: dict[str, Any]) -> dict[str, float]:
    """What Ray Train's validation task runs while the workers go on."""
    from app.training.export import score_checkpoint

    return score_checkpoint(job["run_uri"], step, TrainConfig.model_validate(job["config"]))


def _trainer(config: TrainConfig, job: dict[str, Any]) -> TorchTrainer:
    use_gpu = job["use_gpu"]
    elastic = 0 < config.min_workers < config.num_workers
    if elastic:
        os.environ.setdefault(*START_TIMEOUT)
    is_async = config.validation == "async"
    task = ray.train.ValidationTaskConfig(fn_kwargs={"job": job})
    folder, name = job["run_uri"].rsplit("/", 1)  # Ray scores only checkpoints below its own folder
    return TorchTrainer(
        _train,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.num_workers) if elastic else config.num_workers,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=config.resize_check_seconds,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[_Failures(job["run_uri"])],
            worker_runtime_env={"env_vars": job["environment"]},
        ),
        validation_config=ray.train.ValidationConfig(_score, task, {"num_gpus": int(use_gpu)}) if is_async else None,
    )


def _finish(config: TrainConfig, run_uri: str) -> dict[str, Any]:
    """Check the ledger, export the model, write the report; the figures of the manifest."""
    log, scores = journal.read_log(run_uri), checkpoint.read_scores(run_uri)
    plan = open_plan(config)
    checked = ledger.check(log, plan, journal.read_rewinds(run_uri))
    task = ray.remote(_export).options(scheduling_strategy="DEFAULT")  # under Tune, else in the room of the trial alone
    step = ray.get(task.remote(config, run_uri, checkpoint.best_step(scores)))
    spent = goodput.summarize(journal.read_events(run_uri), log)
    tokens = read_manifest(config.resolve(config.tokens_uri), "tokens")
    figures = summarize(log, config, tokens.config["block_tokens"]) | checked
    figures |= {name: round(value, 4) for name, value in scores.get(step, {}).items()}
    figures |= {"parameters": _num_parameters(config.resolve(config.output_uri)), "exported_step": step}
    figures |= _trained_share(run_uri) if config.adapter.rank else {}
    figures |= {"goodput": round(spent.goodput, 4), "restarts": len(spent.restarts), "rewinds": len(spent.rewinds)}
    _write_report(run_uri, figures)
    return figures


def _export(config: TrainConfig, run_uri: str, best_step: int) -> int:
    """Export the best checkpoint, or the last if that is gone or not wished; its step."""
    from app.training.export import export_model

    found = checkpoint.find_complete(run_uri)
    wished = best_step if config.export == "best" else -1
    chosen = next((manifest for manifest in found if manifest.step == wished), found[0])
    export_model(run_uri, chosen, config)
    return chosen.step


def _write_report(run_uri: str, figures: dict[str, Any]) -> None:
    page = report.render(journal.read_log(run_uri), journal.read_events(run_uri), figures)
    storage.write_atomic(f"{run_uri}/report.html", page.encode())


def _vocabulary(config: TrainConfig) -> dict[str, int]:
    tokens = read_manifest(config.resolve(config.tokens_uri), "tokens")
    with storage.local_copy(config.resolve(config.tokenizer_uri)) as folder:
        added = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    found = {token["content"]: int(token["id"]) for token in added}
    if END_OF_TEXT not in found and not config.init_from_uri:
        raise ValueError(f"tokenizer_uri: it has no {END_OF_TEXT}; a new model needs a tokenizer of train_tokenizer")
    return {"vocab_size": int(str(tokens.figures["vocab_size"])), "end_of_text_id": found.get(END_OF_TEXT, 0)}


def _num_parameters(model_uri: str) -> int:
    """Counted from the headers of the exported weights."""
    total = 0
    with storage.local_copy(model_uri) as folder:
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "np") as tensors:
                names = [name for name in tensors.keys() if not name.endswith(BIAS)]  # noqa: SIM118
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def _trained_share(run_uri: str) -> dict[str, Any]:
    """As the workers counted it when they began."""
    started = journal.read_events(run_uri, "started")[-1]
    trained, total = started["trainable_parameters"], started["all_parameters"]
    return {"trainable_parameters": trained, "trainable_percent": round(100 * trained / total, 4)}


def summarize(log: list[dict[str, Any]], config: TrainConfig, block_tokens: int) -> dict[str, Any]:
    """The figures of the manifest from the lines of the steps; the train loss is the mean of the last tenth."""
    assert [line["step"] for line in log] == list(range(config.num_steps)), "a step is missing or there twice"
    last = log[-max(1, len(log) // 10) :]
    speeds = sorted(line["tokens_per_second"] for line in log)
    return {
        "steps": len(log),
        "tokens": len(log) * config.global_batch_sequences * block_tokens,
        "train_loss": round(sum(line["loss"] for line in last) / len(last), 4),
        "tokens_per_second": round(speeds[len(speeds) // 2]),
    }
