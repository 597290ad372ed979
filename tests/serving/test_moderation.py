"""Verdicts, word files and spellings; precision and recall on tests/data/moderation.jsonl.

The lines were written by the author of the words, after them and with their phrases in mind: the recall of plain lines
says little about what users will think of (the 23 without a listed phrase were written for the classifier), that of
tricky spellings says what is undone. While rules were written, the misses among lines of part "seen" were looked at;
of part "held_out" once, when all was settled: that mended one spelling ("h o w t o …"), and no word was touched.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.lexicon import CUSTOM, HIDDEN_TEXT, Lexicon, Match, Term, read_terms
from app.serving.moderation import Moderator, build_moderator
from app.serving.policy import Policy
from app.serving.semantics import ALLOWED, MAX_PIECE, MAX_PIECES, Classifier, hugging_face_encoder, split
from app.serving.spelling import compact, fold

DATA = Path(__file__).parent.parent / "data" / "moderation.jsonl"
LINES = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
POLICY = Policy(pii_mask=())
MODERATOR = build_moderator({"default": POLICY})
# Of the words alone. category: (precision, recall) on all lines
BY_CATEGORY = {
    "drugs": (1.0, 0.844),
    "fraud": (0.96, 0.828),
    "gambling": (0.962, 0.893),
    "hate": (1.0, 0.885),
    "self_harm": (1.0, 0.812),
    "sexual_minors": (1.0, 0.875),
    "violence": (1.0, 0.818),
    "weapons": (1.0, 0.833),
}
# How a line is spelled: recall; "other" are tricks that are not undone: pinyin, homophones, slang
BY_KIND = {
    "plain": 0.783,
    "spacing": 1.0,
    "traditional": 1.0,
    "homoglyph": 1.0,
    "zero_width": 1.0,
    "leetspeak": 1.0,
    "full_width": 1.0,
    "other": 0.0,
}
HELD_OUT_FALSE_ALARMS = 2  # of 64 harmless lines


def found(text: str) -> tuple[str, ...]:
    return MODERATOR.check_output(text, POLICY).categories


def lexicon(*terms: str) -> Lexicon:
    return Lexicon([Term("c", term) for term in terms])


def test_precision_and_recall_of_the_words_by_category() -> None:
    hits, findings, labels = Counter[str](), Counter[str](), Counter[str]()
    for line in LINES:
        categories = found(line["text"])
        findings.update(categories)
        labels[line["label"]] += 1
        hits[line["label"]] += line["label"] in categories
    assert len(LINES) >= 300
    figures = {name: (round(hits[name] / findings[name], 3), round(hits[name] / labels[name], 3)) for name in findings}
    assert figures == BY_CATEGORY


def test_recall_of_the_words_by_spelling() -> None:
    harmful = [line for line in LINES if line["label"] != ALLOWED]
    labels = Counter(line["kind"] for line in harmful)
    hits = Counter(line["kind"] for line in harmful if line["label"] in found(line["text"]))
    assert {kind: round(hits[kind] / count, 3) for kind, count in labels.items()} == BY_KIND


def test_false_alarms_on_held_out_harmless_lines() -> None:
    harmless = [line for line in LINES if line["label"] == ALLOWED and line["part"] == "held_out"]
    assert len(harmless) == 64
    assert sum(bool(found(line["text"])) for line in harmless) == HELD_OUT_FALSE_ALARMS


@pytest.mark.slow
def test_meaning_finds_what_no_word_list_holds() -> None:
    """On "held_out" lines; the default policy's threshold was chosen on "seen" ones, for a precision of .9 there."""
    classifier = Classifier.from_examples()
    held_out = [line for line in LINES if line["part"] == "held_out"]
    lines = [line for line in held_out if line["kind"] == "plain" or line["label"] == ALLOWED]
    flagged = 1 - classifier.probabilities([line["text"] for line in lines])[:, 0] >= POLICY.semantics_threshold
    harmful = np.array([line["label"] != ALLOWED for line in lines])
    precision, recall = (flagged & harmful).sum() / flagged.sum(), (flagged & harmful).sum() / harmful.sum()
    assert (round(precision, 2), round(recall, 2)) == (0.86, 0.57)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ｈеｒ0ïn", "heroin"),  # full-width, Cyrillic, a digit, an accent
        ("毒\u200b \u0336品", "毒品"),
        ("槍枝買賣", "枪枝买卖"),
        ("𝓫𝓾𝔂 🅷🅴 🇽", "buyhex"),
        ("①②㎏", "i2kg"),
        ("…—！", ""),
    ],
)
def test_spellings_of_one_text(text: str, expected: str) -> None:
    assert compact(text) == expected


