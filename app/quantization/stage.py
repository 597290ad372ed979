"""Quantization stage: a Ray task with the backend's overlay first on its path makes the 4-bit model.

llm-compressor and vLLM pin different versions of compressed-tensors; its overlay holds the former's and is seen by
this task alone, and so is AutoAWQ's. The result's bits per byte are measured beside the source's, on the same held-out
documents: what loses more than the gate allows is kept and marked, and the endpoint refuses it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import ray

from app import cluster, overlays, storage
from app.artifacts import GATE, Manifest, clear, find_complete, publish, read_manifest
from app.documents import sample_texts
from app.quantization.awq import refuse_blocks, refuse_experts, refuse_group_size
from app.quantization.config import QuantizeConfig

logger = logging.getLogger(__name__)

OVERLAYS = {  # backend -> names of overlays, and a package in each
    "llm-compressor": {"quantization": "llmcompressor"},
    "autoawq": {"autoawq": "awq", "quantization": "llmcompressor"},  # the latter packs
}
PASSED = "passed"
CALIBRATION_DOCUMENTS = 20_000  # read at most; the sample is drawn from them


def run(config: QuantizeConfig) -> Manifest:
    """Make the quantized model artifact. Raises ValueError when inputs or the overlay are missing."""
    uri = config.resolve(config.output_uri)
    model = read_manifest(config.resolve(config.model_uri), "model")
    corpus = read_manifest(config.resolve(config.corpus_uri), "corpus")
    draft = Manifest.draft("model", uri, config, {"model": model.as_input(), "corpus": corpus.as_input()})
    if done := find_complete(draft, config.overwrite):
        return done
    path = overlays.python_path(OVERLAYS[config.backend], config.backend)
    with storage.open_file(f"{model.uri}/config.json") as file:
        model_config = json.load(file)
    refuse_experts(model_config)
    refuse_blocks(model_config)
    for size in (*config.group_sizes, *config.layer_group_sizes.values()):
        refuse_group_size(model_config, size)
    clear(uri)
    cluster.connect()
    logger.info("quantizing %s by %s, group size %d", model.uri, config.backend, config.group_size)
    quiet = {"TQDM_DISABLE": "1"}  # else a bar for each layer and step
    task = ray.remote(_quantize).options(
        runtime_env={"env_vars": {"PYTHONPATH": path, **quiet, **cluster.KEEP_FREED_MEMORY}},
        num_cpus=config.num_cpus,
        num_gpus=1 if cluster.has_gpu() else 0,
    )
    figures = ray.get(task.remote(model.uri, corpus.uri, uri, config))
    if figures[GATE] != PASSED:
        logger.error("%s: %s; the endpoint will refuse it", uri, figures[GATE])
    return publish(draft, figures)


def judge(loss_percent: float, max_loss_percent: float) -> str:
    """What the gate says of a loss: PASSED, or why not. A loss that is not a number passes no gate."""
    if loss_percent <= max_loss_percent:
        return PASSED
    return f"failed: bits per byte {loss_percent:+.2f} %, allowed {max_loss_percent:+g} % (max_loss_percent)"


def _quantize(model_uri: str, corpus_uri: str, uri: str, config: QuantizeConfig) -> dict[str, Any]:
    import torch

    from app.models import encode, load_model, load_tokenizer
    from app.quantization import autoawq, awq
    from app.quantization.comparison import bits_per_byte, next_tokens, same_percent

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tried: dict[str, float] = {}
    with storage.local_copy(model_uri) as model_dir, tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(model_dir)
        held_out = sample_texts(corpus_uri, "held_out", config.num_comparison_documents)
        documents = encode(tokenizer, sample_texts(corpus_uri, "train", CALIBRATION_DOCUMENTS))
        dtype = "bfloat16" if device == "cuda" else "float32"
        model = load_model(model_dir, dtype).to(device)
        if hasattr(model.config, "quantization_config"):
            raise ValueError(f"model_uri: {model_uri} is quantized already; name the model it was made from")
        awq.refuse_layer_group_sizes(*awq.modules_of(model), config)
        before, expected = bits_per_byte(model, tokenizer, held_out), next_tokens(model, tokenizer, held_out)
        window_tokens = min(model.config.max_position_embeddings, 2048)
        windows = awq.choose_windows(documents, config.num_calibration_samples, window_tokens, config.seed)
        for group_size in config.group_sizes:
            if tried:  # what was quantized before is no longer the model
                model = load_model(model_dir, dtype).to(device)
            chosen = config.model_copy(update={"group_size": group_size})
            if config.backend == "autoawq":
                autoawq.search(model, windows, chosen)
                awq.round_weights(model, windows, chosen)
            else:
                awq.quantize(model, windows, chosen)
            after = bits_per_byte(model, tokenizer, held_out)
            loss_percent = round(100 * (after / before - 1), 2)
            tried[f"group_{group_size}"] = loss_percent
            verdict = judge(loss_percent, config.max_loss_percent)
            logger.info("group size %d: bits per byte %.4f -> %.4f, %s", group_size, before, after, verdict)
            if verdict == PASSED:
                break
        same = same_percent(expected, next_tokens(model, tokenizer, held_out))
        awq.save(model, Path(folder))
        load_tokenizer(model_dir).save_pretrained(folder)
        sizes = awq.linear_sizes(Path(folder))
        storage.upload(Path(folder), uri)
    return {
        "bits_per_byte_before": round(before, 4),
        "bits_per_byte_after": round(after, 4),
        "loss_percent": loss_percent,
        "same_next_token_percent": same,
        GATE: verdict,
        "group_size": group_size,
        "tried_loss_percent": tried,
        "calibration_tokens": sum(map(len, windows)),
        **sizes,
    }
