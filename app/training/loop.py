"""The training loop: what each Ray Train worker runs, top to bottom.

Every step is a function of (weights, seed, step): rows from the sampler, learning rate from the schedule, random state
reseeded. So a run that resumes from a checkpoint at the same world size repeats the undisturbed one bit for bit.
It knows nothing of Ray's retries; the stage configures them.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from typing import Any

import numpy as np
import ray.train
import torch

from app import logs
from app.artifacts import read_manifest
from app.training import batches, checkpoint, export, sampler
from app.training.config import TrainConfig
from app.training.held_out import HeldOut
from app.training.schedule import learning_rate
from app.training.telemetry import Telemetry
from app.training.zero import deepspeed_config

logger = logging.getLogger(__name__)


def train_per_worker(job: dict[str, Any]) -> str | None:
    """Train, evaluate, checkpoint, export. Collective: the same calls on every rank.

    `job` holds config (a dumped TrainConfig), run_uri, use_gpu and end_of_text_id. Returns why the run diverged, or
    None: raised, it would be a failure that Ray Train retries, and a resumed run diverges at the same step.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    _quiet()
    config, use_gpu = TrainConfig.model_validate(job["config"]), job["use_gpu"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    deepspeed.ops.__compatible_ops__ = {}  # else g++ builds a shared-memory all-reduce, which only inference calls
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")

    tokens = read_manifest(config.resolve(config.tokens_uri), "tokens")
    train_blocks = batches.read_blocks(tokens.uri, "train")  # [N, T]
    held_out = HeldOut.read(tokens.uri, tokens.figures["held_out"])

    ds_config = deepspeed_config(config, use_gpu)
    keep_alive = HfDeepSpeedConfig(ds_config)  # transformers shards the weights while it makes them, if this lives
    torch.manual_seed(config.seed)
    vocab_size, block_tokens = int(str(tokens.figures["vocab_size"])), train_blocks.shape[1]
    architecture = export.llama_config(config, vocab_size, block_tokens, job["end_of_text_id"])
    model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        fused=use_gpu,
    )
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    del keep_alive

    first_step, log = checkpoint.load(engine)
    if first_step:
        logger.info("resuming after step %d", first_step)
    telemetry = Telemetry(config, job["run_uri"], log, speaks=rank == 0)
    step_tokens = config.global_batch_sequences * block_tokens
    for step in range(first_step, config.num_steps):
        began = time.monotonic()
        torch.manual_seed(hash((config.seed, step, rank)))
        rate = learning_rate(step, config.num_steps, config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = sampler.rows_of_step(config.seed, step, len(train_blocks), config.global_batch_sequences)
        mine = train_blocks[sampler.rows_of_rank(rows, rank, world_size)]
        loss_sum = torch.zeros((), device=engine.device)
        for micro_batch in np.split(mine, config.accumulation_steps):
            input_ids = torch.from_numpy(micro_batch).long().to(engine.device)  # [B, T]
            loss = engine(input_ids=input_ids, labels=input_ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        loss_mean = _mean_over_ranks(loss_sum / config.accumulation_steps, world_size)
        values = {"loss": loss_mean, "learning_rate": rate, "grad_norm": float(engine.get_global_grad_norm())}
        values["tokens_per_second"] = step_tokens / (time.monotonic() - began)
        if not (math.isfinite(loss_mean) and math.isfinite(values["grad_norm"])):
            telemetry.finish()
            found = f"loss is {loss_mean}, gradient norm {values['grad_norm']}"
            return f"step {step}: {found}; lower optimizer.learning_rate or check the data"

        last = step + 1 == config.num_steps
        if held_out and (last or (step + 1) % config.evaluation_interval_steps == 0):
            values["held_out_bits_per_byte"] = held_out.bits_per_byte(engine, config.micro_batch_sequences)
        telemetry.record(step, values)
        if last or (step + 1) % config.checkpoint_interval_steps == 0:
            checkpoint.save(engine, step + 1, telemetry.log, values)

    weights = export.gather_weights(engine.module, keep=rank == 0)
    if rank == 0:
        export.export_model(engine.module, weights, telemetry.log, config)
    telemetry.finish()
    return None


def _mean_over_ranks(value: torch.Tensor, world_size: int) -> float:
    torch.distributed.all_reduce(value)
    return float(value) / world_size


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves a flat shard behind
        (decayed if is_matrix and "embed" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _quiet() -> None:
    logs.configure()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name in ("DeepSpeed", "ray.train", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
