from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from app.models import END_OF_TEXT, SPECIAL_TOKENS
from app.tokens import tokenizer

TEXTS = ["话说天下大势，分久必合，合久必分。", "三国2024年the three kingdoms演义", "版本3.14，发布于2024年。"] * 20
SCRIPTS = regex.compile(r"\p{Han}|\p{N}|[\p{L}--\p{Han}]", flags=regex.V1)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(TEXTS, vocab_size=500, min_frequency=2)


def kinds(text: str) -> set[str]:
    return {
        "han" if regex.match(r"\p{Han}", c) else "digit" if c.isdigit() else "letter" if c.isalpha() else "other"
        for c in text.strip()
    }


def test_no_token_crosses_a_border_of_scripts(trained: Tokenizer) -> None:
    merged = []
    for text in TEXTS[:3]:
        encoding = trained.encode(text)
        pieces = [text[begin:end] for begin, end in encoding.offsets]
        assert all(len(kinds(piece)) <= 1 for piece in pieces), pieces
        merged += [piece for piece in pieces if len(piece.strip()) > 1]
    assert "天下" in "".join(merged)
    assert any(kinds(piece) == {"letter"} for piece in merged)


def test_of_a_run_of_spaces_the_last_one_stays_for_the_word(trained: Tokenizer) -> None:
    text = "def f:\n    return"
    pieces = [text[begin:end] for _, (begin, end) in trained.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["def", " f", ":", "\n", "   ", " return"]


def test_special_tokens_come_first_and_the_size_is_kept(trained: Tokenizer) -> None:
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert 4 + 256 < trained.get_vocab_size() <= 500


@given(text=st.text(st.one_of(st.sampled_from("刘备ab1 \n😀é\u0301\ufffd\u200d龘𠀀"), st.integers(1, 0xD7FF).map(chr))))
def test_any_text_round_trips(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_a_spelled_out_special_token_stays_text(trained: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(trained, tmp_path)
    encoder = tokenizer.load(tmp_path)
    text = f"他说{END_OF_TEXT}然后"
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.token_to_id(END_OF_TEXT) not in ids
    assert encoder.decode(ids) == text


@pytest.mark.slow
def test_transformers_reads_the_same_ids_and_the_chat_template(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(trained, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == trained.encode(text).ids
    messages = [{"role": "user", "content": "你好"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert (theirs.eos_token, theirs.pad_token) == (END_OF_TEXT, "<|pad|>")


def test_a_tokenizer_of_others_ends_documents_with_its_own_token(tmp_path: Path) -> None:
    theirs = Tokenizer(models.BPE())
    theirs.add_special_tokens(["<s>", "</s>"])
    with pytest.raises(ValueError, match=r"has no <.endoftext.> and its tokenizer_config\.json names no eos_token"):
        tokenizer.end_of_text_id(tmp_path, theirs)
    for end in ('"</s>"', '{"content": "</s>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {end}}}')
        assert tokenizer.end_of_text_id(tmp_path, theirs) == 1
    theirs.add_special_tokens([END_OF_TEXT])
    assert tokenizer.end_of_text_id(tmp_path, theirs) == 2
