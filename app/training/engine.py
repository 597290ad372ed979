"""Model, optimizer and DeepSpeed engine of a worker, from the config: a fresh model or one from a Hugging Face folder.

transformers shards the weights while it makes them, as long as an HfDeepSpeedConfig lives. Weight decay is for
matrices only. It does not load checkpoints; saver.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from app.training import adapter, float8, pipeline, sharing
from app.training.config import OptimizerConfig, TrainConfig
from app.training.export import load_base
from app.training.families import active_share, architecture, biases_of, name_router, set_biases, use_windows
from app.training.zero import deepspeed_config


def build(config: TrainConfig, shape: Mapping[str, int], world_size: int, use_gpu: bool) -> Any:
    """The DeepSpeed engine; collective. `shape` holds vocab_size, block_tokens and end_of_text_id.

    Raises ValueError when a model to start from does not fit the tokens.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    ds_config = deepspeed_config(config, world_size, use_gpu)
    keep_alive = HfDeepSpeedConfig(ds_config)
    torch.manual_seed(config.seed)
    model = _pretrained(config, shape) if config.init_from_uri else fresh_model(config, shape)
    model.config.use_cache = False
    if config.adapter.rank:
        adapter.add(model, config.adapter, config.seed)
    if config.float8 != "none":
        float8.convert(model, config.float8, emulate=not use_gpu)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    mpu = None
    if config.sequence_parallel > 1:
        mpu = sharing.share_tokens(model, config.sequence_parallel, config.micro_batch_sequences)
    hidden_size = int(model.config.hidden_size)
    named: Iterable[tuple[str, torch.nn.Parameter]] = model.named_parameters()
    if config.pipeline_stages > 1:
        model = pipeline.cut(model, config)
        named = model.exported_parameters()
    optimizer = torch.optim.AdamW(
        parameter_groups(named, config.optimizer, hidden_size),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        fused=use_gpu and config.offload_optimizer == "none",
    )
    biases = biases_of(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=mpu)
    del keep_alive
    set_biases(engine.module, biases)
    if mpu:
        engine.mpu = None  # DeepSpeed's checkpoints would take ranks that share tokens for tensor-parallel ones
    if config.zero_stage == 0:
        _clip_plain_gradients(engine)
    if config.compile:
        engine.compile()
    return engine


def _clip_plain_gradients(engine: Any) -> None:
    """Without ZeRO DeepSpeed clips float32 gradients too, but forgets their norm."""
    from deepspeed.runtime.utils import clip_grad_norm_  # counts matrices of all tensor ranks, what they all have once

    def clip() -> None:
        parameters = list(engine.module.parameters())
        if engine.autotp_size() > 1:
            norm = clip_grad_norm_(parameters, engine.gradient_clipping(), mpu=engine.mpu)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        engine._global_grad_norm = float(norm)

    engine.clip_fp32_gradients = clip


def whole_model(engine: Any) -> Any:
    """The transformers model that is trained; where a rank has one stage of it, all of it without its weights."""
    return engine.module.whole[0] if isinstance(engine.module, pipeline.Staged) else engine.module


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Random state of python, numpy and torch on all devices as a function of the step, so that none is stored."""
    import random

    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def fresh_model(config: TrainConfig, shape: Mapping[str, int]) -> Any:
    """A model of the config's family and size, its weights drawn now; the keys of `shape` are those of `build`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(architecture(config, shape), dtype=getattr(torch, config.dtype))


def num_matrix_parameters(model: Any) -> int:
    """Parameters that a token is multiplied with: not the input embedding, nor the experts that it is not sent to."""
    embedding = model.get_input_embeddings().weight
    skipped = None if model.config.tie_word_embeddings else embedding
    share = active_share(model)
    return sum(
        round(adapter.num_elements(parameter) * (share if ".experts." in name else 1.0))
        for name, parameter in model.named_parameters()
        if parameter is not skipped
    )


def _pretrained(config: TrainConfig, shape: Mapping[str, int]) -> Any:
    model = load_base(config, config.attention)
    use_windows(model.config)
    name_router(model.config)
    for name, needed, has in (
        ("vocabulary", shape["vocab_size"], model.config.vocab_size),
        ("context", shape["block_tokens"], model.config.max_position_embeddings),
    ):
        if needed > has:
            raise ValueError(f"init_from_uri: its {name} is {has}, the tokens need {needed}; pack them for this model")
    return model


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], optimizer: OptimizerConfig, hidden_size: int
) -> list[dict[str, Any]]:
    """Matrices, and then embeddings and vectors, which neither decay nor take less of the learning rate.

    A step of Adam changes what a matrix puts out in proportion to its width, so that the learning rate of a wider model
    is to be less by as much; embeddings and vectors add up nothing (Everett et al. 2024, arXiv:2407.05872, table 1,
    after Yang et al. 2022, arXiv:2203.03466).
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves a flat shard behind
        (matrices if is_matrix and "embed" not in name else others).append(parameter)
    found_at = optimizer.found_at_hidden_size
    scale = found_at / hidden_size if found_at else 1.0
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay, "lr_scale": scale},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Of every parameter group, its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # a checkpoint from before there were shares
