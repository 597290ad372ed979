"""Next tokens of a model whose likeliest token is known: the one after its input, in a circle."""

from types import SimpleNamespace
from typing import Any

import torch

from app.quantization.comparison import next_tokens, same_percent

VOCAB_SIZE, CONTEXT_TOKENS, END_OF_TEXT_ID = 7, 4, 0


class Successor:
    config = SimpleNamespace(vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT_TOKENS)
    device = "cpu"

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % VOCAB_SIZE, VOCAB_SIZE).float())


class Digits:
    eos_token_id = END_OF_TEXT_ID

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(letter) for letter in text] for text in texts]}


def test_next_tokens_of_each_text_up_to_the_context() -> None:
    found = next_tokens(Successor(), Digits(), ["36", "12345"])  # type: ignore[arg-type]
    assert found.tolist() == [1, 4, 0, 1, 2, 3, 4]


def test_same_percent() -> None:
    assert same_percent(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == 66.67
