"""A tiny Llama with random weights, as a packed 4-bit model artifact and as its dequantized float32 twin.

The packed one has the layout of compressed-tensors (`write_models`) or that of AutoAWQ (`write_autoawq`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from app.artifacts import Manifest, publish
from app.config import RunConfig
from app.tokens import tokenizer as bpe

GROUP_SIZE, VOCABULARY = 32, 384
AUTOAWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours stands at each place of a word, lowest bits first
TEXT = "却说曹操引兵南下，刘备问计于孔明。孔明曰：「亮夜观天象，操军必败。」The quick brown fox 2024."


def quantize(
    weight: torch.Tensor, scale_type: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit values [N, K], scales [N, K/G] and zero points [N, K/G] by each group's minimum and maximum.

    Scales are rounded to the given type; bfloat16 is what the kernel can hold exactly.
    """
    groups = weight.view(weight.shape[0], -1, GROUP_SIZE)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).to(scale_type).float()
    zero_points = (-low / scales).round().clamp(0, 15)
    quantized = (groups / scales.unsqueeze(-1) + zero_points.unsqueeze(-1)).round().clamp(0, 15)
    return quantized.view_as(weight).int(), scales, zero_points.int()


def dequantize(quantized: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]."""
    group_size = quantized.shape[1] // scales.shape[1]
    spread = [part.float().repeat_interleave(group_size, 1) for part in (scales, zero_points)]
    return (quantized.float() - spread[1]) * spread[0]


def pack_words(values: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit values of a row to one int32, first value lowest."""
    shifts = torch.arange(0, 32, 4)
    words = (values.long().view(values.shape[0], -1, 8) << shifts).sum(-1)
    return words.to(torch.int32)  # wraps, as it should


def write_models(folder: Path) -> tuple[Path, Path]:
    """Folders of the packed model (with manifest) and of its float32 twin."""
    model = _model()
    tensors = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.clone()
            continue
        quantized, scales, zero_points = quantize(weight)
        weight.copy_(dequantize(quantized, scales, zero_points))
        stem = name.removesuffix("weight")
        tensors[f"{stem}weight_packed"] = pack_words(quantized)
        tensors[f"{stem}weight_scale"] = scales
        tensors[f"{stem}weight_zero_point"] = pack_words(zero_points.t().contiguous()).t().contiguous()
        tensors[f"{stem}weight_shape"] = torch.tensor(weight.shape)
    packed, twin = _save(folder, model, tensors, _compressed_tensors_config())
    publish(Manifest.draft("model", str(packed), RunConfig(), {}), {})
    return packed, twin


def write_adapter(twin: Path, folder: Path, seed: int) -> LlamaForCausalLM:
    """A LoRA adapter with random weights in PEFT's layout; the twin with the adapter merged into it.

    W + alpha / r · B A, after Hu et al. 2021 (https://arxiv.org/abs/2106.09685); large enough to change what it says.
    """
    torch.manual_seed(seed)
    rank, alpha = 8, 16
    model = LlamaForCausalLM.from_pretrained(twin).eval()
    tensors = {}
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            down, up = torch.randn(rank, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], rank) * 0.1
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            weight.data += alpha / rank * up @ down
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": names}
    settings |= {"bias": "none", "base_model_name_or_path": "twin"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return model


def write_autoawq(folder: Path) -> tuple[Path, Path]:
    """Folders of the model as AutoAWQ's GEMM version writes it, with scales in float16, and of its float32 twin."""
    model = _model()
    tensors = {}
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.half()
            weight.copy_(tensors[name])
            continue
        quantized, scales, zero_points = quantize(weight, torch.float16)
        weight.copy_(dequantize(quantized, scales, zero_points))
        stem = name.removesuffix("weight")
        tensors[f"{stem}qweight"] = _interleave(quantized.t())
        tensors[f"{stem}qzeros"] = _interleave(zero_points.t())
        tensors[f"{stem}scales"] = scales.t().contiguous().half()
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
    return _save(folder, model, tensors, settings | {"modules_to_not_convert": None})


def _interleave(values: torch.Tensor) -> torch.Tensor:
    """[K, N] to [K, N/8]: eight neighbours in a word, in AutoAWQ's order."""
    return pack_words(values.reshape(values.shape[0], -1, 8)[..., AUTOAWQ_ORDER].flatten(1))


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,  # wide enough for clear favourites among the tokens
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )


def _save(
    folder: Path, model: LlamaForCausalLM, tensors: dict[str, torch.Tensor], quantization: dict[str, object]
) -> tuple[Path, Path]:
    tokenizer = bpe.train([TEXT] * 2, VOCABULARY, 2)
    twin, packed = folder / "twin", folder / "packed"
    model.save_pretrained(twin)
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    settings = json.loads((twin / "config.json").read_text()) | {"quantization_config": quantization}
    (packed / "config.json").write_text(json.dumps(settings))
    for path in (twin, packed):
        bpe.save(tokenizer, path)
    return packed, twin


def _compressed_tensors_config() -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_SIZE, "symmetric": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
