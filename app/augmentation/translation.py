"""Back-translation: Chinese to English and back, by two local Marian models or an OpenAI-compatible endpoint.

A long text is translated in passages of whole sentences, and its line breaks stay. Both ways answer with a text or,
named, the reason why there is none: a translation that fails costs its variant, never the run.
It does not judge translations; the similarity floor does. The endpoint sees the documents: mind where it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app.augmentation.config import EndpointTranslationConfig, LocalTranslationConfig

if TYPE_CHECKING:
    from openai import OpenAI

TO_ENGLISH = "Translate the user's text into English. Answer with the translation only: no comment, no quotation marks."
TO_CHINESE = (
    "Translate the user's text into natural simplified Chinese. "
    "Answer with the translation only: no comment, no quotation marks."
)
EMPTY = "empty_translation"
CUT = "cut_translation"
_SENTENCE = re.compile("[^。！？!?\uff1b;\n]*[。！？!?\uff1b;]+[”’」』\"']*|[^。！？!?\uff1b;\n]+|\n+")
_CAMEL = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # APITimeoutError: API, Timeout, Error
_MARIAN_FILES = ("config.json", "source.spm", "target.spm", "vocab.json")


class Translation(NamedTuple):
    """A text, or the reason why there is none."""

    text: str
    failure: str | None = None


def split_passages(text: str, max_characters: int) -> list[str]:
    """Pieces that together are the text: runs of line breaks, and sentences joined up to so many characters.

    >>> split_passages("天下大势。分久必合。\\n话说周末。", 8)
    ['天下大势。', '分久必合。', '\\n', '话说周末。']
    """
    passages: list[str] = []
    for sentence in _SENTENCE.findall(text):
        is_joined = bool(passages) and "\n" not in sentence and "\n" not in passages[-1]
        if is_joined and len(passages[-1]) + len(sentence) <= max_characters:
            passages[-1] += sentence
        else:
            passages += [sentence[i : i + max_characters] for i in range(0, len(sentence), max_characters)]
    return passages


def translate_in_passages(
    texts: list[str], max_characters: int, translate: Callable[[list[str]], list[Translation]]
) -> list[Translation]:
    """Each text translated passage by passage; a failed passage fails its text."""
    split = [split_passages(text, max_characters) for text in texts]
    pieces = [piece for passages in split for piece in passages if piece.strip()]
    answers = iter(translate(pieces))
    results = []
    for passages in split:
        made = [next(answers) if piece.strip() else Translation(piece) for piece in passages]
        failure = next((one.failure for one in made if one.failure), None)
        results.append(Translation("".join(one.text for one in made), failure))
    return results


class LocalTranslator:
    """Two Marian models, loaded once per process."""

    def __init__(self, to_english_dir: Path, to_chinese_dir: Path, config: LocalTranslationConfig) -> None:
        self._to_english = _load_marian(to_english_dir)
        self._to_chinese = _load_marian(to_chinese_dir)
        self._config = config

    def back_translate(self, passages: list[str]) -> list[Translation]:
        """Chinese passages, through English, in their order."""
        order = sorted(range(len(passages)), key=lambda index: len(passages[index]))  # little padding
        results = [Translation("", EMPTY)] * len(passages)
        for start in range(0, len(order), self._config.batch_passages):
            chosen = order[start : start + self._config.batch_passages]
            english = self._translate(self._to_english, [passages[index].strip() for index in chosen])
            prompts = [self._config.to_chinese_prefix + text for text in english]
            for index, text, between in zip(chosen, self._translate(self._to_chinese, prompts), english, strict=True):
                if text.strip() and between.strip():
                    results[index] = Translation(text.strip())
        return results

    def _translate(self, loaded: tuple[Any, Any], texts: list[str]) -> list[str]:
        import torch

        model, tokenizer = loaded
        limit = model.config.max_position_embeddings
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        length = min(limit - 1, 2 * inputs["input_ids"].shape[1] + 16)  # a degenerate model would go on for ever
        with torch.inference_mode():
            output = model.generate(
                **inputs.to(model.device), num_beams=self._config.num_beams, do_sample=False, max_new_tokens=length
            )
        decoded: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
        return decoded


def check_marian(uri: str, names: Collection[str]) -> None:
    """Raises ValueError when a directory with files of these names is not one of a Marian model."""
    missing = [name for name in _MARIAN_FILES if name not in names]
    missing += [] if any(name.endswith(".safetensors") for name in names) else ["*.safetensors"]
    if missing:
        raise ValueError(f"local_translation: {uri} is no Marian model directory: it lacks {', '.join(missing)}")


def _load_marian(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import MarianMTModel, MarianTokenizer

    tokenizer = MarianTokenizer.from_pretrained(folder, local_files_only=True)
    model = MarianMTModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    model.train(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


class EndpointTranslator:
    """A chat model behind an OpenAI-compatible endpoint, asked twice for each passage."""

    def __init__(self, config: EndpointTranslationConfig, api_key: str) -> None:
        from openai import OpenAI

        self._config = config
        self._client: OpenAI = OpenAI(
            base_url=config.base_url,
            api_key=api_key or "none",
            timeout=config.timeout_seconds,
            max_retries=config.max_retries,
        )

    def back_translate(self, passages: list[str]) -> list[Translation]:
        """Chinese passages, through English, in their order; several requests are under way at once."""
        with ThreadPoolExecutor(self._config.num_requests) as pool:
            return list(pool.map(self._back_translate, passages))

    def _back_translate(self, passage: str) -> Translation:
        english = self._ask(TO_ENGLISH, passage.strip())
        return english if english.failure else self._ask(TO_CHINESE, english.text)

    def _ask(self, instruction: str, text: str) -> Translation:
        from openai import OpenAIError
        from openai.types.chat import ChatCompletion

        try:
            answer = self._client.chat.completions.create(
                model=self._config.model,
                messages=[{"role": "system", "content": instruction}, {"role": "user", "content": text}],
                temperature=0,
                max_tokens=self._config.max_tokens,
            )
        except OpenAIError as error:  # after all retries: timeouts, refusals, server errors, each under its own name
            return Translation("", f"endpoint_{_CAMEL.sub('_', type(error).__name__).lower()}")
        except ValueError:  # the client passes on what its JSON parser says of a body that is none
            return Translation("", "endpoint_invalid_answer")
        if not isinstance(answer, ChatCompletion) or not answer.choices:
            return Translation("", "endpoint_invalid_answer")
        choice = answer.choices[0]
        content = (choice.message.content or "").strip()
        if choice.finish_reason == "length":
            return Translation("", CUT)
        return Translation(content) if content else Translation("", EMPTY)
