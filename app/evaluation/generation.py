"""A model at work on Ray: scoring documents and continuing them greedily, in shards.

Each shard is a Ray task that loads the model with transformers. Results come back in the order of the documents, so
that the figures do not depend on the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from app import cluster, storage
from app.evaluation.config import EvaluateConfig
from app.models import encode, load_model, load_tokenizer, score_documents

GENERATION_SEQUENCES = 16


def score(model_uri: str, texts: list[str], num_shards: int) -> list[float]:
    """Negative log-likelihood of each text in nats."""
    return _in_shards(_score_shard, model_uri, texts, num_shards)


def continue_texts(model_uri: str, texts: list[str], config: EvaluateConfig) -> list[tuple[str, str, str]]:
    """(prompt, greedy continuation, the document's own continuation) of each text that is long enough."""
    lengths = (config.prompt_tokens, config.continuation_tokens)
    samples = _in_shards(_continue_shard, model_uri, texts, config.num_shards, *lengths)
    return [sample for sample in samples if sample]


def _in_shards(
    work: Callable[..., list[Any]], model_uri: str, texts: list[str], num_shards: int, *extra: int
) -> list[Any]:
    task = ray.remote(work).options(num_cpus=1, num_gpus=1 if cluster.has_gpu() else 0)
    shards = [texts[index::num_shards] for index in range(num_shards)]
    results = ray.get([task.remote(model_uri, shard, *extra) for shard in shards if shard])
    return [results[index % num_shards][index // num_shards] for index in range(len(texts))]


def _load(model_uri: str) -> tuple[Any, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    with storage.local_copy(model_uri) as folder:
        model = load_model(folder, "bfloat16" if on_gpu else "float32")
        tokenizer = load_tokenizer(folder)
    return model.to("cuda" if on_gpu else "cpu"), tokenizer


def _score_shard(model_uri: str, texts: list[str]) -> list[float]:
    model, tokenizer = _load(model_uri)
    return score_documents(model, encode(tokenizer, texts), tokenizer.eos_token_id)


def _continue_shard(
    model_uri: str, texts: list[str], prompt_tokens: int, continuation_tokens: int
) -> list[tuple[str, str, str] | None]:
    import torch

    model, tokenizer = _load(model_uri)
    documents = encode(tokenizer, texts)
    samples: list[tuple[str, str, str] | None] = [None] * len(documents)
    enough = [i for i, tokens in enumerate(documents) if len(tokens) >= prompt_tokens + continuation_tokens]
    for start in range(0, len(enough), GENERATION_SEQUENCES):
        chosen = enough[start : start + GENERATION_SEQUENCES]
        batch = [documents[index] for index in chosen]
        prompts = torch.tensor([[tokenizer.eos_token_id, *tokens[:prompt_tokens]] for tokens in batch])  # [B, P + 1]
        generated = model.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=continuation_tokens,
            min_new_tokens=continuation_tokens,
            do_sample=False,
        )[:, prompts.shape[1] :]
        for index, tokens, new in zip(chosen, batch, generated.tolist(), strict=True):
            own = tokens[prompt_tokens : prompt_tokens + continuation_tokens]
            prompt = tokenizer.decode(tokens[:prompt_tokens])
            samples[index] = (prompt, tokenizer.decode(new, skip_special_tokens=True), tokenizer.decode(own))
    return samples
