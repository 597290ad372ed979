"""Streams: nothing forbidden is sent in any split, nothing else is lost, and little is held back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.serving.lexicon import HIDDEN_TEXT, Term
from app.serving.moderation import Moderator, Verdict
from app.serving.policy import Policy
from app.serving.spelling import MAX_INVISIBLE_GAP, MAX_VISIBLE_GAP
from app.serving.streaming import CONTEXT, MAX_RUN, HeldBack, pii_alive_from

TERMS = [Term("c", text) for text in ("毒品交易", "毒品", "品行不端", "bad", "bad word", "very bad idea", "k粉")]
MODERATOR = Moderator({}, TERMS)
WORDS = Policy(pii_mask=())
PERSONAL = Policy(pii_mask=("mobile", "resident_id", "bank_card", "landline"))
EVERYTHING = Policy(pii_mask=("mobile", "resident_id", "bank_card", "email", "plate", "ipv4"), pii_block=("passport",))
NOISE = st.sampled_from(
    ["", "", "", " ", "\u200b", "-", ".", "*", "，", "\u0336", " \u200d ", "\n", "  ", "\u200b" * 9]
)
TRICKS = {"毒": "毒毐", "a": "aа4@", "e": "eе3é", "d": "dｄD", "o": "o0о", "k": "kк", "品": "品", "交": "交"}
NUMBERS = (
    "13812345678",
    "138 1234 5678",
    "11010519491231002X",
    "4111 1111 1111 1111",
    "a.b@example.com",
    "010-88886666",
)
NUMBERS += (
    "京A·12345",
    "护照号D12345678",
    "8.8.4.4",
    "2024年",
    "12.5元",
    "3.14",
    "订单号13812345678",
    "(86)13812345678",
)
FILLER = st.one_of(
    st.text(max_size=6),
    st.text(alphabet="毒品交易行不端bade wordk粉vyi1 .，\u200b", max_size=8),
    st.sampled_from(
        ["你好。", "the badge ", "话说天下大势，", "a b a d g e", "sbad ", "therefore, ", "\U0001f468\u200d\U0001f469"]
    ),
)


@st.composite
def planted(draw: st.DrawFn) -> str:
    """A term, each letter perhaps in another spelling, with separators between the letters."""
    term = draw(st.sampled_from(TERMS)).text
    return "".join(draw(st.sampled_from(TRICKS.get(letter, letter))) + draw(NOISE) for letter in term)


def in_pieces(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    """A random text of such parts in random chunks."""
    text = st.lists(st.one_of(*parts), max_size=8).map("".join)
    return st.tuples(text, st.lists(st.integers(1, 7), min_size=1, max_size=40)).map(lambda given: cut(*given))


def cut(text: str, sizes: list[int]) -> list[str]:
    chunks, start = [], 0
    while start < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[start : start + size])
        start += size
    return chunks


def stream(chunks: list[str], policy: Policy) -> tuple[str, Verdict | None]:
    """All that is sent, checked after each chunk: a client has it already."""
    held = HeldBack(MODERATOR, policy)
    sent = ""
    for chunk in chunks:
        sent += held.push(chunk)
    return sent + held.finish(), held.blocked


@settings(max_examples=250, deadline=None)
@given(in_pieces(FILLER, planted()))
def test_a_phrase_is_never_sent_in_any_split(chunks: list[str]) -> None:
    text = "".join(chunks)
    matches = MODERATOR.forbidden(text, WORDS)
    sent, blocked = stream(chunks, WORDS)
    assert text.startswith(sent)
    assert bool(blocked) == bool(matches)
    assert not matches or len(sent) <= matches[0].start
    assert matches or sent == text


@settings(max_examples=150, deadline=None)
@given(in_pieces(FILLER, planted(), st.sampled_from(NUMBERS)), st.sampled_from([PERSONAL, EVERYTHING]))
def test_personal_data_is_never_sent_in_any_split(chunks: list[str], policy: Policy) -> None:
    sent, blocked = stream(chunks, policy)
    whole, whole_blocked = stream(["".join(chunks)], policy)
    verdict = MODERATOR.check_output(sent, policy)
    assert verdict.action == "allow" or blocked
    assert verdict.action != "mask"
    assert (sent, bool(blocked)) == (whole, bool(whole_blocked))


@pytest.mark.parametrize("text", ["B@D\x1f13812345678", "好bad\u200b13812345678。"])
def test_a_word_is_judged_as_it_stands_once_the_number_beside_it_is_masked(text: str) -> None:
    assert MODERATOR.check_output(text, PERSONAL).action == "block"
    for size in range(1, len(text) + 1):
        sent, blocked = stream(cut(text, [size]), PERSONAL)
        assert blocked is not None
        assert sent.rstrip() in ("", "好")
    harmless = text.replace("13812345678", "1381234")
    assert stream(list(harmless), PERSONAL) == (harmless, None)


@settings(max_examples=100, deadline=None)
@given(in_pieces(st.sampled_from(NUMBERS), st.sampled_from(["。", "\n", " 和 ", "你好", "，电话", "end. "])))
def test_a_stream_is_masked_as_the_whole_text_would_be(chunks: list[str]) -> None:
    sent, blocked = stream(chunks, PERSONAL)
    assert blocked is None
    assert sent == MODERATOR.check_output("".join(chunks), PERSONAL).text


@pytest.mark.parametrize("text", ["毒品", "毒 品", "毒\u200b品", "bad", "B\uff41d!", "b a d", "b-a-d"])
def test_one_character_at_a_time(text: str) -> None:
    sent, blocked = stream(list(f"好的，{text}。"), WORDS)
    assert sent.rstrip() in ("好的，", "好的")
    assert blocked is not None
    assert blocked.categories == ("c",)
    assert blocked.spans[0][1:] == (3, 3 + len(text.rstrip("!")))


@pytest.mark.parametrize("text", ["badge", "a b a d", "毒。品行", "abad", "毒" + "-" * (MAX_VISIBLE_GAP + 1) + "品"])
def test_what_only_resembles_a_phrase_is_sent(text: str) -> None:
    assert stream(list(text), WORDS) == (text, None)


def test_nothing_is_sent_once_blocked() -> None:
    held = HeldBack(MODERATOR, WORDS)
    assert held.push("一二毒品三四") == "一二"
    assert held.blocked is not None
    assert held.push("五六") + held.finish() == ""


def test_harmless_chinese_is_not_held_back() -> None:
    held = HeldBack(MODERATOR, EVERYTHING)
    assert [held.push(character) for character in "话说天下大势，"] == list("话说天下大势，")
    assert held.push("服毒") == "服"
    assert held.push("者") == "毒者"


def test_a_number_is_held_until_it_is_known_what_it_is() -> None:
    held = HeldBack(MODERATOR, PERSONAL)
    assert held.push("电话138 1234 5678") == "电话"
    assert held.push("，请在上午来电") == "[MOBILE]，请在上午来电"


def test_a_long_invisible_run_is_a_finding_itself() -> None:
    sent, blocked = stream([*"毒", *"\u200b" * 1000, *"品"], WORDS)
    assert sent == "毒"
    assert blocked is not None
    assert blocked.categories == (HIDDEN_TEXT,)
    assert stream(["\u200b" * MAX_INVISIBLE_GAP], WORDS) == ("\u200b" * MAX_INVISIBLE_GAP, None)


@pytest.mark.parametrize(
    "unit", ["毒", "毒-", "b a d", "1", "a", "1 ", "京A", "毒\u200b", "bad\u200b", "@a.", "very bad ide", "\x00"]
)
def test_memory_is_bounded(unit: str) -> None:
    held = HeldBack(MODERATOR, EVERYTHING.with_overrides({"categories": ()}))
    other = HeldBack(MODERATOR, EVERYTHING)
    for _ in range(1000):
        held.push(unit)
        other.push(unit)
        assert max(len(held._held), len(other._held)) <= 3 * MAX_RUN
        assert len(held._sent) <= CONTEXT


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NUMBERS), st.integers(1, 20))
def test_the_beginning_of_a_number_is_alive(number: str, length: int) -> None:
    beginning = number[: min(length, len(number) - 1)]
    text = f"他说，{beginning}"
    first = next(
        (i for i, character in enumerate(beginning) if character.isascii() or character == "京"), len(beginning)
    )
    assert pii_alive_from(text, EVERYTHING.pii_mask) <= 3 + first
