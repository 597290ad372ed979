"""Back-translation: passages, a fake endpoint, and a tiny random Marian model."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.augmentation.config import EndpointTranslationConfig, LocalTranslationConfig
from app.augmentation.translation import (
    TO_CHINESE,
    TO_ENGLISH,
    EndpointTranslator,
    LocalTranslator,
    Translation,
    check_marian,
    split_passages,
    translate_in_passages,
)
from tests.augmentation.fake_endpoint import Answer, completion, endpoint
from tests.augmentation.tiny_marian import write_tiny_marian

ENGLISH = {"天下大势。": "The general trend.", "分久必合。": "Long divided, must unite."}
CHINESE = {"The general trend.": "总的趋势。", "Long divided, must unite.": "长久分裂必定统一。"}


@given(st.text("天下。!\n ab", max_size=60), st.integers(1, 20))
def test_passages_are_the_text(text: str, max_characters: int) -> None:
    passages = split_passages(text, max_characters)
    assert "".join(passages) == text
    assert all(len(passage) <= max_characters or not passage.strip() for passage in passages)


def test_passages_are_whole_sentences() -> None:
    text = "天下大势，分久必合。“合久必分！”周末七国分争？\n\n并入于秦"
    assert split_passages(text, 18) == ["天下大势，分久必合。“合久必分！”", "周末七国分争？", "\n\n", "并入于秦"]


def test_line_breaks_stay_and_a_failed_passage_fails_its_text() -> None:
    def shout(passages: list[str]) -> list[Translation]:
        return [Translation("", "failed") if "x" in one else Translation(one.upper()) for one in passages]

    made = translate_in_passages(["a。\n\nb", "c。x。d", ""], 2, shout)
    assert made[0] == Translation("A。\n\nB")
    assert made[1].failure == "failed"
    assert made[2] == Translation("")


def back_translate(answer: Any, passages: list[str], **settings: object) -> tuple[list[Translation], list[Any]]:
    with endpoint(answer) as (base_url, requests):
        values = {"base_url": base_url, "model": "m", "max_retries": 1, "timeout_seconds": 5} | settings
        translator = EndpointTranslator(EndpointTranslationConfig.model_validate(values), "secret")
        return translator.back_translate(passages), requests


def translated(body: dict[str, Any]) -> Answer:
    instruction, text = (message["content"] for message in body["messages"])
    return completion({TO_ENGLISH: ENGLISH, TO_CHINESE: CHINESE}[instruction][text])


def test_the_endpoint_is_asked_twice_for_each_passage_and_order_is_kept() -> None:
    made, requests = back_translate(translated, list(ENGLISH))
    assert made == [Translation("总的趋势。"), Translation("长久分裂必定统一。")]
    assert len(requests) == 4
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert {(request["model"], request["temperature"], request["path"]) for request in requests} == {
        ("m", 0, "/v1/chat/completions")
    }


@pytest.mark.parametrize(
    ("answer", "failure", "num_requests"),
    [
        ((500, "{}"), "endpoint_internal_server_error", 2),  # one retry
        ((429, "{}"), "endpoint_rate_limit_error", 2),
        ((401, "{}"), "endpoint_authentication_error", 1),
        ((200, "no json"), "endpoint_invalid_answer", 1),
        ((200, "{}"), "endpoint_invalid_answer", 1),
        (completion(" "), "empty_translation", 1),
        (completion("The general", "length"), "cut_translation", 1),
    ],
)
def test_what_the_endpoint_fails_at_has_a_name(answer: Answer, failure: str, num_requests: int) -> None:
    made, requests = back_translate(lambda _: answer, ["天下大势。"])
    assert made == [Translation("", failure)]
    assert len(requests) == num_requests


def test_a_slow_endpoint_is_given_up() -> None:
    import time

    def slow(_: object) -> Answer:
        time.sleep(0.3)
        return completion("too late")

    made, _ = back_translate(slow, ["天下大势。"], timeout_seconds=0.05, max_retries=0)
    assert made == [Translation("", "endpoint_api_timeout_error")]


def test_no_endpoint_at_all_has_a_name() -> None:
    config = EndpointTranslationConfig(base_url="http://127.0.0.1:1/v1", model="m", max_retries=0)
    assert EndpointTranslator(config, "").back_translate(["天"]) == [Translation("", "endpoint_api_connection_error")]


@pytest.mark.slow
def test_a_local_marian_translates_there_and_back(tmp_path: Path) -> None:
    write_tiny_marian(tmp_path / "zh-en")
    write_tiny_marian(tmp_path / "en-zh")
    config = LocalTranslationConfig(batch_passages=2, num_beams=2)
    translator = LocalTranslator(tmp_path / "zh-en", tmp_path / "en-zh", config)
    passages = [
        "天下大势。",
        "分久必合，合久必分。" * 20,
        "合久必分。",
    ]  # the second is longer than the model's context
    made = translator.back_translate(passages)
    assert len(made) == 3
    assert all(one.text or one.failure == "empty_translation" for one in made)
    assert any(one.text for one in made)
    assert translator.back_translate(passages) == made


def test_a_directory_of_another_model_is_refused() -> None:
    names = {"config.json", "source.spm", "target.spm", "vocab.json", "pytorch_model.bin"}
    with pytest.raises(ValueError, match=r"/m is no Marian model directory: it lacks \*\.safetensors"):
        check_marian("/m", names)
    check_marian("/m", names | {"model.safetensors"})
