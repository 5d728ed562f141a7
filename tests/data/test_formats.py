"""Rows to examples: what each format becomes, and under which reason a row is refused."""

import json

import pytest

from torchft.config import SourceConfig
from torchft.data.formats import Example, split_answer, to_example
from torchft.data.layout import Layout, detect_layout
from torchft.data.rows import BadRow, Row
from torchft.data.sources import read_source
from torchft.errors import UserError

KEY = "data.train[0]"


def example(values, **options):
    row = Row("t.jsonl:7", values)
    return to_example(row, detect_layout([row], SourceConfig(path="t.jsonl", **options), KEY))


def test_a_mapped_input_is_appended_too():
    mapped = {"instruction": "question", "input": "context", "output": "answer"}
    assert example({"answer": "a", "question": "q", "context": "c"}, columns=mapped).messages == [
        {"role": "user", "content": "q\n\nc"},
        {"role": "assistant", "content": "a"},
    ]


def test_instruct_rows_become_two_or_three_messages():
    def said(**values):
        return [(m["role"], m["content"]) for m in example({"instruction": "Add.", "output": " 3 "} | values).messages]

    assert said() == said(input="") == said(input=" ") == said(input=None) == [("user", "Add."), ("assistant", " 3 ")]
    assert said(input="1 2") == [("user", "Add.\n\n1 2"), ("assistant", " 3 ")]
    assert said(system="Be brief.")[0] == ("system", "Be brief.")
    assert example({"question": "q", "answer": "a"}) == Example(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], None, None, "t.jsonl:7"
    )


CALL = {"name": "add", "arguments": {"a": 1, "b": "x"}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}


def test_messages_keep_every_key_and_tool_calls_get_one_shape():
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "1 + x?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2x", "reasoning_content": "hm", "tool_calls": None},
    ]
    as_text = json.loads(json.dumps(turns))
    as_text[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["arguments"])
    as_text[2]["tool_calls"][0].pop("type")
    wanted = [dict(turn) for turn in turns]
    wanted[2]["content"] = ""
    wanted[5].pop("tool_calls")
    for given in (turns, as_text, json.dumps(turns)):
        assert example({"messages": given}).messages == wanted
    flat = [turns[1], {"role": "assistant", "tool_calls": [CALL]}]
    assert example({"messages": flat}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }


def test_content_in_parts_of_text_is_joined():
    turns = [{"role": "system", "content": []}, {"role": "user", "content": "q"}, {"role": "assistant", "content": " a b"}]
    cached = {"type": "text", "text": " ", "cache_control": {"type": "x"}}
    parts = [{"type": "text", "text": " a"}, cached, {"type": "text", "text": "b"}]
    wanted = [turns[0] | {"content": ""}, *turns[1:]]
    assert example({"messages": [turns[0], turns[1], turns[2] | {"content": parts}]}).messages == wanted
    calling = {"role": "assistant", "content": [], "tool_calls": [CALL]}
    assert example({"messages": [turns[1], calling]}).messages[1]["content"] == ""


def test_tools_come_as_list_or_text_bare_or_wrapped():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    wrapped = [{"type": "function", "function": TOOL}]
    for given in ([TOOL], wrapped, json.dumps([TOOL]), json.dumps(wrapped)):
        assert example({"messages": turns, "tools": given}).tools == wrapped
    for empty in (None, "", " ", "[]", []):
        assert example({"messages": turns, "tools": empty}).tools is None


