"""Token ids are the endpoint's, answers alone are learned, and a template that rewrites the past is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from app.conversations.formats import Conversation, read
from app.conversations.rendering import load_chat_tokenizer, render, render_text
from tests.conversations.tiny import NAMES, write_base, write_tokenizer

pytestmark = pytest.mark.slow  # imports transformers and vLLM
REWRITING = (  # earlier answers lose what only the last one has
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_MARKS = (  # of the kind of Llama 2: no turn markers, an end-of-text token after answers
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendering")
    return write_base(write_tokenizer(root / "tokenizer"), root / "base", steps=0)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_chat_tokenizer(model)


def with_template(model: Path, template: str | None) -> Any:
    changed = load_chat_tokenizer(model)
    changed.chat_template = template
    return changed


def random_record(draw: random.Random, special: bool = True) -> dict[str, Any]:
    """Turns of odd text: newlines, blanks, emoji, maybe special tokens spelled out, tool calls and their results."""
    words = [*NAMES, "\n", "  ", "hello ", "🙂", "é", "\n\n", "１２", "\t", "{", "</s>", "。"]
    words += ["<|im_end|>", "<|endoftext|>"] if special else []

    def text() -> str:
        return "".join(draw.choices(words, k=draw.randint(1, 12)))

    messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
    record: dict[str, Any] = {"messages": messages}
    if draw.random() < 0.4:
        parameters = {"type": "object", "properties": {"城": {"type": "string"}}}
        record["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
        if draw.random() < 0.5:
            record["tools"][0]["function"]["description"] = "天气\n<b>"
    for _ in range(draw.randint(1, 4)):
        content: Any = text() if draw.random() < 0.8 else [{"type": "text", "text": text()} for _ in range(2)]
        messages.append({"role": "user", "content": content})
        if record.get("tools") and draw.random() < 0.7:
            calls = [
                {
                    "id": f"c{n}",
                    "type": "function",
                    "function": {"name": "weather", "arguments": json.dumps({"城": text()})},
                }
                for n in range(draw.randint(1, 2))
            ]
            messages.append({"role": "assistant", "content": draw.choice([None, text()]), "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": text()} for call in calls]
        messages.append({"role": "assistant", "content": text()})
    return record


def test_200_conversations_have_the_ids_that_vllm_computes(model: Path, tokenizer: Any) -> None:
    """By vLLM's own parsing of messages and tools and its own rendering, as its server does it."""
    from vllm.config import ModelConfig
    from vllm.entrypoints.chat_utils import parse_chat_messages
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
    from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template
    from vllm.tokenizers import get_tokenizer

    served = get_tokenizer(str(model))
    config = ModelConfig(model=str(model), tokenizer=str(model), dtype="float32")
    draw = random.Random(0)
    for _ in range(200):
        record = random_record(draw)
        found = read(json.loads(json.dumps(record)))
        assert isinstance(found, Conversation)
        request = TokenizeChatRequest.model_validate({**record, "model": "m", "add_generation_prompt": False})
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        form = resolve_chat_template_content_format(None, tools, "auto", served, model_config=config)
        messages, *_ = parse_chat_messages(request.messages, config, content_format=form)
        theirs = safe_apply_chat_template(
            config, served, messages, tools=tools, tokenize=True, add_generation_prompt=False
        )
        assert render(tokenizer, found).input_ids == list(theirs)


def test_only_answers_are_learned_each_with_its_end(tokenizer: Any) -> None:
    """In 200 conversations: what is learned is, text for text, what the template puts between prompt and end."""
    draw = random.Random(1)
    for _ in range(200):
        found = read(random_record(draw, special=False))
        assert isinstance(found, Conversation)
        rendered = render(tokenizer, found)
        expected = ""
        for index, message in enumerate(found.messages):
            if message["role"] == "assistant":
                before = render_text(tokenizer, found.messages[:index], found.tools, asks=True)
                through = render_text(tokenizer, found.messages[: index + 1], found.tools)
                expected += through[len(before) :].removesuffix("\n")
        learned = [
            token for token, is_learned in zip(rendered.input_ids, rendered.loss_mask, strict=True) if is_learned
        ]
        assert tokenizer.decode(learned, skip_special_tokens=False) == expected
        assert sum(rendered.answer_bytes) == len(expected.replace("<|im_end|>", "").encode())


def test_last_and_unscored_answers(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "刘备"}]
    record = {"messages": [*turns, turns[0], {"role": "assistant", "content": "曹操"}]}
    both = read(record)
    record["messages"][1] = {**turns[1], "weight": 0}
    second = read(record)
    assert isinstance(both, Conversation)
    assert isinstance(second, Conversation)

    def learned(conversation: Conversation, **options: Any) -> str:
        made = render(tokenizer, conversation, **options)
        ids = [token for token, is_learned in zip(made.input_ids, made.loss_mask, strict=True) if is_learned]
        return str(tokenizer.decode(ids))

    assert learned(both) == "刘备<|im_end|>曹操<|im_end|>"
    assert learned(both, turns="last") == learned(second) == "曹操<|im_end|>"


def test_a_template_without_turn_marks_serves_as_well(model: Path) -> None:
    chat = with_template(model, WITHOUT_MARKS)
    found = read({"instruction": "谁", "output": "刘备", "history": [["在", "曹操"]]})
    assert isinstance(found, Conversation)
    made = render(chat, found)
    ids = [token for token, is_learned in zip(made.input_ids, made.loss_mask, strict=True) if is_learned]
    assert chat.decode(ids) == " 曹操<|endoftext|> 刘备<|endoftext|>"


def test_a_template_that_rewrites_the_past_is_refused_by_name(model: Path) -> None:
    chat = with_template(model, REWRITING)
    found = read({"instruction": "谁", "output": "刘备", "history": [["在", "曹操"]]})
    assert isinstance(found, Conversation)
    with pytest.raises(
        ValueError, match=rf"template of {model} rewrites what stands before messages\[1\].* set assist"
    ):
        render(chat, found)
    assert any(render(chat, found, "last").loss_mask)


def test_a_tokenizer_without_template_gets_ours_or_is_refused(model: Path, tmp_path: Path) -> None:
    with_template(model, None).save_pretrained(tmp_path)
    assert "<|im_start|>" in load_chat_tokenizer(tmp_path).chat_template
    settings = (tmp_path / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(settings)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = {name: value for name, value in names.items() if "special" not in name and "added" not in name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"has no chat template; add a chat_template.jinja"):
        load_chat_tokenizer(tmp_path)
