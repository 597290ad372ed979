"""One line of jsonl to what is packed of it, or to the reason why it is left out.

Reads the record, looks for personal data, renders, cuts what is too long. A pure function of the line, the tokenizer
and the settings, so that tasks do it in any order. Duplicates are the stage's to find: they need all lines.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from app.conversations.config import ConversationsConfig
from app.conversations.formats import Conversation, Message, Preference, detect, read
from app.conversations.packing import Piece
from app.conversations.rendering import Rendered, render
from app.privacy import mask_pii

Reason = Literal["malformed", "duplicate", "too_long", "unanswered", "personal"]


@dataclass(frozen=True)
class Rejected:
    """A line that is left out."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Example:
    """A conversation, or the chosen and the rejected one, as pieces; `num_tokens` is the length before it was cut."""

    pieces: tuple[Piece, ...]
    identity: str
    prompt_hash: str
    answer_bytes: int
    num_tokens: int
    truncated: bool
    layout: str
    num_answers: int
    personal: Counter[str] = field(default_factory=Counter)
    spelled: int = 0  # messages that spell a special token out

    @property
    def is_pair(self) -> bool:
        """Whether it is a preference."""
        return len(self.pieces) == 2

    @property
    def packed_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(map(len, self.pieces))


def read_example(line: str, tokenizer: Any, config: ConversationsConfig) -> Example | Rejected:
    """What is packed of a line, or why nothing is."""
    try:
        record = json.loads(line)
        found = read(record, config.layout)
        layout = config.layout if config.layout != "auto" else detect(record)
        given = (found.chosen, found.rejected) if isinstance(found, Preference) else (found,)
        masked, personal = _mask(given)
        if personal and config.pii == "drop":
            return Rejected("personal", ", ".join(sorted(personal)))
        sides: tuple[Conversation, ...] = masked if config.pii == "mask" else given
        rendered = [render(tokenizer, side, config.assistant_turns) for side in sides]
    except ValueError as error:
        return Rejected("malformed", str(error))
    limit = config.block_tokens // len(sides)
    num_tokens = max(len(one.input_ids) for one in rendered)
    if num_tokens > limit and config.too_long == "drop":
        return Rejected("too_long", f"{num_tokens} tokens")
    pieces = tuple(_piece(one, limit) for one in rendered)
    if not all(piece.loss_mask[1:].any() for piece in pieces):
        return Rejected("unanswered", f"no token of an answer among the first {limit}")
    return Example(
        pieces=pieces,
        identity=_hash([(side.messages, side.tools) for side in sides]),
        prompt_hash=_hash([sides[0].prompt]),
        answer_bytes=sum(sum(one.answer_bytes[:limit]) for one in rendered),
        num_tokens=num_tokens,
        truncated=num_tokens > limit,
        layout=layout,
        num_answers=sum(message["role"] == "assistant" for message in sides[0].messages),
        personal=personal,
        spelled=_spelled(sides[0].messages, tokenizer),
    )


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether the prompt's hash says so: answers to the same prompt stay together, whatever else is in the data."""
    return int(example.prompt_hash[:8], 16) < fraction * 16**8


def _piece(rendered: Rendered, limit: int) -> Piece:
    return Piece(np.array(rendered.input_ids[:limit], np.int32), np.array(rendered.loss_mask[:limit], np.bool_))


def _mask(sides: Sequence[Conversation]) -> tuple[tuple[Conversation, ...], Counter[str]]:
    """The conversations with placeholders in the messages' text, and what was found, counted in the first."""
    counts: Counter[str] = Counter()
    masked = []
    for number, side in enumerate(sides):
        messages: list[Message] = []
        for message in side.messages:
            text, found = mask_pii(message["content"])
            messages.append({**message, "content": text})
            counts += found if number == 0 else Counter()
        masked.append(replace(side, messages=tuple(messages)))
    return tuple(masked), counts


def _spelled(messages: Sequence[Message], tokenizer: Any) -> int:
    return sum(any(token in message["content"] for token in tokenizer.all_special_tokens) for message in messages)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
