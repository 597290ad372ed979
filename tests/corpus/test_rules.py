from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.corpus import repetition
from app.corpus.characters import classes, codes, windows
from app.corpus.config import RulesConfig
from app.corpus.rules import build_rules, first_reason
from app.corpus.structure_rules import high_repetition

SENTENCE = "话说天下大势\uff0c分久必合\uff0c合久必分\u3002"
STORY = (
    "小城的早晨总是从一碗热汤面开始\u3002老板把面条抖进锅里\uff0c白气一下子漫到街上\u3002\n"
    "隔壁修车的师傅端着碗蹲在门口\uff0c边吃边看天色\uff0c说今天怕是要下雨\u3002\n"
    "果然不到中午\uff0c雨点就敲响了铁皮屋檐\uff0c学生们顶着书包往校门里跑\u3002\n"
    "卖伞的阿姨却不着急\uff0c她知道这场雨会停\uff0c也知道有人终究会回来取走忘在店里的那一把\u3002\n"
    "傍晚云散了\uff0c河面上浮着一层金光\uff0c桥头又摆出了棋盘\uff0c老人们为一步卒子争得面红耳赤\u3002\n"
    "他站在桥上想了很久\uff0c最后决定给远方的朋友写一封信\uff0c信里只写今天的雨\uff0c和雨后的灯\u3002"
)


def reason_of(text: str, **bounds: object) -> str | None:
    return first_reason(build_rules(RulesConfig.model_validate(bounds)), text)


def only(**bounds: object) -> dict[str, object]:
    """All rules off but these."""
    off = {name: None for name, field in RulesConfig.model_fields.items() if name.startswith(("min_", "max_"))}
    return off | {"min_sensitive_hits": 1, "languages": None, "reject_lorem_ipsum": False} | bounds


REJECTED = {
    "too_short": ("好", {"min_characters": 4}),
    "too_long": (SENTENCE * 10, {"max_characters": 100}),
    "low_chinese_ratio": ("hello world 你好", {"min_chinese_ratio": 0.3}),
    "high_symbol_ratio": ("天下大势\uff01\uff01\uff01\uff01\uff01\uff01", {"max_symbol_ratio": 0.4}),
    "high_punctuation_ratio": ("天下\uff0c大势\uff0c\u3002\uff01\u2014", {"max_punctuation_ratio": 0.35}),
    "high_digit_ratio": ("订单1234567890\uff11没到", {"max_digit_ratio": 0.3}),
    "other_language": (
        "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3042\u308a\u307e\u3059",
        {"languages": ("zh", "en")},
    ),
    "high_hash_or_ellipsis_ratio": ("#好#书#看...完\u2026\u2026", {"max_hash_or_ellipsis_ratio": 0.1}),
    "curly_bracket": ("如果 x 则 { 返回 } 否则 { 继续 }", {"max_curly_bracket_ratio": 0.01}),
    "high_link_ratio": ("见http://www.example.com/a/b/c?d=1和www.example.cn/e", {"max_link_ratio": 0.4}),
    "high_advertisement": ("加微信领优惠券\uff0c代开发票请扫码", {"max_advertisement_terms": 10.0}),
    "lorem_ipsum": ("标题 Lorem Ipsum dolor sit amet", {"reject_lorem_ipsum": True}),
    "high_repetition": ("很好" * 12, {"max_repetition_ratio": 0.5}),
    "bullet_lines": ("\u2022 面\n\u2022 饭\n- 菜\n\u00b7 汤", {"max_bullet_line_ratio": 0.9}),
    "ellipsis_lines": (
        "从前有座山\u2026\u2026\n山里有座庙...\n庙里有个老和尚\n在讲故事\u3002",
        {"max_ellipsis_line_ratio": 0.3},
    ),
    "javascript_lines": ("标题\n您的浏览器不支持JavaScript\nvar a = 1;\n完", {"max_javascript_line_ratio": 0.1}),
    "duplicate_lines": ("甲\n乙\n甲\n甲\n丙丙丙丙丙丙丙丙丙丙丙丙", {"max_duplicate_line_ratio": 0.3}),
    "duplicate_line_characters": (
        "很长很长很长的一行\n很长很长很长的一行\n短\n小\n少",
        {"max_duplicate_line_character_ratio": 0.2},
    ),
    "duplicate_paragraphs": ("甲\n\n乙\n\n甲\n\n甲", {"max_duplicate_paragraph_ratio": 0.3}),
    "duplicate_paragraph_characters": (
        "长长的一段\n\n长长的一段\n\n短\n\n小",
        {"max_duplicate_paragraph_character_ratio": 0.2},
    ),
    "top_ngram": (STORY + "好极了" * 40, {"max_top_ngram_ratios": {3: 0.2}}),
    "duplicate_ngrams": (STORY + STORY[:100] + STORY[:100], {"max_duplicate_ngram_ratios": {8: 0.15}}),
    "few_function_words": ("苹果香蕉橙子葡萄西瓜" * 30, {"min_function_words": 2}),
    "few_sentences": ("苹果\uff0c香蕉\uff0c" * 60, {"min_sentences": 3}),
    "low_terminal_punctuation": ("首页 新闻 体育 财经\n" * 30, {"min_terminal_punctuation_ratio": 0.12}),
}


