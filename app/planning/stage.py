"""The capacity plan: does a training job fit its devices, how long does it take, what helps if it does not.

Needs no cluster and writes nothing; the answer is a table. Estimates are estimate.py's, the changes search.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from app.devices import MEMORY_GIB, has_float8, published_flops
from app.planning import estimate, search
from app.planning.config import PlanConfig
from app.planning.estimate import GIB, Shape
from app.planning.search import gib
from app.training import parallel
from app.training.layout import refuse_unshareable
from app.training.refusals import Devices
from app.training.sizes import count_parameters

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Capacity:
    """The answer: a table, and why the job does not fit, "" when it does."""

    text: str
    misfit: str


def run(config: PlanConfig) -> Capacity:
    """Estimate the job. Raises ValueError when training would refuse it, whatever the devices."""
    train, shape, number = config.train_model, Shape(config.vocab_size, config.block_tokens), _number(config)
    if train.init_from_uri:
        raise ValueError("train_model.init_from_uri: describe the model in train_model.model; a folder is not read")
    if number % train.workers_per_replica:
        raise ValueError(f"num_devices: {number} is no multiple of the {train.workers_per_replica} that share a model")
    refuse_unshareable(train, config.block_tokens)
    kind: Literal["cpu", "gpu"] = "cpu" if config.device == "CPU" else "gpu"
    layout = parallel.plan(train, Devices(kind, has_float8=has_float8(config.device)))
    memory = estimate.memory_of(train, shape, number)
    room = room_bytes(config)
    rows = [*_model_rows(config), *_memory_rows(config, memory), *(("a step", line) for line in layout.lines)]
    rows += [*_time_rows(config), *_serving_rows(config)]
    lines = [f"{name:<{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows]
    if memory.device <= room:
        largest = search.largest_micro_batch(train, shape, number, room)
        lines.append(f"It fits: {gib(memory.device)} of {gib(room)}; up to {largest} blocks in a forward pass would.")
        return Capacity("\n".join(lines), "")
    return Capacity("\n".join(lines), _misfit(config, memory.device, room))


def room_bytes(config: PlanConfig) -> float:
    """Bytes of a device that tensors may fill."""
    memory_gib = config.device_memory_gib or MEMORY_GIB[config.device]
    return memory_gib * GIB * (1 - config.reserve_share)


def _number(config: PlanConfig) -> int:
    return config.num_devices or config.train_model.num_workers


def _misfit(config: PlanConfig, needed: float, room: float) -> str:
    train, shape, number = config.train_model, Shape(config.vocab_size, config.block_tokens), _number(config)
    said = [f"it does not fit: {gib(needed)} needed of {gib(room)}"]
    for trial in search.single_changes(train, shape, number):
        said.append(f"what helps: {trial.words(number)}: {gib(trial.memory.device)}")
    if fit := search.nearest_fit(train, shape, number, room):
        said.append(f"the nearest plan that fits: {fit.words(number)}: {gib(fit.memory.device)}")
    else:
        said.append("no change of these makes it fit; take a smaller model, shorter blocks or a larger device")
    return "\n".join(said)


def _model_rows(config: PlanConfig) -> Rows:
    count = count_parameters(config.train_model.model, config.vocab_size)
    parts = {
        "embeddings": count.embedding + count.head,
        "attention": count.attention,
        "MLP": count.mlp,
        "experts": count.experts,
        "routers": count.routers,
    }
    shown = ", ".join(f"{name} {_billions(size)}" for name, size in parts.items() if size)
    active = f", {_billions(count.active)} active" if count.experts else ""
    return [("parameters", f"{_billions(count.total)}{active}: {shown}")]


def _memory_rows(config: PlanConfig, memory: estimate.Memory) -> Rows:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    rows = [(f"  {name}", gib(getattr(memory, name))) for name in names]
    title = f"{_number(config)} × {config.device}, ZeRO-{config.train_model.zero_stage}"
    if config.train_model.pipeline_stages > 1:
        title += ", in the stage that takes most"
    rows = [("memory of a device", f"{gib(memory.device)} on {title}"), *rows]
    if memory.host:
        per_node = min(_number(config), config.devices_per_node)
        rows.append(("memory of a host", f"{gib(memory.host * per_node)} for what its {per_node} devices offload"))
    return rows


def _time_rows(config: PlanConfig) -> Rows:
    train, shape = config.train_model, Shape(config.vocab_size, config.block_tokens)
    per_token = estimate.training_flops(train, shape)
    tokens = config.tokens or train.num_steps * train.global_batch_sequences * config.block_tokens
    total = count_parameters(train.model, config.vocab_size).total
    rows = [("FLOPs", f"{per_token:.3g} a token, {per_token * tokens:.3g} for {_billions(tokens)} tokens")]
    if peak := published_flops(config.device.replace("-", " ")):
        days = estimate.training_days(per_token * tokens, _number(config), peak, config.mfu)
        speed = _number(config) * peak * config.mfu / per_token
        rows.append(("time", f"{days:.3g} days at {config.mfu:.0%} MFU, {speed:,.0f} tokens/s".replace("%", " %")))
    kept = (train.keep_checkpoints + 1) * estimate.checkpoint_bytes(train, total)
    one = estimate.checkpoint_bytes(train, total)
    rows.append(("checkpoint", f"{gib(one)}; {gib(kept)} for those that are kept, the best one included"))
    return [*rows, ("export", f"{gib(4.0 * total)} in the memory of one host, for the whole float32 weights")]


def _serving_rows(config: PlanConfig) -> Rows:
    model = config.train_model.model
    whole, packed = (estimate.serving_bytes(model, config.vocab_size, quantized) for quantized in (False, True))
    cache = estimate.key_value_bytes_per_token(model)
    context = gib(cache * config.block_tokens)
    return [
        ("served", f"{gib(whole)} in bfloat16" + ("" if model.num_experts else f", {gib(packed)} in int4")),
        ("key-value cache", f"{cache / 1024:.0f} KiB a token, {context} for a context of {config.block_tokens}"),
    ]


def _billions(number: float) -> str:
    """With three digits and a unit.

    >>> _billions(6_738_415_616), _billions(6_200_000), _billions(1.4e12)
    ('6.74 B', '6.20 M', '1.40 T')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            amount = number / unit
            return f"{amount:.{max(0, 2 - len(str(int(amount))) + 1)}f} {name}"
    return f"{number:,.0f}"
