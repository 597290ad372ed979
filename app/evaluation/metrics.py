"""What is measured of a model: likelihood, likeness of its texts to others, variety; each with its uncertainty.

A Measure turns items (documents, pairs of texts, questions) into rows of sums and the total of the rows into a value,
so that one bootstrap over rows (Efron 1979) gives the interval of any of them, BLEU's and chrF's included.
BLEU and ROUGE are those of sacrebleu and rouge_score; the others agree with their reference implementations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # of predictions to references
Numbers = NDArray[np.float64]
TEXTS = {"predictions": "string", "references": "string"}
RESAMPLES = 1000
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
CHARACTERS = "each Chinese character, each other word; lower case, no punctuation"
MIN_CHINESE = 0.3  # of the references' characters: from here on BLEU cuts as for Chinese
_UNIT = regex.compile(r"\p{Han}|[[^\W_]--\p{Han}]+", regex.VERSION1)
_HAN = regex.compile(r"\p{Han}")


class Figure(NamedTuple):
    """A value, the bounds within which 95 % of resampled ones lie, how many items it is of, and how texts are cut."""

    value: float
    low: float
    high: float
    n: int
    tokenisation: str


@dataclass(frozen=True)
class Measure:
    """`rows` gives [n, k] sums of n items whose columns are named, `score` a value from their total [k]."""

    name: str
    tokenisation: str
    columns: dict[str, str]  # name of a column -> its Arrow type
    rows: Callable[..., Numbers]
    score: Callable[[Numbers], float]


def evaluate(measure: Measure, rows: Numbers, seed: int = 0) -> Figure:
    """The measure's value with its 95 % interval, from resampled items. Raises ValueError when there is no item."""
    if not len(rows):
        raise ValueError(f"{measure.name}: nothing to measure")
    rng = np.random.default_rng(seed)
    n = len(rows)
    resampled = [
        measure.score(np.bincount(rng.integers(n, size=n), minlength=n) @ rows)  # [n] @ [n, k]
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Figure(float(measure.score(rows.sum(0))), float(low), float(high), n, measure.tokenisation)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross-entropy in bits over UTF-8 bytes; comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def unigram_bits(train: Iterable[Iterable[int]], held_out: Iterable[Iterable[int]], num_symbols: int) -> float:
    """What held_out costs under a model that knows only how frequent each symbol is, in bits.

    Symbols are 0 ≤ symbol < num_symbols: bytes or token ids; frequencies are those of train with add-one smoothing.
    """
    counts = Counter(dict.fromkeys(range(num_symbols), 1))
    for sequence in train:
        counts.update(sequence)
    total = counts.total()
    seen: Counter[int] = Counter()
    for sequence in held_out:
        seen.update(sequence)
    return sum(number * -math.log2(counts[symbol] / total) for symbol, number in seen.items())


def likelihood_measures() -> list[Measure]:
    """Of documents, whose negative log-likelihoods are known in nats: bits per byte, and perplexity of a token."""
    columns = {"nats": "float64", "num_bytes": "int64", "num_tokens": "int64"}

    def rows(nats: Sequence[float], num_bytes: Sequence[int], num_tokens: Sequence[int]) -> Numbers:
        return np.column_stack([nats, num_bytes, num_tokens]).astype(float)

    return [
        Measure("bits_per_byte", "none (UTF-8 bytes)", columns, rows, lambda sums: bits_per_byte(sums[0], sums[1])),
        Measure("perplexity", "the model's tokens", columns, rows, lambda sums: math.exp(sums[0] / sums[2])),
    ]


def text_measures(references: Sequence[str], similarity: Similarity, encoder_name: str) -> list[Measure]:
    """Of what a model wrote, beside what it should have written: likeness, then variety; similarity is BERTScore's."""
    return [
        bleu(choose_bleu_tokenizer(references)),
        chrf(),
        *(rouge(name) for name in ROUGE_TYPES),
        bertscore(similarity, encoder_name),
        distinct(1),
        distinct(2),
        repetition(),
    ]


def choose_bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's "zh" for Chinese texts, else its default "13a"."""
    num_characters = sum(len("".join(text.split())) for text in references)
    num_chinese = sum(len(_HAN.findall(text)) for text in references)
    return "zh" if num_chinese >= MIN_CHINESE * max(num_characters, 1) else "13a"


def bleu(tokenizer: str) -> Measure:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, by sacrebleu with one of its tokenizers."""
    from sacrebleu import BLEU

    scorer = BLEU(tokenize=tokenizer, effective_order=True)  # silences a warning; only counts of sentences are used

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Numbers:
        found = [scorer.sentence_score(given, [own]) for given, own in zip(predictions, references, strict=True)]
        return np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in found], dtype=float)

    def score(sums: Numbers) -> float:
        sys_len, ref_len, *counts = sums.astype(int).tolist()
        return float(BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp").score)

    return Measure("bleu", f"sacrebleu {tokenizer}", TEXTS, rows, score)


def chrf() -> Measure:
    """Corpus chrF2 (Popović 2015), 0 to 100: F-score, recall twice as heavy, over 1 to 6 characters without spaces."""
    orders = range(1, 7)

    def counts(given: str, own: str) -> list[int]:
        sums = []
        for order in orders:
            ours, theirs = (Counter(ngrams("".join(text.split()), order)) for text in (given, own))
            sums += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
        return sums

    def score(sums: Numbers) -> float:
        given, own, common = sums.reshape(len(orders), 3).T
        known = (given > 0) & (own > 0)  # texts may be shorter than 6
        if not known.any():
            return 0.0
        precision, recall = (common[known] / given[known]).mean(), (common[known] / own[known]).mean()
        return float(100 * 5 * precision * recall / (4 * precision + recall)) if precision + recall else 0.0

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Numbers:
        return np.array([counts(*pair) for pair in zip(predictions, references, strict=True)], dtype=float)

    return Measure("chrf", "characters, spaces left out", TEXTS, rows, score)


def rouge(name: str) -> Measure:
    """Mean F-measure of a ROUGE type (Lin 2004), 0 to 1; rouge_score's own tokenizer drops Chinese, ours does not."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([name], tokenizer=_Units())

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Numbers:
        pairs = zip(predictions, references, strict=True)
        return _to_average([scorer.score(own, given)[name].fmeasure for given, own in pairs])

    return Measure(name, CHARACTERS, TEXTS, rows, _average)


def bertscore(similarity: Similarity, encoder_name: str) -> Measure:
    """Mean F1 of BERTScore, -1 to 1, not rescaled."""

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Numbers:
        return _to_average(similarity(predictions, references))

    return Measure("bertscore", f"sub-words of {encoder_name}", TEXTS, rows, _average)


def distinct(order: int) -> Measure:
    """Share of a text's n-grams that are different (Li et al. 2016), averaged over texts that have any."""

    def rows(predictions: Sequence[str], references: Sequence[str]) -> Numbers:
        found = [ngrams(_Units().tokenize(text), order) for text in predictions]
        return _to_average([len(set(one)) / len(one) if one else None for one in found])

    return Measure(f"distinct_{order}", CHARACTERS, TEXTS, rows, _average)


def repetition() -> Measure:
    """Share of a text's 4-grams that it had before (seq-rep-4 of Welleck et al. 2020), averaged over texts."""
    varied = distinct(4)
    return Measure("repetition", CHARACTERS, TEXTS, varied.rows, lambda sums: 1 - _average(sums) if sums[1] else 0.0)


def accuracy(name: str, protocol: str, num_subjects: int) -> Measure:
    """Share of questions answered rightly, averaged over subjects; with one subject, over questions."""

    def rows(is_right: Sequence[float], subject: Sequence[int]) -> Numbers:
        sums = np.zeros((len(is_right), 2, num_subjects))
        sums[np.arange(len(is_right)), 0, subject] = is_right
        sums[np.arange(len(is_right)), 1, subject] = 1
        return sums.reshape(len(is_right), -1)

    def score(sums: Numbers) -> float:
        right, asked = sums.reshape(2, num_subjects)
        return float((right[asked > 0] / asked[asked > 0]).mean())

    return Measure(name, protocol, {"is_right": "float64", "subject": "int64"}, rows, score)


def speed(batch: int, num_tokens: int, ran_on: str) -> Measure:
    """Tokens a second of runs that took so many seconds, each for as many tokens."""

    def rows(seconds: Sequence[float]) -> Numbers:
        return np.array([[num_tokens, one] for one in seconds])

    return Measure(f"tokens_per_second_{batch}", ran_on, {"seconds": "float64"}, rows, lambda sums: sums[0] / sums[1])


def ngrams(units: Sequence[str], order: int) -> list[tuple[str, ...]]:
    """All runs of that many units."""
    return list(zip(*(units[start:] for start in range(order)), strict=False))


class _Units:
    """The tokenizer that rouge_score asks for: Chinese characters and other words."""

    def tokenize(self, text: str) -> list[str]:
        return _UNIT.findall(text.lower())


def _to_average(values: Sequence[float | None]) -> Numbers:
    """Rows whose total is what `_average` divides; None counts for nothing."""
    return np.array([[value or 0.0, value is not None] for value in values], dtype=float).reshape(-1, 2)


def _average(sums: Numbers) -> float:
    return float(sums[0] / sums[1]) if sums[1] else 0.0