def test_sharegpt_roles_calls_and_observations():
    row = {
        "conversations": [
            {"from": "human", "value": "1 + x?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "one"},
            {"from": "observation", "value": "two"},
            {"from": "gpt", "value": "2x"},
            {"from": "human", "value": "again"},
            {"from": "function_call", "value": json.dumps([CALL, CALL | {"arguments": json.dumps(CALL["arguments"])}])},
        ],
        "tools": json.dumps([TOOL]),
        "system": "Be brief.",
    }
    call = {"type": "function", "function": CALL}
    assert example(row) == Example(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + x?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": "two"},
            {"role": "assistant", "content": "2x"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
        ],
        [{"type": "function", "function": TOOL}],
        None,
        "t.jsonl:7",
    )


def test_text_rows_keep_their_text():
    assert example({"text": " a\n"}) == Example(None, None, " a\n", "t.jsonl:7")


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD_ROWS = [
    ("instruct", {"instruction": "q", "output": None}, 'null "output"'),
    ("instruct", {"instruction": "q"}, 'no "output"'),
    ("instruct", {"instruction": "q", "output": " \n"}, 'blank "output"'),
    ("instruct", {"instruction": "", "output": "a"}, 'blank "instruction"'),
    ("instruct", {"instruction": "q", "output": 72}, '"output" is not text: int'),
    ("instruct", {"instruction": ["q"], "output": "a"}, '"instruction" is not text: list'),
    ("instruct", {"instruction": "q", "output": "a", "input": 5}, '"input" is not text: int'),
    ("instruct", {"instruction": "q", "output": "a\0"}, 'NUL character: "output"'),
    ("instruct", {"instruction": "q\ud800", "output": "a"}, 'text that is not Unicode: "instruction"'),
    ("instruct", {"instruction": "q", "output": "a", "system": "\udcff"}, 'text that is not Unicode: "system"'),
    ("text", {"text": None}, 'null "text"'),
    ("text", {"text": ""}, 'blank "text"'),
    ("messages", {"messages": None}, 'null "messages"'),
    ("messages", {}, 'no "messages"'),
    ("messages", {"messages": []}, 'empty "messages"'),
    ("messages", {"messages": "[{]"}, '"messages" is not JSON'),
    ("messages", {"messages": '[{"role": "user", "role": "user"}]'}, '"messages" is not JSON: duplicate key'),
    ("messages", {"messages": U}, '"messages" is not a list of objects'),
    ("messages", {"messages": ["q"]}, '"messages" is not a list of objects'),
    ("messages", {"messages": [U]}, "no assistant turn"),
    ("messages", {"messages": [U, {"role": "bot", "content": "a"}]}, r"unknown role: .*'bot' in messages\[1\]"),
    ("messages", {"messages": [U, {"role": ["assistant"], "content": "a"}]}, "unknown role"),
    ("messages", {"messages": [{"from": "human", "value": "q"}]}, "unknown role: .*sharegpt"),
    ("messages", {"messages": [U, {"role": "assistant", "content": None}]}, "null or no content in turn of assistant"),
    ("messages", {"messages": [U, {"role": "assistant"}]}, "null or no content in turn of assistant"),
    ("messages", {"messages": [{"role": "user", "content": 3}, A]}, "content in turn of user is not text: int"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, IMAGE]}, A]},
     r"a part of the content in turn of user is not text: type 'image_url' in messages\[0\]; only type text"),
    ("messages", {"messages": [U, A | {"content": [{"text": "a"}]}]}, "turn of assistant is not text: type None"),
    ("messages", {"messages": [U, {"role": "assistant", "content": ["a"]}]}, "turn of assistant is not text: a str in"),
    ("messages", {"messages": [U, A | {"content": [{"type": "text"}]}]}, "a text part .* is not text: NoneType"),
    ("messages", {"messages": [U, {"role": "assistant", "content": []}]}, "blank content in turn of assistant"),
    ("messages", {"messages": [U, {"role": "assistant", "content": "\n"}]}, "blank content in turn of assistant"),
    ("messages", {"messages": [{"role": "system", "content": "s"}] * 2 + [U, A]}, "more than one system turn"),
    ("messages", {"messages": [U, {"role": "system", "content": "s"}, A]}, "a system turn that is not the first"),
    ("messages", {"messages": [U, A | {"tool_calls": [{"name": "f"}]}]}, "tool call without name and arguments"),
    ("messages", {"messages": [U, A | {"tool_calls": ["f"]}]}, "tool call without name and arguments"),
    ("messages", {"messages": [U, A | {"tool_calls": [CALL | {"arguments": "{"}]}]}, "arguments .* is not JSON"),
    ("messages", {"messages": [U, A | {"tool_calls": [CALL | {"arguments": [1]}]}]}, "are not an object"),
    ("messages", {"messages": [U, A | {"tool_calls": [CALL | {"arguments": {"x": "\0"}}]}]}, "NUL character"),
    ("messages", {"messages": [U, A | {"thinking": float("nan")}]}, "NaN or infinite number"),
    ("messages", {"messages": [U, A | {"weight": 0}]}, 'a turn is masked by "weight"'),
    ("messages", {"messages": [U, A], "tools": "{}x"}, '"tools" is not JSON'),
    ("messages", {"messages": [U, A], "tools": {"name": "f"}}, '"tools" is not a list'),
    ("messages", {"messages": [U, A], "tools": [{"parameters": {}}]}, '"tools" has an entry without a name'),
    ("sharegpt", {"conversations": [{"from": "gpt4", "value": "a"}]}, "unknown role"),
    ("sharegpt", {"conversations": [{"from": None, "value": "a"}]}, "unknown role"),
    ("sharegpt", {"conversations": [U, A]}, "unknown role: .*map the column to messages"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "a", "train": False}]}, 'a turn is masked by "train"'),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "null or no content in turn of user"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}, "no assistant turn"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "function_call is not JSON"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, "empty list of tool calls"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}], "system": "t"},
     "more than one system turn"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "values", "reason"), BAD_ROWS)
def test_bad_rows_have_a_reason(form, values, reason):
    columns = {"instruct": ["instruction", "output", "input", "system"], "messages": ["messages", "tools"],
               "sharegpt": ["conversations", "tools", "system"], "text": ["text"]}[form]  # fmt: skip
    with pytest.raises(BadRow, match=reason):
        to_example(Row("t.jsonl:7", values), Layout(form, {name: name for name in columns}))


def test_nesting_beyond_any_schema_is_a_bad_row():
    deep = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(BadRow, match="nested too deeply"):
        example({"messages": [U, A], "tools": [{"name": "f", "parameters": deep}]})


def test_a_blank_csv_cell_names_the_column_and_an_empty_input_is_none(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("instruction,input,output\nAdd.,,3\nAdd.,1 2,\n")
    source = SourceConfig(path=str(path))
    rows = read_source(source, KEY)
    layout = detect_layout(rows, source, KEY)
    assert to_example(rows[0], layout).messages[0]["content"] == "Add."
    with pytest.raises(BadRow, match='blank "output"'):
        to_example(rows[1], layout)
    assert rows[1].where == f"{path}:3"


def test_split_answer_takes_the_last_assistant_turn():
    messages = [U, A, U, {"role": "assistant", "content": "last"}, U]
    assert split_answer(Example(messages, None, None, "t:1")) == ([U, A, U], "last")
    with pytest.raises(UserError, match="t:1: .*plain text"):
        split_answer(Example(None, None, "text", "t:1"))
