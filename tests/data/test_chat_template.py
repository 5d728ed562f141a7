"""Rendering against transformers' own, whose text is whose, errors, the shipped templates and their choice."""

from datetime import datetime

import pytest
from tokenizers_for_tests import for_template

from torchft.data import sandbox
from torchft.data.chat_template import SHIPPED, ChatTemplate, RowError, load_template
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "user", "content": "  Hi <|im_end|> there\n"}, {"role": "assistant", "content": "Yes.\nNo "}]


def render(source: str, messages=None, tools=None, **variables):
    return ChatTemplate(source, SPECIAL).render(messages or CHAT, tools, **variables)


def own(rendered, message: int) -> list[tuple[str, int]]:
    """What of the text is a message's own characters: (text, offset in the string it came from)."""
    return [(rendered.text[a:b], offset) for a, b, source, offset in rendered.spans if source.message == message]


# --------------------------------------------------------------------

# Each is rendered with the chat below by transformers and by us; "own": what must be known as message 0's own
# characters.
SAME = {
    "{{ messages[0].content }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0]['content'] | trim }}!": [("Hi <|im_end|> there", 2)],
    "{{ '[' + messages[0].content.strip() + ']' }}": [("Hi <|im_end|> there", 2)],
    "{{ '[' ~ messages[0].content ~ 3 ~ none ~ missing ~ ']' }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ '%s|%5d|%%' % (messages[0].content, 3) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ '%s' | format(messages[0].content) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ '{0}-{x}'.format(messages[0].content, x=1) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ '{}-{:>3}-{!s}'.format(1, 2, messages[0].content) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ '{x.role}{x[content]}'.format_map({'x': messages[0]}) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0].content.split('<|im_end|>') | join('+') }}": [("  Hi ", 0), (" there\n", 15)],
    "{{ ', '.join([messages[0].content, 'x']) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0].content | replace('Hi', 'Ho') }}": [("  ", 0), (" <|im_end|> there\n", 4)],
    "{{ messages[0].content.replace('\\n', '') }}": [("  Hi <|im_end|> there", 0)],
    "{{ messages[0].content[2:4] }}{{ messages[0].content[-3] }}": [("Hi", 2), ("r", 19)],
    "{{ messages[0].content | list | join }}": [("  Hi <|im_end|> there\n", 0)],
    "{% for c in messages[0].content %}{{ c }}{% endfor %}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0].content | string | safe }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0].missing | default(messages[0].content) }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ [messages[0].content, 'x'] | first }}{{ ['x', messages[0].content] | last }}": [
        ("  Hi <|im_end|> there\n", 0),
        ("  Hi <|im_end|> there\n", 0),
    ],
    "{% set x %}({{ messages[0].content }}){% endset %}{{ x }}": [("  Hi <|im_end|> there\n", 0)],
    "{% macro m(x) %}({{ x }}){% endmacro %}{{ m(messages[0].content) }}": [("  Hi <|im_end|> there\n", 0)],
    "{% macro m() %}({{ caller() }}){% endmacro %}{% call m() %}{{ messages[0].content }}{% endcall %}": [
        ("  Hi <|im_end|> there\n", 0),
    ],
    "{% filter trim %}{{ messages[0].content }}{% endfilter %}": [("Hi <|im_end|> there", 2)],
    "{% generation %}{{ messages[0].content }}{% endgeneration %}": [("  Hi <|im_end|> there\n", 0)],
    "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}": [
        ("  Hi <|im_end|> there\n", 0)
    ],
    "{{ messages | map(attribute='content') | join('|') }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | first }}": [
        ("Hi <|im_end|> there", 2),
    ],
    "{{ messages[0].content | indent(2, true) }}": [("  Hi <|im_end|> there", 0)],
    "{{ ('a\\n\\nb' + messages[0].content) | indent }}": [("  Hi <|im_end|> there", 0)],
    "{{ ('a\\n\\nb' + messages[0].content) | indent(1, blank=true) }}": [("  Hi <|im_end|> there", 0)],
    "{{ messages[0].content | upper }}": [("  HI <|IM_END|> THERE\n", 0)],
    "{{ messages[0].content | truncate(12, true, '..', 0) }}": [("  Hi <|im_", 0)],
    "{{ messages[0].content | truncate(12) }}": [("  Hi", 0)],
    "{{ messages[0].content | reverse | reverse }}": [("  Hi <|im_end|> there\n", 0)],
    "{{ messages[0].get('content', 'x') }}{{ messages[0].get('nothing', 'x') }}": [("  Hi <|im_end|> there\n", 0)],
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}": [
        ("content", 0), ("  Hi <|im_end|> there\n", 0),
    ],
    "{{ messages[0].content | tojson }}": [('"  Hi <|im_end|> there\\n"', -1)],
    "{{ {'a': messages[0].content, 'é': 1} | tojson(indent=2) }}": [
        ('{\n  "a": "  Hi <|im_end|> there\\n",\n  "é": 1\n}', -1),
    ],
    "{{ messages[0].content | escape }}": [("  Hi &lt;|im_end|&gt; there\n", -1)],
    "{{ messages[0].content | urlencode }}": [("%20%20Hi%20%3C%7Cim_end%7C%3E%20there%0A", -1)],
    "{{ '%10s|%r' % ('a', messages[0].content) }}": [("'  Hi <|im_end|> there\\n'", -1)],
    "{{ [messages[0].content] }}": [("['  Hi <|im_end|> there\\n']", -1)],
    "{{ messages[0].content.split() | length }}{{ messages[0].content | wordcount }}": [],
    "{{ bos_token }}{{ eos_token | upper }}{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}": [],
    "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 3 * 'ab' }}{{ 1.5 | round(0) }}": [],
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}": [],
    "{{ {'user': '<|u|>'}[messages[0].role] }}{{ {'user': '<|u|>'}.get(messages[0].role) }}": [],
    "{% if messages[0].content.startswith('  Hi') and 'there' in messages[0].content %}y{% endif %}": [],
}  # fmt: skip


