"""Each measure against its reference implementation, and the interval against what is known of means."""

import math

import numpy as np
import pytest

from app.evaluation import metrics
from app.evaluation.metrics import bits_per_byte, unigram_bits

CHINESE = (
    ["曹操引兵南下至江陵。", "刘备大败而走", "孔明夜观天象", "却说却说却说却说却说", "走"],
    ["曹操引大军南下江陵，", "刘备败走江夏", "孔明夜观天象", "且说孙权问计于众", "关羽"],
)
ENGLISH = (
    ["The cat sat on the mat.", "He reads a book", "well-known, isn't it", "a b", ""],
    ["A cat is sitting on the mat!", "He read the book 3 times", "it is well known", "a b c d", "nothing"],
)
MIXED = (["曹操 reads 3 本书", "GPT-4 模型"], ["曹操 read 三本书", "GPT 4 大模型"])


def value_of(measure: metrics.Measure, texts: tuple[list[str], list[str]]) -> float:
    return metrics.evaluate(measure, measure.rows(*texts)).value


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(nats=8 * math.log(2), num_bytes=4) == pytest.approx(2)
    assert unigram_bits([], [b"ab"], 256) == pytest.approx(2 * 8)
    # 256 counts of one and 256 more of "a": a costs -log2(257/512), b costs 9 bits
    assert unigram_bits([b"a" * 256], [b"ab"], 256) == pytest.approx(-math.log2(257 / 512) + 9)
    assert unigram_bits([[0, 1], [0]], [[0]], 2) == pytest.approx(-math.log2(3 / 5))


def test_perplexity_by_hand() -> None:
    bits, perplexity = metrics.likelihood_measures()
    # two documents: a token of probability 1/2 and one of 1/8 in 3 bytes; a token of 1/16 in 5 bytes
    rows = perplexity.rows(nats=[math.log(2) + math.log(8), math.log(16)], num_bytes=[3, 5], num_tokens=[2, 1])
    assert metrics.evaluate(perplexity, rows).value == pytest.approx((2 * 8 * 16) ** (1 / 3), abs=1e-6)
    assert metrics.evaluate(bits, rows).value == pytest.approx((1 + 3 + 4) / 8, abs=1e-6)


@pytest.mark.parametrize("texts", [CHINESE, ENGLISH, MIXED], ids=["chinese", "english", "mixed"])
@pytest.mark.parametrize("tokenizer", ["zh", "13a"])
def test_bleu_and_chrf_are_those_of_sacrebleu(texts: tuple[list[str], list[str]], tokenizer: str) -> None:
    import sacrebleu

    predictions, references = texts
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    assert value_of(metrics.bleu(tokenizer), texts) == pytest.approx(expected, abs=1e-6)
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert value_of(metrics.chrf(), texts) == pytest.approx(expected, abs=1e-6)
    single = ([predictions[0]], [references[0]])
    expected = sacrebleu.sentence_chrf(predictions[0], [references[0]]).score
    assert value_of(metrics.chrf(), single) == pytest.approx(expected, abs=1e-6)


def test_bleu_cuts_chinese_as_chinese_and_the_rest_as_usual() -> None:
    assert metrics.choose_bleu_tokenizer(CHINESE[1]) == "zh"
    assert metrics.choose_bleu_tokenizer(ENGLISH[1]) == "13a"
    assert metrics.choose_bleu_tokenizer([""]) == "13a"


@pytest.mark.parametrize("name", metrics.ROUGE_TYPES)
def test_rouge_is_that_of_rouge_score(name: str) -> None:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([name])  # its own tokenizer knows Latin letters and digits
    english = [scorer.score(own, given)[name].fmeasure for given, own in zip(*ENGLISH, strict=True)]
    assert value_of(metrics.rouge(name), ENGLISH) == pytest.approx(sum(english) / len(english), abs=1e-6)
    # Chinese characters as words: code points, punctuation left out
    predictions, references = (
        [" ".join(str(ord(c)) for c in text if c.isalpha()) for text in texts] for texts in CHINESE
    )
    chinese = [scorer.score(own, given)[name].fmeasure for given, own in zip(predictions, references, strict=True)]
    assert value_of(metrics.rouge(name), CHINESE) == pytest.approx(sum(chinese) / len(chinese), abs=1e-6)
    assert 0 < value_of(metrics.rouge(name), CHINESE) < 1