ALL_RULES = build_rules(RulesConfig(min_characters=1, prose_characters=1))


@pytest.mark.parametrize("reason", REJECTED)
def test_each_rule_rejects_what_its_name_says_and_lets_good_text_through(reason: str) -> None:
    bad, bounds = REJECTED[reason]
    rules = build_rules(RulesConfig.model_validate(only(**bounds)))
    assert len(rules) == 1
    assert first_reason(rules, bad) == reason
    if reason != "too_long":
        assert first_reason(rules, STORY) is None
        assert first_reason(rules, SENTENCE) is None


def test_every_rule_that_is_built_has_such_a_test() -> None:
    assert len(build_rules(RulesConfig())) == len(REJECTED)
    assert build_rules(RulesConfig.model_validate(only())) == []


@pytest.mark.parametrize(
    "text",
    [
        STORY,
        SENTENCE,
        "小熊宝宝我觉得孩子不喜欢\uff0c能换别的吗",
        "质量还不错\uff0c有优惠券的时候买的\uff0c书很厚。。。",
        "\u6eda\u6eda\u957f\u6c5f\u4e1c\u901d\u6c34\uff0c\u6d6a\u82b1\u6dd8\u5c3d\u82f1\u96c4\u3002\n\u662f\u975e\u6210\u8d25\u8f6c\u5934\u7a7a\u3002\n\u9752\u5c71\u4f9d\u65e7\u5728\uff0c\n\u51e0\u5ea6\u5915\u9633\u7ea2\u3002",
        "安装 numpy 1.26 之后运行 pip list 看看版本是不是对的",
    ],
)
def test_defaults_keep_short_reviews_prose_and_verse(text: str) -> None:
    assert reason_of(text) is None


def test_bounds_are_inclusive() -> None:
    bounds = {"min_characters": 4, "max_characters": 4, "min_chinese_ratio": 0.5, "max_symbol_ratio": 0.5}
    assert reason_of("天下ab", **bounds) is None  # 4 characters, half of them Chinese
    assert reason_of("天下\uff0c\u3002", **bounds | {"max_punctuation_ratio": None}) is None  # half symbols
    assert reason_of("天下大势变", **bounds) == "too_long"


def test_prose_rules_leave_shorter_documents_alone() -> None:
    text = "苹果香蕉橙子葡萄西瓜" * 5
    assert reason_of(text, **only(min_function_words=2, min_sentences=3)) is None
    assert reason_of(text, **only(min_function_words=2, prose_characters=50)) == "few_function_words"


def test_character_classes() -> None:
    assert classes("刘a1\uff0c+ \n\u00e9\u3007\U00020000\u0301") == b"ca0ps  lccl"
    assert classes("\ud800") == b"s"  # half a surrogate pair crashes nothing


@given(st.text("ab刘\U0001f600", max_size=60), st.integers(1, 20))
def test_window_hashes_are_equal_where_the_windows_are(text: str, length: int) -> None:
    hashes = windows(codes(text), length).tolist()
    expected = [text[i : i + length] for i in range(len(text) - length + 1)]
    assert len(hashes) == len(expected)
    assert len(set(zip(hashes, expected, strict=True))) == len(set(expected)) == len(set(hashes))


@given(st.text("ab刘", max_size=60), st.integers(1, 12))
def test_repetition_counts_as_plain_python_does(text: str, length: int) -> None:
    seen = [text[i : i + length] for i in range(len(text) - length + 1)]
    later = {i for i, window in enumerate(seen) if window in seen[:i]}
    covered = {place for i in later for place in range(i, i + length)}
    most = max(map(seen.count, seen), default=0)
    assert repetition.repeated_windows(text, length) == len(later)
    assert repetition.duplicate_ngram_ratio(text, length) == (len(covered) / len(text) if covered else 0.0)
    assert repetition.top_ngram_ratio(text, length) == (min(most * length / len(text), 1.0) if most > 1 else 0.0)


