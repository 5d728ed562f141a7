"""Columns to formats: what is detected, what is asked for, what is refused."""

import pytest

from torchft.config import SourceConfig
from torchft.data.formats import to_example
from torchft.data.layout import Layout, detect_layout
from torchft.data.rows import BadRow, Row
from torchft.data.sources import read_source
from torchft.errors import UserError

KEY = "data.train[0]"
ONE_COLUMN = ("messages", "sharegpt", "text")  # all that these formats need


def detect(columns, /, label="x", **options):
    rows = [Row("t.jsonl:1", dict.fromkeys(columns, "x") | ({"label": label} if "label" in columns else {}))]
    return detect_layout(rows, SourceConfig(path="t.jsonl", **options), KEY)


@pytest.mark.parametrize(
    ("columns", "form", "found", "unused"),
    [
        (["instruction", "input", "output"], "instruct", ["instruction", "output", "input"], []),
        (["instruction", "output", "history"], "instruct", ["instruction", "output"], ["history"]),
        (["question", "answer", "system"], "instruct", ["question", "answer", "system"], []),
        (["question", "answer", "input"], "instruct", ["question", "answer"], ["input"]),
        (["prompt", "completion"], "instruct", ["prompt", "completion"], []),
        (["prompt", "response", "id"], "instruct", ["prompt", "response"], ["id"]),
        (["messages", "tools", "prompt"], "messages", ["messages", "tools"], ["prompt"]),
        (["conversations", "tools", "system"], "sharegpt", ["conversations", "tools", "system"], []),
        (["text", "url"], "text", ["text"], ["url"]),
    ],
)
def test_formats_are_detected_from_the_columns(columns, form, found, unused):
    assert detect(columns) == Layout(form, {name: name for name in found}, unused)


def test_the_columns_of_most_rows_decide():
    rows = [Row("a:1", {"question": "q", "answer": "a"})] * 2 + [
        Row("a:3", {"text": "t"}),
        Row("a:4", None, BadRow("x")),
    ]
    assert detect_layout(rows, SourceConfig(path="a"), KEY) == Layout(
        "instruct", {"question": "question", "answer": "answer"}, ["text"]
    )


def test_an_optional_column_of_few_rows_is_read():
    rows = [Row("a:1", {"messages": 1})] * 9 + [Row("a:10", {"messages": 1, "tools": 2, "id": 3})]
    assert detect_layout(rows, SourceConfig(path="a"), KEY) == Layout(
        "messages", {"messages": "messages", "tools": "tools"}, ["id"]
    )


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        (
            ["instruction", "output", "text"],
            {},
            r"fit instruct \(instruction, output\) and text .*set data\.train\[0\]\.format",
        ),
        (["messages", "conversations"], {}, r"fit messages .* and sharegpt .*set data\.train\[0\]\.format"),
        (
            ["question", "answer", "prompt", "response"],
            {},
            r"set data\.train\[0\]\.columns, e\.g\. \{question: question",
        ),
        (["q", "a"], {}, r"data\.train\[0\]\.format: t\.jsonl has the columns q, a, which fit no format .*map them"),
        (
            ["text"],
            {"format": "instruct"},
            r"has the columns text, which fit no format \(instruct: instruction, output or .*; set it to text$",
        ),
        *((["instruction", "output"], {"format": form}, rf"\({form}: \w+\); set it to instruct$") for form in ONE_COLUMN),
        *((["quest"], {"format": form}, r"map them, e\.g\. .*: \{\w+: quest\}$") for form in ONE_COLUMN),
        (["quest"], {"format": "instruct"}, r"map them, e\.g\. .*: \{instruction: quest, output: \.\.\.\}$"),
        (["text"], {"format": "txt"}, r"data\.train\[0\]\.format: 'txt' is not known; did you mean 'text'\?"),
        (["q", "a"], {"columns": {"instuction": "q"}}, r"columns: 'instuction' .*did you mean 'instruction'\?"),
        (
            ["quest", "a"],
            {"columns": {"instruction": "qest"}},
            r"columns\.instruction: .*no column 'qest'; did you mean 'quest'\?",
        ),
        (["text"], {"format": "text", "columns": {"input": "text"}}, r"'input' is not a name of ours; known are text"),
        (
            ["chosen", "rejected", "prompt"],
            {},
            r"data\.train\[0\]: t\.jsonl is preference data \(it has chosen, rejected\)",
        ),
        (["conversations", "chosen", "rejected"], {}, r"preference data"),
    ],
)
def test_what_is_unclear_is_an_error_that_names_the_option(columns, options, said):
    with pytest.raises(UserError, match=said):
        detect(columns, **options)


def test_kto_labels_are_preference_data_unless_the_format_is_given():
    with pytest.raises(UserError, match=r"preference data \(it has label\)"):
        detect(["messages", "label"], label=True)
    assert detect(["messages", "label"], label=True, format="messages").unused == ["label"]
    assert detect(["messages", "label"], label="news").format == "messages"


def test_column_maps_rename_choose_and_hide():
    assert detect(["q", "a"], columns={"instruction": "q", "output": "a"}).columns == {
        "instruction": "q",
        "output": "a",
    }
    assert detect(["conversations"], columns={"messages": "conversations"}).format == "messages"
    two = ["question", "answer", "prompt", "response"]
    assert detect(two, columns={"prompt": "prompt", "response": "response"}).columns == {
        "prompt": "prompt",
        "response": "response",
    }


def test_shared_files_are_detected(shared_data):
    def read(name):
        source = SourceConfig(path=str(shared_data / name))
        rows = read_source(source, KEY)
        return rows, detect_layout(rows, source, KEY)

    assert read("sft/alpaca_en_demo.json")[1].format == "instruct"
    rows, layout = read("sft/glaive_toolcall_en_demo.json")
    assert layout.format == "sharegpt"
    examples = [to_example(row, layout) for row in rows]
    assert sum("tool_calls" in message for example in examples for message in example.messages) == 211
    assert sum(example.tools is not None for example in examples) == 191
    for name in ("preference/dpo_en_demo.json", "preference/kto_en_demo.json"):
        with pytest.raises(UserError, match="preference data"):
            read(name)
