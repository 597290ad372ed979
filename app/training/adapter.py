"""LoRA on the model that is trained: low-rank matrices beside the frozen linear layers, by PEFT, in PEFT's layout.

Hu et al. 2021 (arXiv:2106.09685). PEFT puts its layers into the model and merges them; loop, optimizer, checkpoints and
export stay ours. The initial matrices are a function of the seed. Nothing here is collective.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app.training.config import AdapterConfig

NAME = "default"  # PEFT's own name of the only adapter
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add(model: Any, config: AdapterConfig, seed: int) -> None:
    """Freeze the model and put adapters beside its linear layers, in place; they change nothing until trained.

    Raises ValueError when no layer has the name of a target.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    torch.manual_seed(seed)  # making the model has drawn on it, under ZeRO-3 by each rank differently
    targets = list(config.target_modules)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        inject_adapter_in_model(settings, model, NAME)
    except ValueError as error:
        raise ValueError(f"adapter.target_modules: {error}") from None


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The model as it was before, for as long as the block lasts: the adapters' outputs are multiplied with nought.

    The layers run all the same: ZeRO-3 gathers weights in the order in which layers ran before.
    """
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert layers, "the model has no adapter"
    scales = [layer.scaling[NAME] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[NAME] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[NAME] = scale


def trainable(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a state dict that are an adapter's, by their names in the model."""
    return {name: tensor for name, tensor in weights.items() if f".{NAME}." in name and ".lora_" in name}


def save(weights: Mapping[str, torch.Tensor], config: AdapterConfig, base: str, folder: Path) -> None:
    """Write PEFT's folder; `weights` by their names in the model, `base` is what it says of the model below."""
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.contiguous() for name, tensor in weights.items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list({found[1] for name in weights if (found := re.search(r"([^.]+)\.lora_", name))}),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text())
    written["target_modules"].sort()  # PEFT keeps a set: equal runs would write different files
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True))


def merge(model: Any) -> Any:
    """The model with its adapters added to the weights and nothing beside them."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def count(model: Any) -> tuple[int, int]:
    """Parameters that are trained, and all of them."""
    sizes = [(num_elements(one), one.requires_grad) for one in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def num_elements(parameter: Any) -> int:
    """Of the whole parameter, where this rank has a shard of it under ZeRO-3 or a part of it beside other tensor ranks,
    or two in each byte in 4 bits.
    """
    if (part := getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)) is not None:
        return math.prod(part["original_shape"])
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(packed.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))
