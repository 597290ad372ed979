"""Llamas with random weights for measurements of speed and memory: in bfloat16, and in 4 bits by round-to-nearest.

Values do not matter to the time of a product, so that nothing is trained or calibrated. The 4-bit weights have the
layout of compressed-tensors, symmetric, in groups of 128 inputs (64 where 128 does not divide).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

CACHE = Path.home() / ".cache" / "zero-to-one-benchmarks" / "engine"
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "demo": (256, 768, 4, 8, 4),  # jobs/configs/demo/train_model.yaml: 6 million parameters
    "large": (1024, 2816, 24, 16, 8),  # 295 million
}
VOCABULARY, CONTEXT = 6000, 2048
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def make(name: str) -> dict[str, Path]:
    """Folders of the `plain` and of the `int4` model; made once."""
    folders = {kind: CACHE / f"{name}-{kind}" for kind in ("plain", "int4")}
    if not all((folder / "config.json").exists() for folder in folders.values()):
        _write(name, folders)
    return folders


def hide_avx512() -> None:
    """From vLLM, in this process, before it is imported; for the libraries beneath there are the variables AVX2."""
    import torch

    for name in dir(torch.cpu):
        if name.startswith(("_is_avx512", "_is_amx")):
            setattr(torch.cpu, name, lambda: False)


def machine() -> str:
    """One line about the machine, for the head of the output."""
    text = Path("/proc/cpuinfo").read_text()
    model = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in text]
    return f"{len(os.sched_getaffinity(0))} cores, {model}, {' '.join(features)}, {gib:.0f} GiB"


def _write(name: str, folders: dict[str, Path]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, num_layers, num_heads, num_key_value_heads = SHAPES[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        )
    ).bfloat16()
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folders["plain"])
    group = 128 if hidden % 128 == 0 and intermediate % 128 == 0 else 64
    tensors = {}
    for key, weight in model.state_dict().items():
        if key.endswith("_proj.weight"):
            tensors |= {key.removesuffix("weight") + part: value for part, value in _quantize(weight, group).items()}
        else:
            tensors[key] = weight
    folders["int4"].mkdir()
    save_file(tensors, folders["int4"] / "model.safetensors", {"format": "pt"})
    settings = json.loads((folders["plain"] / "config.json").read_text()) | {"quantization_config": _settings(group)}
    (folders["int4"] / "config.json").write_text(json.dumps(settings))


def _quantize(weight: object, group: int) -> dict[str, object]:
    """compressed-tensors' parts of one weight [N, K]: eight values to a word, scales [N, K/G], and the shape."""
    import torch

    assert isinstance(weight, torch.Tensor)
    groups = weight.float().view(weight.shape[0], -1, group)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    values = ((groups / scales).round().clamp(-8, 7) + 8).long().view(weight.shape[0], -1, 8)
    words = (values << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scales.squeeze(-1).bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _settings(group: int) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