@given(st.text("ab刘备关羽", min_size=1, max_size=40), st.integers(1, 12), st.floats(0, 1))
def test_shortcuts_of_high_repetition_change_nothing(text: str, times: int, max_ratio: float) -> None:
    text *= times
    seen = [text[i : i + 10] for i in range(len(text) - 9)]
    expected = "high_repetition" if len(seen) - len(set(seen)) > max_ratio * len(seen) else None
    assert high_repetition(max_ratio)(text) == expected


@given(st.text(max_size=300))
def test_every_rule_answers_any_text(text: str) -> None:
    answers = {rule(text) for rule in ALL_RULES}
    assert answers <= {None, *REJECTED}


def test_ratios_of_lines() -> None:
    assert repetition.duplicate_ratio(["甲", "乙", "甲", "甲"]) == 0.5
    assert repetition.duplicate_character_ratio(["甲甲甲", "乙", "甲甲甲"]) == 3 / 7
    assert repetition.duplicate_ratio([]) == repetition.duplicate_character_ratio([]) == 0.0
    assert repetition.paragraphs_of("甲\n乙\n\n丙") == ["甲\n乙", "丙"]


def test_sensitive_words(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\ufeff坏词\n\n  VPN \n", encoding="utf-8")
    second.write_text("\uff22\uff21\uff24\u8bcd\r\n", encoding="utf-8")
    bounds = only(sensitive_word_uris=[str(first), str(second)])
    assert reason_of("这里有一个坏词", **bounds) == "sensitive_word"
    assert reason_of("用vpn上网", **bounds) == reason_of("用\uff36\uff30\uff2e上网", **bounds) == "sensitive_word"
    assert reason_of("bad词在此", **bounds) == "sensitive_word"
    assert reason_of("MyVPNService 是一个类名", **bounds) is None  # Latin words count as whole words only
    assert reason_of("一个坏词", **bounds | {"min_sensitive_hits": 2}) is None
    assert reason_of("坏词和坏词", **bounds | {"min_sensitive_hits": 2}) == "sensitive_word"


def test_bad_word_files_are_named(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "gbk.txt"
    empty.write_text("\n \n")
    binary.write_bytes("坏词".encode("gbk"))
    for path, message in ((empty, "holds no words"), (binary, "not UTF-8"), (tmp_path / "none.txt", "does not exist")):
        with pytest.raises(ValueError, match=message) as error:
            reason_of("文", sensitive_word_uris=[str(path)])
        assert str(path) in str(error.value)


def test_high_perplexity(tmp_path: Path) -> None:
    reference = tmp_path / "good.txt"
    reference.write_text(STORY * 2, encoding="utf-8")
    bounds = only(max_perplexity=30.0, perplexity_reference_uri=str(reference))
    assert reason_of(STORY, **bounds) is None
    assert reason_of("魑魅魍魉饕餮耄耋龃龉", **bounds) == "high_perplexity"
    with pytest.raises(ValueError, match="perplexity_reference_uri"):
        RulesConfig(max_perplexity=30.0)


def test_a_language_that_is_never_found_is_refused() -> None:
    with pytest.raises(ValueError, match=r"languages: cn is not among .* zh"):
        build_rules(RulesConfig(languages=("zh", "cn")))


def test_bounds_survive_the_way_to_a_worker() -> None:
    assert RulesConfig.model_validate_json(RulesConfig().model_dump_json()) == RulesConfig()
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        RulesConfig(max_top_ngram_ratios={0: 0.2})


def no_numbers(text: str) -> str | None:
    return "has_numbers" if any(character.isdigit() for character in text) else None


def test_rules_of_your_own() -> None:
    bounds = only(functions=[f"{__name__}:no_numbers"])
    assert reason_of("第3回", **bounds) == "has_numbers"
    assert reason_of("第三回", **bounds) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "must have the form module:function"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("app.corpus.rules:nothing", "has no function 'nothing'"),
        ("app.corpus.config:__name__", "has no function '__name__'"),
    ],
)
def test_wrong_names_of_your_own_rules_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_rules(RulesConfig(functions=[name]))
