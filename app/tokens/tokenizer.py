"""Byte-level BPE whose pre-tokeniser is right for Chinese text mixed with other scripts.

Text is first cut where script changes: no token crosses a border between Chinese, other letters, digits and
punctuation, so that 三国2024 and 三国 2024 share tokens. Any Unicode string round-trips, since the bytes are the base.
After Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909) and GPT-2's byte level; trained by `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from app.models import CHAT_TEMPLATE, END_OF_TEXT, PADDING, SPECIAL_TOKENS, TURN_END, TURN_START

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
PATTERN = "|".join(
    [
        rf"[{_CJK}]+",
        rf" ?[\p{{L}}\p{{M}}&&[^{_CJK}]]+",  # a space belongs to the Latin word after it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # of a run of spaces the last one stays for the word
        r"\s+",
    ]
)


def train(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """A tokenizer of at most vocab_size tokens; fewer when the texts have no more frequent pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the 256 bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face layout, with the special tokens and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def load(folder: Path) -> Tokenizer:
    """The tokenizer for encoding documents: `<|endoftext|>` spelled out in a text is text, not the special token."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(folder: Path, tokenizer: Tokenizer) -> int:
    """What goes between documents: `<|endoftext|>`, or the end token of a tokenizer of others that has none.

    Raises ValueError when it has neither.
    """
    found = tokenizer.token_to_id(END_OF_TEXT)
    if found is None and (folder / "tokenizer_config.json").exists():
        given = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token") or ""
        found = tokenizer.token_to_id(given["content"] if isinstance(given, dict) else given)
    if found is None:
        raise ValueError(f"tokenizer_uri: it has no {END_OF_TEXT} and its tokenizer_config.json names no eos_token")
    return int(found)
