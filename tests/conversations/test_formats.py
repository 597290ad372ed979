"""Every layout gives the same messages; what cannot be read is said, with its place in the record."""

import pytest

from app.conversations.formats import Conversation, Preference, detect, read

PLAIN = [
    {"role": "system", "content": "简短。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "好。"},
]
WEATHER = {"name": "weather", "parameters": {"type": "object"}}


def messages_of(record: object, layout: str = "auto") -> list[dict[str, object]]:
    found = read(record, layout)
    assert isinstance(found, Conversation)
    return list(found.messages)


SHARED = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好。"}]
LAYOUTS = [
    ("openai", {"messages": PLAIN}),
    ("openai", {"messages": [{"role": "developer", "content": [{"type": "text", "text": "简短。"}]}, *PLAIN[1:]]}),
    ("sharegpt", {"conversations": [{"from": "system", "value": "简短。"}, *SHARED]}),
    ("sharegpt", {"system": "简短。", "conversations": SHARED}),
    ("alpaca", {"system": "简短。", "instruction": "你好", "input": "", "output": "好。"}),
]


@pytest.mark.parametrize(("layout", "record"), LAYOUTS)
def test_every_layout_gives_the_same_messages(layout: str, record: dict[str, object]) -> None:
    assert detect(record) == layout
    assert messages_of(record) == PLAIN
    assert messages_of(record, layout) == PLAIN


def test_alpaca_has_an_input_and_a_history() -> None:
    record = {"instruction": "翻译", "input": "hello", "output": "你好", "history": [["在吗", "在"]]}
    contents = [message["content"] for message in messages_of(record)]
    assert contents == ["在吗", "在", "翻译\n\nhello", "你好"]


def test_tool_calls_have_the_form_that_the_endpoint_gives_templates() -> None:
    """Arguments are objects, tools have all their fields, results keep whose they are."""
    call = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "许都"}'}}
    record = {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            {"role": "user", "content": "天气？"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "晴"}]},
            {"role": "assistant", "content": "晴。"},
        ],
    }
    found = read(record)
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": WEATHER | {"description": None}},)
    asked = found.messages[1]
    assert asked["content"] == ""
    assert asked["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "许都"}}
    assert found.messages[2] == {"role": "tool", "content": "晴", "tool_call_id": "a1"}
    shared = {
        "tools": '[{"name": "weather", "parameters": {"type": "object"}}]',
        "conversations": [
            {"from": "human", "value": "天气？"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "许都"}}'},
            {"from": "observation", "value": "晴"},
            {"from": "gpt", "value": "晴。"},
        ],
    }
    same = read(shared)
    assert isinstance(same, Conversation)
    assert same.tools == found.tools
    assert [message["role"] for message in same.messages] == ["user", "assistant", "tool", "assistant"]
    assert same.messages[1]["tool_calls"][0]["function"] == asked["tool_calls"][0]["function"]


def test_an_answer_of_weight_nought_is_not_learned() -> None:
    record = {"messages": [*PLAIN[:2], {**PLAIN[2], "weight": 0}, *PLAIN[1:2], {**PLAIN[2], "weight": 1}]}
    found = read(record)
    assert isinstance(found, Conversation)
    assert found.unscored == {2}
    assert found.prompt == tuple(PLAIN[:2])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "你好", "chosen": "好。", "rejected": "哦"},
        {"messages": PLAIN[1:2], "chosen": {"role": "assistant", "content": "好。"}, "rejected": "哦"},
        {"chosen": PLAIN[1:], "rejected": [*PLAIN[1:2], {"role": "assistant", "content": "哦"}]},
        {"prompt": PLAIN[1:2], "chosen": PLAIN[1:], "rejected": [*PLAIN[1:2], {"role": "assistant", "content": "哦"}]},
    ],
)
def test_preferences_are_pairs_that_differ_in_the_last_answer(record: dict[str, object]) -> None:
    assert detect(record) == "preference"
    found = read(record)
    assert isinstance(found, Preference)
    assert list(found.chosen.messages) == PLAIN[1:]
    assert found.rejected.messages[-1]["content"] == "哦"
    assert found.chosen.unscored == {0}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "a list, not a JSON object"),
        ({"text": "…"}, r"keys 'text'; one of these is needed: chosen \(preference\), messages \(openai\)"),
        ({"messages": PLAIN[:2]}, "no answer of the assistant"),
        ({"messages": "你好"}, "messages: a str, not a list"),
        ({"messages": [{"role": "boss", "content": "x"}]}, r"messages\[0\].role: 'boss' is not one of"),
        ({"messages": [*PLAIN[:2], {"role": "assistant", "content": ""}]}, r"messages\[2\]: an empty answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, PLAIN[2]]}, "only text can be learned"),
        ({"messages": [*PLAIN, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "arguments of f: not valid JSON"),
        ({"conversations": [{"value": "x"}]}, "a turn needs 'from' and 'value'"),
        ({"instruction": "x"}, "output: an Alpaca record needs one"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "they are the same"),
        ({"prompt": "x", "chosen": PLAIN[:2], "rejected": "a"}, "chosen: it must end with an answer|no answer"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(record: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(record)


def test_a_named_layout_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="no 'messages', which the layout openai has"):
        read({"instruction": "你好", "output": "好。"}, "openai")
