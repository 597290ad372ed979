"""Conversations to token ids, and which of them the assistant wrote: with the tokenizer's own chat template.

The ids are those that the endpoint computes for the same messages: the rendered text is tokenized as a whole, and
special tokens spelled out in it are special. An answer is what the template adds to the messages before it, so a
template needs no marks of its own; one that rewrites earlier turns is refused. It truncates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.conversations.formats import Conversation, Message
from app.models import CHAT_TEMPLATE, TURN_END, TURN_START

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class Rendered:
    """Token ids [N], whether each is to be predicted [N], and how many UTF-8 bytes of answer each begins [N]."""

    input_ids: list[int]
    loss_mask: list[bool]
    answer_bytes: list[int]


def load_chat_tokenizer(folder: Path) -> Any:
    """The tokenizer as the endpoint loads it, with its own chat template, or ours if it has ours' tokens.

    Raises ValueError when there is no template, or no fast tokenizer, which tells where in the text a token is from.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer_uri: {folder} has no tokenizer.json; convert it to a fast tokenizer first")
    if not tokenizer.chat_template:
        if not {TURN_START, TURN_END} <= tokenizer.get_vocab().keys():
            raise ValueError(f"tokenizer_uri: {folder} has no chat template; add a chat_template.jinja to it")
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, asks: bool = False
) -> str:
    """The messages as the model reads them; `asks` ends with the beginning of an answer."""
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=asks
    )
    return rendered


def render(tokenizer: Any, conversation: Conversation, turns: Turns = "all") -> Rendered:
    """Ids, the answers' tokens and bytes. An answer ends with the token that stops the model; what follows is not its.

    Raises ValueError when the template fails on the conversation or rewrites what stood before an answer.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        text = render_text(tokenizer, messages, tools)
        spans = [_span(tokenizer, conversation, index, text) for index in _answers(conversation, turns)]
    except ValueError:
        raise
    except Exception as error:  # of jinja: the template's own refusal, or a field that it needs
        raise ValueError(f"the chat template fails: {error}") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    rendered = Rendered(ids, [False] * len(ids), [0] * len(ids))
    special = set(tokenizer.all_special_ids)
    for start, end in spans:
        inside = [index for index, (begin, _) in enumerate(encoded["offset_mapping"]) if start <= begin < end]
        stop = max((index for index in inside if ids[index] in special), default=len(ids))
        said = start
        for index in inside:
            rendered.loss_mask[index] = index <= stop
            begin, end_of_token = encoded["offset_mapping"][index]
            if index < stop and ids[index] not in special:  # a character of several tokens counts with the first
                rendered.answer_bytes[index] = len(text[max(said, begin) : end_of_token].encode())
            said = max(said, end_of_token)
    return rendered


def _answers(conversation: Conversation, turns: Turns) -> list[int]:
    found = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    return [index for index in found[-1 if turns == "last" else 0 :] if index not in conversation.unscored]


def _span(tokenizer: Any, conversation: Conversation, index: int, text: str) -> tuple[int, int]:
    """Where in the text the answer with that index begins and ends."""
    messages, tools = conversation.messages, conversation.tools
    before = render_text(tokenizer, messages[:index], tools, asks=True)
    through = render_text(tokenizer, messages[: index + 1], tools)
    if not (text.startswith(through) and through.startswith(before)):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} rewrites what stands before messages[{index}], so its "
            "tokens cannot be told from the prompt's: set assistant_turns last, or use another template"
        )
    return len(before), len(through)
