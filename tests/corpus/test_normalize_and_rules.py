import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.corpus.config import RulesConfig
from app.corpus.normalize import normalize
from app.corpus.rules import build_rules, first_reason

BOUNDS = RulesConfig(min_characters=4, max_characters=100)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("\ufeff  刘备\u3000\u3000关羽 \r\n\r\n\r\n\r\n张飞\n", "刘备 关羽\n\n张飞"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\u200bc\u202e", "abc"),
        ("刘备\u2028关羽\x0c张飞\x85赵云", "刘备\n关羽\n张飞\n赵云"),
        ("刘备\u2003\u202f关羽", "刘备 关羽"),
        ("全角，标点。ＡＢＣ", "全角，标点。ＡＢＣ"),
        (" \n\t ", ""),
    ],
)
def test_normalize(raw: str, expected: str) -> None:
    assert normalize(raw) == expected


AWKWARD = "刘备ab1，。 \t\n\r\x00\u3000\u00a0\u200b\ufeff\u2001\u2028\x85e\u0301\u1100\u1161"


@given(st.text(st.sampled_from(AWKWARD)))
def test_normalize_twice_is_normalize_once(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("好", "too_short"),
        ("话说天下大势分久必合。" * 10, "too_long"),
        ("hello world 你好", "low_chinese_ratio"),
        ("天下大势！！！！！！", "high_symbol_ratio"),
        ("很好很好很好很好很好很好很好很好很好很好很好很好", "high_repetition"),
        ("话说天下大势，分久必合，合久必分。", None),
    ],
)
def test_each_rule_rejects_what_its_name_says(text: str, reason: str | None) -> None:
    assert first_reason(build_rules(BOUNDS), text) == reason


def test_bounds_are_inclusive() -> None:
    rules = build_rules(RulesConfig(min_characters=4, max_characters=4, min_chinese_ratio=0.5, max_symbol_ratio=0.5))
    assert first_reason(rules, "天下ab") is None  # 4 characters, half of them Chinese
    assert first_reason(rules, "天下，。") is None  # half symbols
    assert first_reason(rules, "天下大势变") == "too_long"
