"""AWQ, 4-bit weights and 16-bit activations, in the layout of compressed-tensors; and how small the result is.

Activation-aware Weight Quantization after Lin et al. 2023 (https://arxiv.org/abs/2306.00978): scales found on
calibration text protect the weights that matter. llm-compressor searches them, or AutoAWQ (autoawq.py) has done so;
llm-compressor rounds, to the nearest or by GPTQ, and packs. It is imported here, so this runs only where the overlay is
first on the path.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.quantization.config import QuantizeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = ".weight_packed"  # compressed-tensors: int32 words of eight 4-bit weights
_PARTS = (PACKED, ".weight_scale", ".weight_zero_point", ".weight_shape")
_SERVED_AS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def refuse_group_size(model_config: Mapping[str, Any], group_size: int) -> None:
    """Raise ValueError when groups do not fill the input widths of the linear layers."""
    for name in ("hidden_size", "intermediate_size"):
        width = model_config.get(name, 0)
        if width % group_size:
            fitting = [size for size in (32, 64, 128) if width % size == 0]
            raise ValueError(f"group_size: {group_size} does not divide the model's {name} {width}; use {fitting}")


def modules_of(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the linear layers, and of all other modules in the model."""
    from torch.nn import Linear

    modules = {name: module for name, module in model.named_modules() if name}
    layers = [name for name, module in modules.items() if isinstance(module, Linear)]
    return layers, [name for name in modules if name not in layers]


def refuse_layer_group_sizes(layers: Iterable[str], others: Iterable[str], config: QuantizeConfig) -> None:
    """Raise ValueError when a pattern names no linear layer or another module, or when a layer gets two sizes.

    Layers that are served as one count as one.
    """
    for pattern in config.layer_group_sizes:
        if wrong := next((other for other in others if _names(pattern, other)), None):
            raise ValueError(f"layer_group_sizes: {pattern} names {wrong}, which is no linear layer")
    unused = set(config.layer_group_sizes)
    sizes: dict[str, set[int]] = defaultdict(set)
    for layer in layers:
        found = {pattern: size for pattern, size in config.layer_group_sizes.items() if _names(pattern, layer)}
        unused -= set(found)
        parent, _, name = layer.rpartition(".")
        sizes[f"{parent}.{_SERVED_AS.get(name, name)}"] |= set(found.values()) or {config.group_size}
    if unused:
        raise ValueError(f"layer_group_sizes: {', '.join(sorted(unused))}: no linear layer has such a name")
    if torn := next((layer for layer, found in sizes.items() if len(found) > 1), None):
        raise ValueError(
            f"layer_group_sizes: {torn} is one layer at the endpoint, and gets sizes {sorted(sizes[torn])}"
        )


def _names(pattern: str, layer: str) -> bool:
    """As compressed-tensors reads it."""
    return bool(re.match(pattern[3:], layer)) if pattern.startswith("re:") else pattern == layer


def refuse_experts(model_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a mixture of experts: transformers keeps experts as one tensor, which AWQ passes over."""
    if any(model_config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError("model_uri: a mixture of experts is not quantized yet; serve the model as it is")


def refuse_blocks(model_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a model whose layers see chosen blocks of tokens: not tried."""
    if model_config.get("attention_block_tokens"):
        raise ValueError("model_uri: a model with attention_block_tokens is not quantized yet; serve it as it is")


def quantize(model: PreTrainedModel, windows: Sequence[Sequence[int]], config: QuantizeConfig) -> None:
    """Scale and round the linear layers of the model in place, calibrated on token windows (each a list of ids)."""
    from llmcompressor.modifiers.transform.awq import AWQModifier

    _apply(model, windows, [AWQModifier(duo_scaling="both"), _rounding(config)])


def round_weights(model: PreTrainedModel, windows: Sequence[Sequence[int]], config: QuantizeConfig) -> None:
    """Round the linear layers in place as their weights are."""
    _apply(model, windows, [_rounding(config)])


def _apply(model: PreTrainedModel, windows: Sequence[Sequence[int]], recipe: list[Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    _let_cpu_hosts_calibrate()
    rows = [{"input_ids": list(window), "attention_mask": [1] * len(window)} for window in windows]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        max_seq_length=max(map(len, windows)),
    )


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the quantized model, packed; scales in 16 bits also beside float32 weights, where they would take 32."""
    import torch

    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight_scale.data.to(torch.bfloat16)
    model.save_pretrained(folder, save_compressed=True)


def _rounding(config: QuantizeConfig) -> Any:
    """Each group to 16 levels between its min and max; scales first to bfloat16, which every kernel can hold.

    GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) makes up for each column's error in those after it.
    """
    import torch
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "symmetric": config.symmetric,
        "dynamic": False,
        "scale_dtype": torch.bfloat16,
    }
    targets = defaultdict(list, {config.group_size: ["Linear"]})  # a layer's name comes before its class
    for layers, size in config.layer_group_sizes.items():
        targets[size].append(layers)
    groups = {
        f"groups_of_{size}": {"targets": names, "weights": weights | {"group_size": size}}
        for size, names in targets.items()
    }
    modifier = GPTQModifier if config.rounding == "gptq" else QuantizationModifier
    return modifier(config_groups=groups, ignore=config.ignore)


def _let_cpu_hosts_calibrate() -> None:
    """llm-compressor pins calibration tensors in memory, which torch can only do beside an accelerator."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)


def choose_windows(
    documents: Sequence[Sequence[int]], num_windows: int, window_tokens: int, seed: int
) -> list[list[int]]:
    """That many windows of tokens, each of the full length, cut from the documents joined in a shuffled order."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    for index in order:
        stream.extend(documents[index])
        if len(stream) >= num_windows * window_tokens:
            break
    windows = [stream[i : i + window_tokens] for i in range(0, len(stream) - window_tokens + 1, window_tokens)]
    if not windows:
        raise ValueError(f"the train split has fewer than {window_tokens} tokens to calibrate on")
    return windows[:num_windows]


def linear_sizes(model_dir: Path) -> dict[str, int | float]:
    """Bytes of the quantized linear weights on disk and of the same weights in float32."""
    stored = original = 0
    for file in sorted(model_dir.glob("*.safetensors")):
        header = _safetensors_header(file)
        for name, tensor in header.items():
            if name.endswith(_PARTS):
                begin, end = tensor["data_offsets"]
                stored += end - begin
            if name.endswith(PACKED):
                rows, words = tensor["shape"]
                original += rows * words * 8 * 4
    percent = round(100 * stored / original, 2) if original else 100.0
    return {"linear_weight_bytes": stored, "linear_float32_bytes": original, "linear_percent": percent}


def _safetensors_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
