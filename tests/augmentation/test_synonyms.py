"""Synonyms: what may be replaced, by what, and that a seed decides."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.augmentation.config import SynonymsConfig
from app.augmentation.synonyms import SynonymReplacer, read_lexicon

LEXICON = """\ufeffAa01A01= 老百姓 平民 黔首 人民群众
Aa01A02= 电话 电话机
Ba01A01= 购买 购置 采购
Ba01A02# 手机 电脑
Ca01A01= 便宜 低廉
Ca01A02= 高兴 快乐 愉快
Ca01A03= 高兴 愿意
Da01A01@ 质量
Ea01A01= 好 佳
"""
TEXT = "老百姓高兴地购买了手机，价格便宜，质量好。[MOBILE] iPhone12"


def replacer(**settings: object) -> SynonymReplacer:
    return SynonymReplacer(LEXICON.splitlines(), SynonymsConfig.model_validate(settings))


def test_only_groups_of_synonyms_and_words_with_one_meaning_count() -> None:
    lexicon = read_lexicon(LEXICON.splitlines())
    assert lexicon["购买"] == ("购置", "采购")
    assert not {"手机", "质量", "高兴"} & lexicon.keys()
    assert lexicon["愿意"] == ("高兴",)


@pytest.mark.parametrize(
    ("line", "message"),
    [("人 士 人物", "line 1: expected `Aa01A01= word"), ("Aa01A01= 人", "no group of synonyms"), ("", "no group")],
)
def test_another_layout_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lexicon([line])


def test_all_that_may_change_changes() -> None:
    changed = {replacer(replaced_share=1.0).replace(TEXT, str(seed)) for seed in range(40)}
    # 好 is one character and 高兴 has two meanings: they stay; 人民群众 is longer by one character only
    assert all(text.startswith(("平民高兴地", "黔首高兴地", "人民群众高兴地")) for text in changed)
    assert all(text.endswith("，质量好。[MOBILE] iPhone12") for text in changed)
    assert {text.split("地")[1][:2] for text in changed} == {"购置", "采购"}


def test_the_share_and_the_length_are_kept() -> None:
    assert replacer(replaced_share=0.01).replace("他们购买便宜电话。", "1") in {
        f"他们{verb}{adjective}{noun}。"
        for verb, adjective, noun in [
            *((verb, "便宜", "电话") for verb in ("购置", "采购")),
            ("购买", "低廉", "电话"),
            ("购买", "便宜", "电话机"),
        ]
    }  # one of three
    assert replacer(replaced_share=1.0, max_length_difference=0).replace("电话。", "1") == "电话。"


def test_the_seed_decides() -> None:
    one, other = replacer(), replacer()
    assert [one.replace(TEXT, str(seed)) for seed in range(9)] == [other.replace(TEXT, str(seed)) for seed in range(9)]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_text_without_words_of_the_lexicon_stays(text: str) -> None:
    assert replacer(replaced_share=1.0).replace(text, "0") == text
