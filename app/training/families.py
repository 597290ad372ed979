"""The model families: a config of ours as a transformers config, and what of a model is a mixture of experts.

Llama (Touvron et al. 2023, arXiv:2302.13971), Qwen3 and Qwen3-MoE (Yang et al. 2025, arXiv:2505.09388), DeepSeek-V3
(DeepSeek-AI 2024, arXiv:2412.19437) without its prediction of more tokens and groups of experts, and Olmo 3 (Team Olmo
2025, arXiv:2512.13961), whose layers may see a window only; a Qwen3 whose layers see chosen blocks is one of our own,
app/block_qwen3.py. A folder in the Hugging Face layout may hold
others; a mixture of experts must be one whose routers experts.py can watch.
It makes no weights; engine.py does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.models import DEEPSEEK_ROUTER
from app.training import local_attention
from app.training.config import ModelConfig, TrainConfig
from app.training.refusals import WITH_BLOCKS

# Their routers return logits [tokens, experts], weights, and the chosen experts.
WATCHED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
BIAS = "e_score_correction_bias"  # buffer of a router: added to an expert's score for the choice, not for its weight
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as the families call it


def architecture(config: TrainConfig, shape: Mapping[str, int]) -> Any:
    """The transformers config of a fresh model; `shape` holds vocab_size, block_tokens and end_of_text_id."""
    from transformers import DeepseekV3Config, LlamaConfig, Olmo3Config, Qwen3Config, Qwen3MoeConfig

    from app import block_qwen3

    block_qwen3.register()
    model = config.model
    families = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "deepseek_v3": DeepseekV3Config,
        "olmo3": Olmo3Config,
    }
    family = block_qwen3.BlockSparseQwen3Config if model.attention_block_tokens else families[model.architecture]
    made = family(
        vocab_size=shape["vocab_size"],
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        max_position_embeddings=shape["block_tokens"],
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=shape["end_of_text_id"],
        eos_token_id=shape["end_of_text_id"],
        attn_implementation=config.attention,
        **_heads(model),
        **_layers(model, shape["block_tokens"]),
        **_experts(model),
    )
    use_windows(made)
    return made


def use_windows(model_config: Any) -> None:
    """Have a transformers config with windows in it computed by chunks where it is to use SDPA, which masks them."""
    windows = "sliding_attention" in (getattr(model_config, "layer_types", None) or ())
    if model_config.model_type == "olmo3" and windows and model_config._attn_implementation == "sdpa":
        model_config._attn_implementation = local_attention.register()


def name_router(model_config: Any) -> None:
    """Have the config of a DeepSeek-V3 say what its router does, where transformers has left that out."""
    if model_config.model_type == "deepseek_v3":
        model_config.update(DEEPSEEK_ROUTER)


def _layers(model: ModelConfig, block_tokens: int) -> dict[str, Any]:
    """What the layers see, and their positions."""
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.attention_block_tokens:
        kept = ("attention_block_tokens", "attention_blocks", "global_every")
        return {"rope_parameters": rope} | {name: getattr(model, name) for name in kept}
    if model.architecture != "olmo3":
        return {"rope_parameters": rope}
    every = model.global_every or model.num_layers + 1
    if not model.sliding_window_tokens:
        every = 1
    kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(1, model.num_layers + 1)]
    return {
        "layer_types": kinds,
        "sliding_window": model.sliding_window_tokens or block_tokens + 1,  # transformers wants one in any case
        "rope_parameters": {kind: dict(rope) for kind in ("sliding_attention", "full_attention")},
        "pad_token_id": None,
    }


def local_layers(model_config: Any) -> tuple[int, float]:
    """Layers of a transformers model that see a part of the tokens only, and how many a token sees there."""
    tokens = getattr(model_config, "attention_block_tokens", 0)
    if tokens:
        kinds = [model_config.sees_all(layer) for layer in range(model_config.num_hidden_layers)]
        return kinds.count(False), (model_config.attention_blocks - 0.5) * tokens
    local = (getattr(model_config, "layer_types", None) or []).count("sliding_attention")
    return local, model_config.sliding_window if local else 0


def _heads(model: ModelConfig) -> dict[str, Any]:
    """The sizes of attention."""
    if model.architecture != "deepseek_v3":
        return {"num_key_value_heads": model.num_key_value_heads, "head_dim": model.head_width}
    latent = model.latent
    return {
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": latent.query_rank or None,
        "kv_lora_rank": latent.key_value_rank,
        "qk_rope_head_dim": latent.rope_head_size,
        "qk_nope_head_dim": latent.plain_head_size,
        "v_head_dim": latent.value_head_size,
    }


def _experts(model: ModelConfig) -> dict[str, Any]:
    if not model.num_experts:
        return {}
    routing = {
        "num_experts_per_tok": model.experts_per_token,
        "moe_intermediate_size": model.moe_intermediate_size,
        "norm_topk_prob": model.norm_topk_prob,
    }
    if model.architecture != "deepseek_v3":
        watched = {"num_experts": model.num_experts, "router_aux_loss_coef": model.router_aux_loss_coefficient}
        return routing | watched
    return routing | {
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "first_k_dense_replace": model.num_dense_layers,
        "routed_scaling_factor": model.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        **DEEPSEEK_ROUTER,
    }


def num_experts(model_config: Any) -> int:
    """Experts of a layer of a transformers model; 0 for a dense one."""
    return max(int(getattr(model_config, name, 0) or 0) for name in _NUM_EXPERTS)


def biases_of(model: Any) -> dict[str, Any]:
    """The biases of a model's routers in float32, by name; {} where it has none."""
    return {name: buffer.float() for name, buffer in model.named_buffers() if name.endswith(BIAS)}


def set_biases(model: Any, biases: Mapping[str, Any]) -> None:
    """Put them in as they are, whatever the model computes in: a step moves them by less than bfloat16 can tell."""
    for name, bias in biases.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), BIAS, bias.to(model.device))


def attention_width(model_config: Any) -> float:
    """Of a transformers model, what `ModelConfig.attention_width` is of a config of ours."""
    heads = model_config.num_attention_heads
    if model_config.model_type == "deepseek_v3":
        return float(heads * (model_config.qk_head_dim + model_config.v_head_dim) / 2)
    return float(heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads))


def refuse_unwatched(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a model's config.json is that of a mixture of experts whose load nobody would even out."""
    family = settings.get("model_type")
    if any(settings.get(name) for name in _NUM_EXPERTS) and family not in WATCHED:
        raise ValueError(
            f"init_from_uri: a mixture of experts of type {family} is not supported; {', '.join(WATCHED)} are"
        )


def refuse_untried_with_blocks(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a model's config.json says that its layers choose blocks, and the job is none tried so."""
    wrong = [key for key, tried in WITH_BLOCKS.items() if getattr(config, key) != tried]
    wrong += ["adapter.rank"] if config.adapter.rank else []
    if settings.get("attention_block_tokens") and wrong:
        raise ValueError(
            f"init_from_uri: its layers see chosen blocks only; {', '.join(wrong)}: not tried with that, leave it out"
        )


def active_share(model: Any) -> float:
    """Share of the experts' parameters that one token is multiplied with; 1.0 for a dense model."""
    experts = num_experts(model.config)
    return int(model.config.num_experts_per_tok) / experts if experts else 1.0
