"""vLLM answers from the model families that training makes as transformers does."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.models import load_model
from app.serving.config import ServeConfig
from app.serving.engine import engine_arguments, engine_environment
from tests.serving.engines import in_own_process
from tests.serving.tiny import TEXT, VOCABULARY

pytestmark = pytest.mark.slow

FAMILIES = (
    "qwen3",
    "qwen3_moe",
    "deepseek_v3",
    "deepseek_v3 with latent queries",
    "olmo3 local",
    "olmo3 local and global",
)
NEW_TOKENS, NUM_LOGPROBS = 12, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # wide enough for clear favourites among the tokens
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from app.tokens import tokenizer as bpe

    torch.manual_seed(0)
    if family.startswith("olmo3"):
        model = AutoModelForCausalLM.from_config(windowed(2 if "global" in family else 0))
    elif family.startswith("deepseek_v3"):
        model = AutoModelForCausalLM.from_config(latent(48 if "latent queries" in family else 0))
        for router in (layer.mlp.gate for layer in model.model.layers[1:]):
            router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.3, 0.1, -0.1]))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))
    model.save_pretrained(folder)
    bpe.save(bpe.train([TEXT] * 2, VOCABULARY, 2), folder)


def windowed(global_every: int) -> Any:
    """The config that training makes: a window that the longer prompts exceed."""
    from app.training.config import TrainConfig
    from app.training.families import architecture

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 4, "num_heads": 4, "num_key_value_heads": 2}
    windows = {"architecture": "olmo3", "sliding_window_tokens": 32, "global_every": global_every}
    config = TrainConfig.model_validate({"model": sizes | windows})
    made = architecture(config, {"vocab_size": VOCABULARY, "block_tokens": 256, "end_of_text_id": 0})
    made.initializer_range = 0.1
    return made


def latent(query_rank: int) -> Any:
    """The config that training makes of a small DeepSeek-V3."""
    from app.training.config import TrainConfig
    from app.training.families import architecture

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 3, "num_heads": 4, "tie_embeddings": False}
    experts = {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 64, "routed_scaling_factor": 1.5}
    more = {"num_shared_experts": 2, "num_dense_layers": 1, "norm_topk_prob": bool(query_rank)}
    widths = {"key_value_rank": 64, "query_rank": query_rank, "rope_head_size": 16, "plain_head_size": 48}
    given = {"architecture": "deepseek_v3", "latent": widths | {"value_head_size": 32}}
    config = TrainConfig.model_validate({"model": sizes | experts | more | given})
    made = architecture(config, {"vocab_size": VOCABULARY, "block_tokens": 256, "end_of_text_id": 0})
    made.initializer_range = 0.1
    return made


def answers(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], dict[int, float]]]:
    """Of vLLM's engine in this process, set as an endpoint sets it: the tokens of each greedy answer, and logprobs of
    the first.
    """
    config = ServeConfig(model_uri=str(folder), enforce_eager=True, kv_cache_gib=1 / 16)
    os.environ.update(engine_environment(config, use_gpu=False))
    import vllm

    engine = vllm.LLM(str(folder), seed=0, **engine_arguments(config, use_gpu=False))
    options = vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=NUM_LOGPROBS, ignore_eos=True)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
    return [
        (list(one.outputs[0].token_ids), {token: found.logprob for token, found in one.outputs[0].logprobs[0].items()})
        for one in made
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_and_logprobs_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    write_model(tmp_path, family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (5, 40, 150)]
    served = in_own_process(answers, tmp_path, prompts)
    model = load_model(tmp_path)
    for prompt, (tokens, logprobs) in zip(prompts, served, strict=True):
        sequence = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            wanted = model(sequence).logits[0, len(prompt) - 1 :].log_softmax(-1)  # [NEW_TOKENS + 1, V]
        assert list(logprobs.values()) == pytest.approx(wanted[0, list(logprobs)].tolist(), abs=1e-4)
        assert tokens == wanted[:-1].argmax(-1).tolist()