@given(st.text())
def test_folding_keeps_places_and_folds_like_the_first_look(text: str) -> None:
    letters = fold(text).letters
    assert "".join(letter.folded for letter in letters).replace("\0", "") == compact(text)
    assert [letter.start for letter in letters] == sorted(letter.start for letter in letters)
    assert compact(compact(text)) == compact(text)


@pytest.mark.parametrize(
    ("term", "text", "is_found"),
    [
        ("rapist", "the rapist!", True),
        ("rapist", "therapist", False),
        ("rapist", "the r-a-p-i-s-t", True),
        ("kill", "s k i l l", False),  # a longer word, spelled out
        ("kill", "skill", False),
        ("kill", "k*ll", False),
        ("kill", "ki*ll", True),
        ("kill", "ki ll", False),
        ("kill", "K1LL", True),
        ("kill", "kiII", True),
        ("kill me", "kill, me", True),
        ("kill me", "killme", False),
        ("see", "533", False),  # digits alone are a number
        ("c4", "C4炸", True),
        ("c4", "ca", False),
        ("毒品", "毒。品", False),  # the border of two sentences
        ("毒品交易", "毒。品。交。易", True),
        ("毒品交易", "毒。品交易", False),
        ("k粉", "买K粉", True),
        ("k粉", "ok粉", False),
    ],
)
def test_borders_and_gaps(term: str, text: str, is_found: bool) -> None:
    assert bool(lexicon(term).find(text)) == is_found


def test_spans_are_those_of_the_original() -> None:
    assert lexicon("毒品").find("买 毒\u200b\u200b品。") == [Match("c", 2, 6)]
    assert lexicon("kg b").find("1 ㎏ b") == [Match("c", 2, 5)]


@pytest.mark.parametrize("alive", ["毒", "毒 ", "买毒\u200b", "毒品交", "ki", "a ki", "kill", "kill\u200b"])
def test_what_may_become_a_phrase_is_alive(alive: str) -> None:
    start = lexicon("毒品交易", "kill").alive_from(alive)
    assert alive[start] in "毒k"


@pytest.mark.parametrize("dead", ["", "你好", "毒品", "ski", "kill ", "毒" + " " * 9, "x"])
def test_what_cannot_become_a_phrase_is_not(dead: str) -> None:
    assert lexicon("毒品", "kill").alive_from(dead) == len(dead)