@pytest.mark.parametrize("source", SAME)
def test_prints_what_transformers_prints_and_knows_whose_it_is(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    want, _ = render_jinja_template([CHAT], chat_template=source, **SPECIAL)
    got = render(source)
    assert got.text == want[0]
    assert own(got, 0) == SAME[source]


# As Llama 3.2's: today's date, unless the caller gives one, or the library has none to give.
DATED = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{{- "Today Date: " + date_string }}: {{ messages[0].content }}"""


def test_the_date_is_fixed_and_all_else_is_transformers(monkeypatch):
    """transformers prints today's: with that as our fixed date, or ours as its date_string, the two are equal."""
    from transformers.utils.chat_template_utils import render_jinja_template

    want, _ = render_jinja_template([CHAT], chat_template=DATED, date_string="26 Jul 2024", **SPECIAL)
    assert render(DATED).text == want[0]
    assert render(DATED, date_string="1 May 2025").text.startswith("Today Date: 1 May 2025: ")
    monkeypatch.setattr(sandbox, "NOW", datetime.now())
    want, _ = render_jinja_template([CHAT], chat_template=DATED, **SPECIAL)
    assert render(DATED).text == want[0]


def test_roles_are_the_templates_and_unknown_roles_the_rows():
    known = render("{{ '<|' + messages[0].role + '|>' }}")
    assert known.spans == []  # Phi-4-mini writes its control tokens so
    odd = render("{{ '<|' + messages[0].role + '|>' }}", [{"role": "im_end", "content": "x"}])
    assert own(odd, 0) == [("im_end", 0)]


def test_tool_schemas_calls_and_names_are_the_rows():
    tools = [{"type": "function", "function": {"name": "f<|x|>", "parameters": {"<|y|>": {}}}}]
    source = "{{ tools | tojson }}|{{ tools[0].function.name }}|"
    source += "{% for k in tools[0].function.parameters %}{{ k }}{% endfor %}"
    spans = [(source.message, offset) for _, _, source, offset in render(source, tools=tools).spans]
    assert spans == [(-1, -1), (-1, 0), (-1, 0)]
    both = render("{{ messages | tojson }}{{ [messages[1].content] | tojson }}")
    assert [span[2].message for span in both.spans] == [-1, 1]  # of several messages: no one's
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    assert own(render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", call), 0) == [("{}", -1)]


def test_null_fields_are_left_out_and_reasoning_has_all_its_names():
    chat = [{"role": "assistant", "content": None, "name": None, "reasoning": "hm"}]
    source = "{{ messages[0].content is defined }}{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert render(source, chat).text == "Falsehmhm"


# ----------------------------------------------------------------------------------------------------------------


def test_bad_syntax_names_the_line():
    with pytest.raises(UserError, match=r"chat template, line 3: .*endfor"):
        ChatTemplate("a\nb\n{% endfor %}", SPECIAL)
    with pytest.raises(UserError, match="line 2"):
        ChatTemplate("a\n{{ x | nosuchfilter }}", SPECIAL)
    with pytest.raises(UserError, match="limit is"):
        ChatTemplate("x" * 2_000_000, SPECIAL)
    with pytest.raises(UserError, match="cannot be compiled"):
        ChatTemplate("{% if a %}" * 300 + "{% endif %}" * 300, SPECIAL)


def test_what_a_template_raises_is_the_rows_error():
    with pytest.raises(RowError, match="^chat template, line 2: System role not supported$"):
        render("\n{{ raise_exception('System role not supported') }}")
    with pytest.raises(RowError, match="line 3: .*no attribute 'nothing'"):
        render("a\nb\n{{ messages[0].nothing.more }}")
    with pytest.raises(RowError, match="TypeError"):
        render("{{ messages[0].content + 1 }}")
    with pytest.raises(RowError, match="empty"):
        ChatTemplate("x", SPECIAL).render([])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hello", "message 0 is a str"),
        ({"role": "user", "content": 3}, "content is the int 3"),
        ({"role": "user", "content": {"a": {1, 2}}}, "holds a set, which JSON"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part of its content has no text"),
        ({"role": "assistant", "reasoning": ["hm"]}, "reasoning is a list, not text"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls is a str"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "no object with a function name"),
    ],
)
def test_a_message_of_the_wrong_shape_is_the_rows_error(message, said):
    with pytest.raises(RowError, match=said):
        render("{{ messages[0] }}", [message])


# --------------------------------------------------------------------------------------


class FakeTokenizer:
    path = "models/x"
    named = SPECIAL
    special_tokens = {"<s>": 0, "</s>": 1}
    chat_template: str | None = None
    tools_template: str | None = None


def test_chatml():
    template = ChatTemplate(SHIPPED["chatml"].read_text(), SPECIAL)
    chat = [{"role": "system", "content": " Be brief. "}, *CHAT]
    want = "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n  Hi <|im_end|> there\n<|im_end|>\n"
    want += "<|im_start|>assistant\nYes.\nNo <|im_end|>\n"
    assert template.render(chat).text == want
    assert template.render(chat, add_generation_prompt=True).text == want + "<|im_start|>assistant\n"
    assert template.generation_prompt == "<|im_start|>assistant\n"


def test_alpaca():
    template = ChatTemplate(SHIPPED["alpaca"].read_text(), SPECIAL)
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ask, say = [{"role": "user", "content": "Add 1 and 2."}], [{"role": "assistant", "content": "3"}]
    asked = "\n\n### Instruction:\nAdd 1 and 2."
    assert template.render(ask + say).text == f"<s>{head}{asked}\n\n### Response:\n3</s>"
    assert template.render(ask, add_generation_prompt=True).text == f"<s>{head}{asked}\n\n### Response:\n"
    assert (
        template.render([{"role": "system", "content": "Obey."}, *ask, *say]).text
        == f"<s>Obey.{asked}\n\n### Response:\n3</s>"
    )
    with pytest.raises(RowError, match="not tool"):
        template.render([{"role": "tool", "content": "x"}])


def test_the_choice_of_a_template(tmp_path):
    tokenizer = FakeTokenizer()
    assert load_template("", tokenizer) is None  # enough for plain texts
    with pytest.raises(UserError, match=r"data\.chat_template: 'chatnl' is no file and none of chatml, alpaca"):
        load_template("chatnl", tokenizer)
    with pytest.raises(UserError, match=r"control tokens <\|im_start\|> and <\|im_end\|>.*data\.new_tokens"):
        load_template("chatml", tokenizer)
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    assert load_template(str(file), tokenizer).render(CHAT).text == "<s>  Hi <|im_end|> there\n"
    tokenizer.chat_template, tokenizer.tools_template = "plain", "with tools"
    template = load_template("", tokenizer)
    assert (template.render(CHAT).text, template.render(CHAT, []).text) == ("plain", "with tools")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(str(file), tokenizer)


def test_new_tokens_that_the_template_spells_become_control_tokens(tmp_path):
    tokenizer = load_tokenizer(for_template("llama3", tmp_path))
    template = load_template("chatml", tokenizer, ["<|im_start|>", "<|im_end|>", "<unit>"])
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens) and "<unit>" not in tokenizer.special_tokens
    assert template.generation_prompt == "<|im_start|>assistant\n"


def test_generation_prompt_is_found_piece_by_piece():
    phi = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    phi += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    assert ChatTemplate(phi, SPECIAL).generation_prompt == "<|assistant|>"
    one = "{{ messages[0].content + ('<A>' if add_generation_prompt else '') }}"
    assert ChatTemplate(one, SPECIAL).generation_prompt == "<A>"
    assert ChatTemplate("{{ messages[0].content }}", SPECIAL).generation_prompt == ""
    assert ChatTemplate("{{ raise_exception('no') }}", SPECIAL).generation_prompt == ""
