"""Tool calls and tools that a chat template leaves out: such a call is not trained as an empty answer, and both are told."""

import json

import pytest
from byte_tokenizer import TEMPLATE
from chat_setups import ASK, CALL, TOOL, Setups, say

from torchft.config import DataConfig, SourceConfig
from torchft.data.account import LOST_CALL
from torchft.data.chat_template import ChatTemplate
from torchft.data.dataset import build_dataset
from torchft.data.lost import lost_call, lost_tools
from torchft.data.report import report
from torchft.errors import UserError

PLAIN = TEMPLATE[: TEMPLATE.index("{% for c")] + TEMPLATE[TEMPLATE.index("{% endfor %}") + len("{% endfor %}") :]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CALLS<|im_end|>\n{% endfor %}"
# How templates in use write calls; each has to be recognised.
STYLES = {
    "json of all calls": "{{ m.tool_calls | tojson }}",
    "json of functions": "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}",
    "name and json": "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
    "json or text": "{% for c in m.tool_calls %}{{ c.function.name }}{% if c.function.arguments is string %}"
    "{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}",
    "xml": "{% for c in m.tool_calls %}<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}{% endfor %}",
    "python": "{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments | items %}"
    "{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}",
    "python's repr": "{% for c in m.tool_calls %}{{ c.function }}{% endfor %}",
    "escaped": "{{ m.tool_calls | tojson(ensure_ascii=True) }}",
    "recased": "{% for c in m.tool_calls %}{{ c.function.name | upper | replace('_', '-') }}{{ c.function.arguments }}"
    "{% endfor %}",
}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


FOUND = call("find_it", größe='"<|im_end|>"', n=3)
CONVERSATIONS = [
    [ASK, say("", tool_calls=[FOUND])],
    [ASK, say("Wait.", tool_calls=[FOUND, FOUND]), {"role": "tool", "content": "12"}, say("It is 12.")],
    [ASK, say("", tool_calls=[call("now")])],  # without arguments
    [ASK, say("", tool_calls=[call("f", a={"b": [1, None]})]), {"role": "tool", "content": "find_it"}, say("Yes.")],
]


@pytest.fixture(scope="session")
def setups(shared_data, tmp_path_factory):
    return Setups(shared_data, tmp_path_factory.mktemp("tokenizers"))


def lost(chat, style: str) -> str:
    """What a template loses that writes calls so."""
    return lost_call(chat, ChatTemplate(TURNS.replace("CALLS", style), {}).render(chat))


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_way_to_write_a_call_is_seen(style):
    for chat in CONVERSATIONS:
        assert lost(chat, "{% if m.tool_calls %}" + style + "{% endif %}") == ""


@pytest.mark.parametrize("style", ["", "{% if m.tool_calls %}<tool_call>{% endif %}", "{{ m.tool_calls | length }}"])
def test_a_call_that_is_not_in_the_text_is_lost_whatever_else_says_its_name(style):
    for chat, name in zip(CONVERSATIONS, ("find_it", "find_it", "now", "f"), strict=True):
        assert lost(chat, style) == f"message 1, call of {name}"
    said = [{"role": "user", "content": "find_it größe n"}, say("find_it größe n", tool_calls=[FOUND])]
    assert lost(said, style) and lost([ASK, say("One")], style) == ""


def test_calls_of_which_the_template_writes_a_part_are_lost():
    first = "{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
    names = "{{ m.tool_calls | map(attribute='function.name') | join }}"
    assert lost([ASK, say("", tool_calls=[FOUND])], first) == ""
    assert lost([ASK, say("", tool_calls=[FOUND, call("now")])], first) == "message 1, call of now"
    assert lost([ASK, say("", tool_calls=[FOUND, FOUND])], first) == "message 1, call of find_it"  # one of the two
    assert lost([ASK, say("", tool_calls=[FOUND])], names) and not lost([ASK, say("", tool_calls=[call("now")])], names)


@pytest.mark.parametrize("name", ["llama3_1", "qwen2_5", "qwen3", "llama3", "phi3_5", "gemma", "gemma3"])
def test_which_real_templates_write_calls_and_tools(name, setups):
    template = setups(name).template
    writes = name in ("llama3_1", "qwen2_5", "qwen3")
    for chat in ([ASK, say("", tool_calls=[CALL])], [ASK, say("", tool_calls=[call("now")])]):
        assert (lost_call(chat, template.render(chat)) == "") == writes
    chat = [ASK, say("One")]
    assert lost_tools([TOOL], template.render(chat, [TOOL])) != writes
    assert not lost_tools(None, template.render(chat)) and not lost_tools([], template.render(chat))


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=[SourceConfig(path=str(path))], max_seq_len=1024, max_bad_rows=0.5)


def test_rows_that_lose_a_call_are_refused_by_line_and_dropped_within_the_policy(byte_model, tmp_path):
    template = type(byte_model[1])(PLAIN, byte_model[1].special)
    answered, called = {"messages": [ASK, say("One")]}, {"messages": [ASK, say("", tool_calls=[CALL]), ASK, say("Two")]}
    cfg = write_rows(tmp_path / "t.jsonl", answered | {"tools": [TOOL]}, called, answered, answered | {"tools": [TOOL]})
    dataset = build_dataset(cfg.train, cfg, byte_model[0], template, use_cache=False)
    assert dataset.reports[0].places == {LOST_CALL: [f"{tmp_path}/t.jsonl:2: message 1, call of find"]}
    assert f"  note        2 x the chat template does not write the tools, first in {tmp_path}/t.jsonl:1\n" in report(dataset)
    cfg.max_bad_rows = 0.0
    said = (
        r"^data.train\[0\]: 1 of 4 rows .*: choose .*with data\.chat_template: .*own.*\n"
        r".*t.jsonl:2\n  1 .*call: line 2: message 1"
    )
    with pytest.raises(UserError, match=said):
        build_dataset(cfg.train, cfg, byte_model[0], template, use_cache=False)
    dataset = build_dataset(cfg.train, cfg, *byte_model, use_cache=False)  # its own template writes calls
    assert dataset.reports[0].used == 4 and dataset.reports[0].notes == {"the chat template does not write the tools": 2}


def test_pairs_and_verdicts_that_lose_a_call_are_bad_rows_too(byte_model, tmp_path):
    template = type(byte_model[1])(PLAIN, byte_model[1].special)
    calling = {"prompt": "q", "chosen": [say("", tool_calls=[CALL])], "rejected": [say("No")], "tools": [TOOL]}
    cfg = write_rows(tmp_path / "t.jsonl", calling, calling | {"chosen": [say("One")]})
    for kind in ("pairs", "verdicts"):
        got = build_dataset(cfg.train, cfg, byte_model[0], template, kind=kind, use_cache=False).reports[0]
        assert got.reasons == {LOST_CALL: 1}
        assert got.notes == {"the chat template does not write the tools": 1}  # of one row, with two answers


def test_a_row_that_the_template_refuses_is_answered_with_the_option(byte_model, tmp_path):
    refusal = "{% if m.role == 'tool' %}{{ raise_exception('knows no tool') }}{% endif %}"
    refusing = PLAIN.replace("{{ m.content", refusal + "{{ m.content")
    cfg = write_rows(tmp_path / "t.jsonl", {"messages": [ASK, say("One"), {"role": "tool", "content": "12"}]})
    with pytest.raises(UserError, match=r"^.*: choose a template .*with data\.chat_template: (?s:.*)knows no tool"):
        build_dataset(cfg.train, cfg, byte_model[0], type(byte_model[1])(refusing, byte_model[1].special), use_cache=False)