def test_word_files(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeff# ours\nalpha  # a comment\n\ncategory: weapons\n大炮\nbeta\tdrugs\n", encoding="utf-8")
    assert read_terms(str(file)) == [Term(CUSTOM, "alpha"), Term("weapons", "大炮"), Term("drugs", "beta")]
    moderator = build_moderator({}, [str(file)], own_words=False)
    assert moderator.check_input([{"role": "user", "content": "Ａlpha 大 炮"}], POLICY).categories == (
        CUSTOM,
        "weapons",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# nothing\n", "holds no terms"),
        ("fine\nx\n", "words.txt:2: 'x' has 1 letters, not 2 to 64"),
        ("！！\n", "words.txt:1: .* has 0 letters"),
        ("category: two words\n", "words.txt:1: 'two words' is no name for a category"),
        ("fine\tno-name\n", "words.txt:1: 'no-name' is no name"),
        ("long" * 17, "words.txt:1: .* has 68 letters"),
        ("a..........b\n", "words.txt:1: .* too many separators"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_bad_word_file_is_named_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_terms(str(file))


def test_a_missing_word_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"/nowhere/words.txt does not exist"):
        build_moderator({}, ["/nowhere/words.txt"])


def test_personal_data_is_masked_or_blocks() -> None:
    text = "电话13812345678，邮箱a@b.cn"
    masked = MODERATOR.check_output(text, Policy(pii_mask=("mobile", "email")))
    assert (masked.action, masked.categories, masked.text) == ("mask", ("email", "mobile"), "电话[MOBILE]，邮箱[EMAIL]")
    assert masked.spans == (Match("mobile", 2, 13), Match("email", 16, 22))
    refused = MODERATOR.check_output(text, Policy(pii_mask=("mobile",), pii_block=("email",)))
    assert (refused.action, refused.categories, refused.text) == ("block", ("email",), "")
    assert MODERATOR.check_output(text, POLICY).text == text
    beside = Moderator({}, [Term("c", "k粉")]).check_output("13812345678\u212a粉", Policy(pii_mask=("mobile",)))
    assert beside.action == "block"  # after a digit the Kelvin sign begins no word, after a placeholder it does
    assert text not in repr(MODERATOR.check_output(text, POLICY))


def test_messages_of_all_forms() -> None:
    parts = [{"type": "text", "text": "打13812345678"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "你好"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    policy = Policy(pii_mask=("mobile",))
    assert MODERATOR.check_input(messages, policy).text == "你好\n打[MOBILE]"
    masked = MODERATOR.mask_messages(messages, policy)
    user = {"role": "user", "content": [{"type": "text", "text": "打[MOBILE]"}, parts[1]]}
    assert masked == [messages[0], user, messages[2]]
    assert parts[0]["text"] == "打13812345678"
    assert MODERATOR.mask_messages(messages, POLICY) == messages


def test_policies_choose_categories() -> None:
    text = "kill yourself"
    assert MODERATOR.check_output(text, Policy(categories=("drugs",))).action == "allow"
    assert MODERATOR.check_output(text, Policy(categories=("self_harm",))).categories == ("self_harm",)
    assert MODERATOR.check_output("\u200b" * 40, Policy(categories=("drugs",))).action == "allow"
    assert MODERATOR.check_output("\u200b" * 40, Policy(categories=(HIDDEN_TEXT,))).categories == (HIDDEN_TEXT,)


def test_policies_are_found_by_name_and_checked() -> None:
    assert MODERATOR.policy("default") is POLICY
    with pytest.raises(ValueError, match="no policy named 'other'; there are default"):
        MODERATOR.policy("other")
    with pytest.raises(ValueError, match=r"policies.p.categories: nonsense"):
        Moderator({"p": Policy(categories=("nonsense",))}, [])
    with pytest.raises(ValueError, match="no such kind of personal data: phone"):
        Policy(pii_mask=("phone",))
    with pytest.raises(ValueError, match="not both: email"):
        Policy(pii_mask=("email",), pii_block=("email",))


def test_a_refusal_speaks_the_language_of_the_request() -> None:
    assert POLICY.refusal("how 怎么") == POLICY.refusal_zh
    assert POLICY.refusal("how") == POLICY.refusal_en


def by_first_letter(texts: "list[str]") -> Any:
    """A fake encoder: one axis per letter a to d."""
    return np.array([[float(text.strip()[:1] == letter) for letter in "abcd"] for text in texts], dtype=np.float32)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(by_first_letter, ["a", "b", "c", "a"], [ALLOWED, "drugs", "hate", ALLOWED])


def test_the_classifier_learns_its_examples(classifier: Classifier) -> None:
    probabilities = classifier.probabilities(["a", "b", "c"])
    assert probabilities.argmax(1).tolist() == [0, 1, 2]
    assert np.allclose(probabilities.sum(1), 1)


def test_the_worst_piece_of_a_text_counts(classifier: Classifier) -> None:
    category, probability = classifier.judge("a" * 199 + "。" + "b" * 150 + "。" + "a" * 199 + "。")
    assert (category, probability) == ("drugs", classifier.judge("b")[1])
    assert classifier.judge(" \n") == (ALLOWED, 0.0)


def test_meaning_blocks_as_the_policy_says(classifier: Classifier) -> None:
    policy = Policy(semantics=True, semantics_threshold=0.6)
    moderator = Moderator({"p": policy}, [], classifier)
    assert moderator.check_input([{"role": "user", "content": "b"}], policy).categories == ("drugs",)
    assert moderator.check_output("a", policy).action == "allow"
    assert classifier.judge("d")[1] == pytest.approx(0.5)  # like no example: as probable as not
    assert moderator.check_output("d", policy).action == "allow"
    assert moderator.check_output("d", policy.with_overrides({"semantics_threshold": 0.4})).action == "block"
    assert moderator.check_output("b", policy.with_overrides({"categories": ("hate",)})).action == "allow"
    with pytest.raises(ValueError, match=r"policies.p.semantics"):
        Moderator({"p": policy}, [])


@settings(max_examples=50)
@given(st.text(alphabet="ab。！\n ", max_size=2000))
def test_pieces_are_short_and_lose_nothing_but_blanks(text: str) -> None:
    pieces = split(text)
    assert all(len(piece) <= MAX_PIECE for piece in pieces) or "。" * MAX_PIECE in text
    assert len(pieces) <= MAX_PIECES
    if len(pieces) < MAX_PIECES:
        assert "".join("".join(pieces).split()) == "".join(text.split())


def test_an_encoder_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder_dir: .* holds no config.json"):
        hugging_face_encoder(str(tmp_path))
