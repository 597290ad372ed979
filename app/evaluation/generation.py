"""A model at work on Ray: scoring documents, continuing them greedily, comparing answers, in shards.

Actors hold the model and take one shard after the other; what a shard gave is stored at once under a hash of model and
shard, so a rerun goes on where the last one ended. Shards do not depend on the number of actors, nor do the figures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import ray

from app import cluster, storage
from app.artifacts import Input
from app.evaluation import encoders
from app.evaluation.config import ChoiceConfig, EvaluateConfig
from app.evaluation.likelihood import Likelihood, encode_pair, score_pairs
from app.models import encode, load_model, load_tokenizer, score_documents

logger = logging.getLogger(__name__)

GENERATION_SEQUENCES = 16  # documents in a shard, and in a batch
SCORED_DOCUMENTS = 64  # in a shard
COMPARED_PAIRS = 128  # in a shard: a question has as many pairs as choices
SIMILAR_PAIRS = 64  # in a shard
RESTARTS = 2  # of an actor whose process died; its shard is done again

Work = Callable[..., list[Any]]  # (model, tokenizer, items, *settings) -> a result of each item, as JSON has it


class Workers:
    """Ray actors with one model, and the folder that keeps what shards gave. A context manager."""

    def __init__(self, model: Input, scratch_uri: str, num_workers: int) -> None:
        self._model = model
        self._scratch_uri = scratch_uri
        self._num_workers = num_workers
        self._actors: list[Any] = []

    @property
    def model_uri(self) -> str:
        """Where the model lies."""
        return self._model.uri

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def score(self, texts: list[str]) -> list[float]:
        """Negative log-likelihood of each text in nats."""
        return self.map(_score, texts, SCORED_DOCUMENTS)

    def continue_texts(self, texts: list[str], config: EvaluateConfig) -> list[tuple[str, str, str]]:
        """(prompt, greedy continuation, the document's own continuation) of each text that is long enough."""
        lengths = (config.prompt_tokens, config.continuation_tokens)
        samples = self.map(_continue, texts, GENERATION_SEQUENCES, *lengths)
        return [tuple(sample) for sample in samples if sample]

    def compare(self, benchmark: ChoiceConfig, pairs: list[tuple[str, str]]) -> list[Likelihood]:
        """The likelihood of each continuation after its context, by the model or by the benchmark's endpoint."""
        endpoint = (benchmark.endpoint_url, benchmark.endpoint_model) if benchmark.endpoint_url else ()
        return [Likelihood(*found) for found in self.map(_compare, pairs, COMPARED_PAIRS, *endpoint)]

    def similarity(self, config: EvaluateConfig, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """BERTScore's F1 of each pair; here for the actors' sake: one thread each, whatever else the machine does."""
        pairs = list(zip(predictions, references, strict=True))
        return self.map(_similarity, pairs, SIMILAR_PAIRS, config.bertscore_dir, config.bertscore_layer)

    def map(self, work: Work, items: Sequence[Any], shard_items: int, *settings: int | str) -> list[Any]:
        """What the work gives for each item, in their order; shards done before are read, the others done and kept."""
        shards = [items[start : start + shard_items] for start in range(0, len(items), shard_items)]
        files = [self._file(work, shard, settings) for shard in shards]
        missing = [index for index, file in enumerate(files) if not storage.exists(file)]
        if len(missing) < len(shards):
            logger.info("%d of %d shards were done before", len(shards) - len(missing), len(shards))
        for index, result in self._run(work, {index: shards[index] for index in missing}, settings):
            storage.write_atomic(files[index], json.dumps(result, ensure_ascii=False).encode())
        return [result for file in files for result in _read(file)]

    def _file(self, work: Work, shard: Sequence[Any], settings: tuple[int | str, ...]) -> str:
        content = json.dumps([work.__name__, self._model.digest, settings, shard], ensure_ascii=False)
        return f"{self._scratch_uri}/{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"

    def _run(
        self, work: Work, shards: dict[int, Sequence[Any]], settings: tuple[int | str, ...]
    ) -> Iterator[tuple[int, list[Any]]]:
        """Results by index as they come. An actor that the cluster has no room for yet is given nothing to do."""
        for _ in range(min(self._num_workers, len(shards)) - len(self._actors)):
            options = {"num_cpus": 1, "num_gpus": 1 if cluster.has_gpu() else 0}
            restarts = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
            self._actors.append(ray.remote(_Reader).options(**options, **restarts).remote(self._model.uri))
        waiting = iter(shards.items())
        running: dict[Any, tuple[Any, int | None]] = {one.is_ready.remote(): (one, None) for one in self._actors}
        num_left = len(shards)
        while num_left:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, index = running.pop(done)
            result = ray.get(done)
            if index is not None:
                num_left -= 1
                yield index, result
            if following := next(waiting, None):
                running[actor.work.remote(work, following[1], settings)] = (actor, following[0])


class _Reader:
    """An actor: loads the model once, at the first call, so that an error there reaches the caller as it is."""

    def __init__(self, model_uri: str) -> None:
        self._model_uri = model_uri

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch

        on_gpu = torch.cuda.is_available()
        with storage.local_copy(self._model_uri) as folder:
            model = load_model(folder, "bfloat16" if on_gpu else "float32").to("cuda" if on_gpu else "cpu")
            return model, load_tokenizer(folder)

    def is_ready(self) -> bool:
        return bool(self._loaded)

    def work(self, work: Work, items: Sequence[Any], settings: tuple[int | str, ...]) -> list[Any]:
        return work(*self._loaded, items, *settings)


def _read(file: str) -> list[Any]:
    with storage.open_file(file) as opened:
        found: list[Any] = json.load(opened)
    return found


def _score(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[float]:
    return score_documents(model, encode(tokenizer, texts), tokenizer.eos_token_id)


def _compare(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *endpoint: str) -> list[Likelihood]:
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    if endpoint:
        from app.evaluation.endpoint import ask

        return ask(encoded, model.config.max_position_embeddings, *endpoint)
    return score_pairs(model, encoded)


def _similarity(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], folder: str, layer: int) -> list[float]:
    encoder = encoders.hugging_face_tokens(folder, layer) if folder else encoders.bundled_tokens()
    return encoders.f_measures(encoder, *zip(*pairs, strict=True))


def _continue(
    model: Any, tokenizer: Any, texts: Sequence[str], prompt_tokens: int, continuation_tokens: int
) -> list[tuple[str, str, str] | None]:
    import torch

    documents = encode(tokenizer, texts)
    samples: list[tuple[str, str, str] | None] = [None] * len(documents)
    enough = [i for i, tokens in enumerate(documents) if len(tokens) >= prompt_tokens + continuation_tokens]
    if not enough:
        return samples
    batch = [documents[index] for index in enough]
    prompts = torch.tensor([[tokenizer.eos_token_id, *tokens[:prompt_tokens]] for tokens in batch])  # [B, P + 1]
    generated = model.generate(
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts).to(model.device),
        max_new_tokens=continuation_tokens,
        min_new_tokens=continuation_tokens,
        do_sample=False,
    )[:, prompts.shape[1] :]
    for index, tokens, new in zip(enough, batch, generated.tolist(), strict=True):
        own = tokens[prompt_tokens : prompt_tokens + continuation_tokens]
        prompt = tokenizer.decode(tokens[:prompt_tokens])
        samples[index] = (prompt, tokenizer.decode(new, skip_special_tokens=True), tokenizer.decode(own))
    return samples
