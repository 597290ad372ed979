"""How varied texts are: distinct-n over characters, and self-BLEU, of parents alone and with their variants.

distinct-n (Li et al. 2016, https://arxiv.org/abs/1510.03055): different n-grams / all n-grams. More text of the same
kind lowers it, so the number of different n-grams is given too. self-BLEU (Zhu et al. 2018,
https://arxiv.org/abs/1802.01886): mean BLEU of each text against all the others; high means alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import BLEU

from app.augmentation.config import DiversityConfig

Family = tuple[str, list[str]]  # a parent and the variants of it that were kept


def distinct(texts: Sequence[str], n: int) -> tuple[float, int]:
    """(different n-grams of characters / all of them, the number of different ones); whitespace is left out.

    >>> distinct(["abab", "ab"], 2)
    (0.5, 2)
    """
    total, seen = 0, set()
    for text in texts:
        visible = "".join(text.split())
        grams = [visible[i : i + n] for i in range(len(visible) - n + 1)]
        total += len(grams)
        seen.update(grams)
    return (len(seen) / total if total else 0.0), len(seen)


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU (0 to 100; Chinese by characters) of each text with all others as references."""
    if len(texts) < 2:
        return 0.0
    bleu = BLEU(tokenize="zh", effective_order=True)
    others = ([*texts[:index], *texts[index + 1 :]] for index in range(len(texts)))
    scores = [float(bleu.sentence_score(text, rest).score) for text, rest in zip(texts, others, strict=True)]
    return sum(scores) / len(scores)


def diversity_figures(families: Sequence[Family], config: DiversityConfig) -> dict[str, float | int]:
    """Before (parents), after (parents and variants) and after / before, of each measure.

    The families come in the order of their hashes, so that the first ones are a fair sample.
    """
    figures: dict[str, float | int] = {"parents": len(families)}
    parents = [parent for parent, _ in families]
    everything = [text for parent, variants in families for text in (parent, *variants)]
    for n in (2, 3):
        (before, num_before), (after, num_after) = distinct(parents, n), distinct(everything, n)
        figures |= _compare(f"distinct_{n}", before, after)
        figures |= _compare(f"different_{n}_grams", num_before, num_after)
    few = families[: config.num_self_bleu_documents]
    cut = config.self_bleu_characters
    before = self_bleu([parent[:cut] for parent, _ in few])
    after = self_bleu([text[:cut] for parent, variants in few for text in (parent, *variants)])
    return figures | {"self_bleu_parents": len(few)} | _compare("self_bleu", before, after)


def _compare(name: str, before: float, after: float) -> dict[str, float | int]:
    ratio = after / before if before else 0.0
    return {f"{name}_before": round(before, 4), f"{name}_after": round(after, 4), f"{name}_ratio": round(ratio, 4)}
