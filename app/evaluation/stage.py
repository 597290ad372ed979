"""Evaluation stage: held-out bits per byte, and continuations compared with what the documents say.

Documents are scored and continued in Ray tasks; the driver computes the metrics and writes the report.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from app import cluster, storage
from app.artifacts import EVALUATION, Manifest, clear, find_complete, publish, read_manifest
from app.documents import sample_texts
from app.evaluation import generation, metrics, report
from app.evaluation.config import EvaluateConfig
from app.models import encode, load_tokenizer

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 2  # more than most tokens hold: a document so long fills prompt and continuation
SAMPLES_SHOWN = 8
BASELINE_DOCUMENTS = 50_000  # training documents that the unigram models are fitted on


def run(config: EvaluateConfig) -> Manifest:
    """Make the report artifact. Raises ValueError when inputs are missing or nothing was held out."""
    uri = config.resolve(config.output_uri)
    model = read_manifest(config.resolve(config.model_uri), "model")
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    kept_out = {name: found for name, found in corpus.inputs.items() if name.startswith(EVALUATION)}
    draft = Manifest.draft("report", uri, config, {"model": model.as_input(), "corpus": corpus.as_input(), **kept_out})
    if done := find_complete(draft, config.overwrite):
        return done
    clear(uri)
    cluster.connect()
    held_out = sample_texts(corpus.uri, "held_out", config.max_documents)
    figures = _score(model.uri, corpus.uri, held_out, config)
    samples = _continue(model.uri, held_out, config)
    if samples:
        _, continuations, originals = (list(column) for column in zip(*samples, strict=True))
        from app.evaluation.overlap import continuation_scores  # slow to import

        figures |= {"continuations": len(samples), **continuation_scores(continuations, originals)}
    sources = {"model": model.uri, "corpus": corpus.uri}
    page = report.render(figures, sources, _training_log(model.uri), samples[:SAMPLES_SHOWN])
    storage.write_atomic(f"{uri}/report.html", page.encode())
    content = {"figures": figures, "sources": sources, "samples": samples[:SAMPLES_SHOWN]}
    storage.write_atomic(f"{uri}/report.json", json.dumps(content, ensure_ascii=False, indent=2).encode())
    return publish(draft, figures)


def _score(model_uri: str, corpus_uri: str, held_out: list[str], config: EvaluateConfig) -> dict[str, Any]:
    logger.info("scoring %d held-out documents", len(held_out))
    num_bytes = sum(len(text.encode()) for text in held_out)
    bits = metrics.bits_per_byte(sum(generation.score(model_uri, held_out, config.num_shards)), num_bytes)
    train = sample_texts(corpus_uri, "train", BASELINE_DOCUMENTS)
    of_bytes = metrics.unigram_bits(map(str.encode, train), map(str.encode, held_out), 256) / num_bytes
    with storage.local_copy(model_uri) as folder:
        tokenizer = load_tokenizer(folder)
    train_ids, held_out_ids = (encode(tokenizer, texts) for texts in (train, held_out))
    of_tokens = metrics.unigram_bits(train_ids, held_out_ids, len(tokenizer)) / num_bytes
    return {
        "bits_per_byte": round(bits, 4),
        "unigram_token_bits_per_byte": round(of_tokens, 4),
        "unigram_byte_bits_per_byte": round(of_bytes, 4),
        "reduction_percent": round(100 * (1 - bits / of_bytes), 2),
        "documents": len(held_out),
    }


def _continue(model_uri: str, held_out: list[str], config: EvaluateConfig) -> list[tuple[str, str, str]]:
    needed = CHARACTERS_PER_TOKEN * (config.prompt_tokens + config.continuation_tokens)
    chosen = [text for text in held_out if len(text) >= needed][: config.num_continuations]
    if not chosen:
        logger.warning("no held-out document is long enough to be continued")
        return []
    logger.info("continuing %d documents", len(chosen))
    return generation.continue_texts(model_uri, chosen, config)


def _training_log(model_uri: str) -> list[dict[str, float]]:
    uri = f"{model_uri}/training_log.jsonl"
    if not storage.exists(uri):  # a model from elsewhere
        return []
    with storage.open_file(uri, "r", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
