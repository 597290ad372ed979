"""distinct-n and self-BLEU on cases counted by hand."""

import pytest

from app.augmentation.config import DiversityConfig
from app.augmentation.diversity import distinct, diversity_figures, self_bleu


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["天下天下"], 2, (2 / 3, 2)),  # 天下 下天 天下
        (["天下天下", "天 下"], 2, (2 / 4, 2)),  # n-grams do not cross documents; whitespace is not counted
        (["天下大势", "天下大事"], 3, (3 / 4, 3)),  # 天下大 下大势 天下大 下大事
        (["天"], 2, (0.0, 0)),
        ([], 3, (0.0, 0)),
    ],
)
def test_distinct(texts: list[str], n: int, expected: tuple[float, int]) -> None:
    assert distinct(texts, n) == pytest.approx(expected)


def test_self_bleu() -> None:
    assert self_bleu(["天下大势分久必合"] * 3) == pytest.approx(100)
    assert self_bleu(["天下大势", "天下大势", "张飞关羽"]) == pytest.approx(200 / 3)  # the third shares nothing
    assert self_bleu(["天下大势"]) == 0
    # 天下大势 against 天下大事: 3 of 4, 2 of 3, 1 of 2 n-grams, and 4-grams 0 of 1, smoothed to 1/2 of one
    assert self_bleu(["天下大势", "天下大事"]) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))


def test_figures_compare_parents_with_all() -> None:
    families = [("天下大势", ["天下大事"]), ("分久必合", [])]
    figures = diversity_figures(families, DiversityConfig())
    assert (figures["distinct_2_before"], figures["distinct_2_after"]) == (1.0, pytest.approx(7 / 9, abs=1e-4))
    assert (figures["different_2_grams_before"], figures["different_2_grams_after"]) == (6, 7)
    assert figures["different_2_grams_ratio"] == pytest.approx(7 / 6, abs=1e-4)
    assert figures["self_bleu_before"] == 0
    assert figures["self_bleu_after"] > 30  # a variant is like its parent: self-BLEU rises, and is reported so
    assert (figures["parents"], figures["self_bleu_parents"]) == (2, 2)
