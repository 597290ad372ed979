import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.corpus.perplexity import CharacterModel


def test_probabilities_of_a_hand_computed_bigram_model() -> None:
    """`abab`: a and b twice each, 2 kinds; ab twice, ba once. Witten-Bell keeps 2 of 6 for new ones, over 3 ids."""
    model = CharacterModel.train("abab", order=2)
    a = (2 + 2 / 3) / (4 + 2)
    assert model.probabilities("a").tolist() == pytest.approx([a])
    assert model.probabilities("x").tolist() == pytest.approx([(2 / 3) / 6])
    b_after_a = (2 + 1 * a) / (2 + 1)
    a_after_b = (1 + 1 * a) / (1 + 1)
    b_after_b = (0 + 1 * a) / (1 + 1)
    assert model.probabilities("abba").tolist() == pytest.approx([a, b_after_a, b_after_b, a_after_b])
    assert model.probabilities("xa").tolist() == pytest.approx([(2 / 3) / 6, a])  # an unknown history says nothing
    assert model.perplexity("ab") == pytest.approx((a * b_after_a) ** -0.5) == pytest.approx(1.661736, abs=1e-6)
    assert model.perplexity("") == 1.0


@given(st.text("刘关张", min_size=1, max_size=30), st.text("刘关张曹", max_size=5), st.integers(1, 5))
def test_probabilities_sum_to_one_after_any_history(reference: str, history: str, order: int) -> None:
    model = CharacterModel.train(reference, order)
    known = sorted(set(reference))
    total = sum(model.probabilities(history + character)[-1] for character in [*known, "\u2603"])
    assert total == pytest.approx(1.0)


def test_good_text_is_less_surprising_than_shuffled_text() -> None:
    reference = "话说天下大势\uff0c分久必合\uff0c合久必分\u3002周末七国分争\uff0c并入于秦\u3002" * 3
    model = CharacterModel.train(reference)
    shuffled = "".join(np.random.default_rng(0).permutation(list(reference[:30])))
    assert model.perplexity(reference[:30]) < 3 < model.perplexity(shuffled)
    assert math.isfinite(model.perplexity("\U0001f600\U00020000"))


def test_what_cannot_be_trained_says_so() -> None:
    with pytest.raises(ValueError, match="is empty"):
        CharacterModel.train("")
    with pytest.raises(ValueError, match="from 1 to 5"):
        CharacterModel.train("a", order=6)
