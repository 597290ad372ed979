"""BLEU and ROUGE of continuations against references, without a network.

BLEU (Papineni et al. 2002) is by sacrebleu with its Chinese tokenisation, ROUGE (Lin 2004) by rouge_score on Chinese
characters and Latin words. Both are `evaluate.Metric`s; `evaluate.load` would fetch their scripts from a hub.
"""

from __future__ import annotations

import re
from typing import Any

import datasets
import evaluate
import sacrebleu
from rouge_score import rouge_scorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
_TOKEN = re.compile(r"[a-z0-9]+|[^\s\w]|\w")


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """Corpus BLEU, 0 to 100; tokenize="zh" cuts Chinese into characters."""

    def _info(self) -> Any:
        return _metric_info("Corpus BLEU by sacrebleu, tokenised for Chinese.")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score}


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F-measure of ROUGE-1, -2 and -L, 0 to 1, over characters (its own tokeniser drops Chinese)."""

    def _info(self) -> Any:
        return _metric_info("ROUGE by rouge_score over Chinese characters and Latin words.")

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, tokenizer=_CharacterTokenizer())
        scores = [scorer.score(reference, given) for given, reference in zip(predictions, references, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE_TYPES}


class _CharacterTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def continuation_scores(predictions: list[str], references: list[str]) -> dict[str, float]:
    """BLEU and ROUGE of continuations against what the documents say, rounded to 4 digits."""
    scores: dict[str, float] = {}
    for metric in (Bleu(), Rouge()):
        scores |= metric.compute(predictions=predictions, references=references)
    return {name: round(value, 4) for name, value in scores.items()}


def _metric_info(description: str) -> Any:
    text = datasets.Value("string")
    features = datasets.Features({"predictions": text, "references": text})
    return evaluate.MetricInfo(description=description, citation="", features=features)
