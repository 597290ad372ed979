import math

import pytest

from app.evaluation.metrics import bits_per_byte, unigram_bits
from app.evaluation.report import loss_curve, moving_average, render


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(nats=8 * math.log(2), num_bytes=4) == pytest.approx(2)
    assert unigram_bits([], [b"ab"], 256) == pytest.approx(2 * 8)
    # 256 counts of one and 256 more of "a": a costs -log2(257/512), b costs 9 bits
    assert unigram_bits([b"a" * 256], [b"ab"], 256) == pytest.approx(-math.log2(257 / 512) + 9)
    assert unigram_bits([[0, 1], [0]], [[0]], 2) == pytest.approx(-math.log2(3 / 5))


@pytest.mark.slow
def test_bleu_and_rouge_agree_with_their_reference_implementations() -> None:
    import sacrebleu
    from rouge_score import rouge_scorer

    from app.evaluation.overlap import continuation_scores

    predictions, references = ["曹操引兵南下至江陵", "刘备大败而走"], ["曹操引大军南下江陵", "刘备败走江夏"]
    scores = continuation_scores(predictions, references)
    assert scores["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score, abs=1e-4
    )
    spaced = [
        (" ".join(map(str, map(ord, given))), " ".join(map(str, map(ord, wanted))))
        for given, wanted in zip(predictions, references, strict=True)
    ]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])  # code points as words: what characters must give
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = sum(scorer.score(wanted, given)[name].fmeasure for given, wanted in spaced) / 2
        assert scores[name] == pytest.approx(expected, abs=1e-4)
    assert 0 < scores["rouge2"] < scores["rouge1"] < 1


def test_the_report_shows_figures_curve_and_samples_and_loads_nothing() -> None:
    log = [{"step": step, "loss": 8.0 - step} for step in range(3)]
    log[-1]["held_out_bits_per_byte"] = 2.5
    page = render({"bits_per_byte": 2.3456}, {"model": "/run/model"}, log, [("却说", "<b>曹操", "孔明")])
    assert "2.3456" in page
    assert "<svg" in page
    assert "&lt;b&gt;曹操" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert "/run/model" in page


def test_a_curve_without_evaluation_is_drawn() -> None:
    assert loss_curve([{"step": 0, "loss": 1.0}]).startswith("<svg")


def test_the_moving_average_starts_at_the_first_value_and_forgets() -> None:
    assert moving_average([4.0, 4.0, 4.0]) == pytest.approx([4, 4, 4])
    assert moving_average([0.0, 1.0], memory=0.5) == pytest.approx([0, 2 / 3])
