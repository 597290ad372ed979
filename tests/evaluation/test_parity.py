"""Log-probabilities compared token by token, and the gate."""

import math

import pytest

from app.evaluation.parity import Answer, Judged, compare, verdict

ANSWERS = [Answer((1, 2), (3, 4), (-1.0, -2.0)), Answer((1,), (5,), (-0.5,))]


def test_gaps_and_preferences_are_counted_by_token() -> None:
    judged = [Judged((-1.0, -2.25), (True, False)), Judged((-0.75,), (True,))]
    assert compare(ANSWERS, judged) == {
        "tokens": 3,
        "max_logprob_gap": 0.25,
        "mean_logprob_gap": round(0.5 / 3, 6),
        "greedy_percent": 66.67,
        "equal_answers": 1,
    }


def test_no_answer_and_no_number_are_no_parity() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], [])
    figures = compare(ANSWERS[1:], [Judged((math.nan,), (False,))])
    assert verdict(figures, 1, 1, 0.1).startswith("failed: logprobs differ by nan")


def test_the_gate_says_what_does_not_hold() -> None:
    figures = {"max_logprob_gap": 0.2}
    assert verdict(figures, 4, 4, 0.2) == "passed"
    assert verdict(figures, 3, 4, 0.1) == (
        "failed: logprobs differ by 0.2 nats, allowed 0.1; 1 of 4 conversations have other token ids"
    )
