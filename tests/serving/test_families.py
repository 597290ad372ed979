"""vLLM answers from the model families that training makes as transformers does."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from app.models import load_model
from tests.serving.tiny import TEXT, VOCABULARY

pytestmark = pytest.mark.slow

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


def answers(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], dict[int, float]]]:
    """Of vLLM's engine in this process: the tokens of each greedy answer, and logprobs of the first."""
    import vllm

    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 26, seed=0)
    options = vllm.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=NUM_LOGPROBS, ignore_eos=True)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
    return [
        (list(one.outputs[0].token_ids), {token: found.logprob for token, found in one.outputs[0].logprobs[0].items()})
        for one in made
    ]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "olmo3 local", "olmo3 local and global"])
def test_greedy_answers_and_logprobs_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    write_model(tmp_path, family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (5, 40, 150)]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        served = pool.submit(answers, tmp_path, prompts).result()
    model = load_model(tmp_path)
    for prompt, (tokens, logprobs) in zip(prompts, served, strict=True):
        sequence = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            wanted = model(sequence).logits[0, len(prompt) - 1 :].log_softmax(-1)  # [NEW_TOKENS + 1, V]
        assert list(logprobs.values()) == pytest.approx(wanted[0, list(logprobs)].tolist(), abs=1e-4)
        assert tokens == wanted[:-1].argmax(-1).tolist()