def test_distinct_and_repetition_by_hand() -> None:
    texts = (["却说却说却说", "刘备", ""], ["", "", ""])
    # 2 of 6 characters and 2 of 2; 2 of 5 pairs and 1 of 1; the empty text counts for nothing
    assert value_of(metrics.distinct(1), texts) == pytest.approx((2 / 6 + 1) / 2)
    assert value_of(metrics.distinct(2), texts) == pytest.approx((2 / 5 + 1) / 2)
    assert value_of(metrics.repetition(), texts) == pytest.approx(1 / 3)  # 2 different ones of 3, one text only
    assert value_of(metrics.repetition(), (["刘备"], [""])) == 0


def test_accuracy_is_averaged_over_subjects_or_questions() -> None:
    is_right, subject = [1.0, 0.0, 0.0, 0.0, 1.0], [0, 0, 0, 0, 2]  # nothing was asked of subject 1
    macro, micro = metrics.accuracy("a", "", 3), metrics.accuracy("a", "", 1)
    assert metrics.evaluate(macro, macro.rows(is_right, subject)).value == pytest.approx((1 / 4 + 1) / 2)
    assert metrics.evaluate(micro, micro.rows(is_right, [0] * 5)).value == pytest.approx(2 / 5)


def test_the_interval_is_that_of_the_mean_and_the_same_every_time() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(5, 2, size=400)
    measure = metrics.Measure("mean", "", {}, lambda: values, lambda sums: float(sums[0] / sums[1]))
    rows = np.column_stack([values, np.ones(400)])
    figure = metrics.evaluate(measure, rows)
    half = 1.96 * values.std() / 20  # of a mean of 400
    assert figure.value == pytest.approx(values.mean())
    assert figure.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert metrics.evaluate(measure, rows) == figure
    assert metrics.evaluate(measure, rows, seed=1) != figure
    with pytest.raises(ValueError, match="nothing to measure"):
        metrics.evaluate(measure, rows[:0])


def test_95_of_100_intervals_hold_the_true_value() -> None:
    """Of 100 samples of 30 answers with 60 % right, about 95 % of the intervals must hold 0.6."""
    measure = metrics.accuracy("a", "", 1)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        figure = metrics.evaluate(measure, measure.rows((rng.random(30) < 0.6).astype(float), np.zeros(30, int)))
        held += figure.low <= 0.6 <= figure.high
    assert 0.89 <= held / 100 <= 0.98


@pytest.mark.slow
def test_modules_of_evaluate_give_the_same_and_need_no_network() -> None:
    from app.evaluation.modules import Module

    for measure in (metrics.bleu("zh"), metrics.chrf(), metrics.distinct(1)):
        found = Module(measure).compute(predictions=CHINESE[0], references=CHINESE[1])
        assert found == metrics.evaluate(measure, measure.rows(*CHINESE))._asdict()
    (bits, _) = metrics.likelihood_measures()
    found = Module(bits).compute(nats=[math.log(2)], num_bytes=[1], num_tokens=[1])
    assert found["value"] == pytest.approx(1)


def test_tokens_a_second_are_those_of_all_runs_together() -> None:
    measure = metrics.speed(2, 128, "an engine")
    figure = metrics.evaluate(measure, measure.rows([1.0, 3.0]))
    assert measure.name == "tokens_per_second_2"
    assert figure.value == 256 / 4
    assert (figure.low, figure.high) == (128 / 3, 128 / 1)
    assert (figure.n, figure.tokenisation) == (2, "an engine")
