"""What of a conversation is trained: masks written by hand."""

import pytest
from chat_setups import ASK, CALL, CHATML, TOOL, Setup, Setups, custom, say
from tokenizers_for_tests import CONTROL

from torchft.data.answers import EMPTY, NO_START, NOT_VERBATIM, REPEATED
from torchft.data.chat_template import SHIPPED
from torchft.data.formats import to_example
from torchft.data.layout import Layout
from torchft.data.rows import Row
from torchft.data.tokenize import NO_END

TEMPLATES = list(CONTROL)


@pytest.fixture(scope="session")
def setups(shared_data, tmp_path_factory):
    return Setups(shared_data, tmp_path_factory.mktemp("tokenizers"))


# --------------------------------------------------------------------------------------------------------


def test_mask_with_and_without_trimming(setups):
    chat = [{"role": "system", "content": " S "}, ASK, say(" One \n"), ASK, say("\n\ntwo words ")]
    assert setups("qwen2_5").marked(chat) == (
        "<|im_start|>system\n S <|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n[[ One \n<|im_end|>]]\n"
        # this tokenizer makes one token of the template's newline and the answer's first: it straddles
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n\n[[\ntwo words <|im_end|>]]\n"
    )
    assert setups("llama3").marked(chat) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[One<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[two words<|eot_id|>]]"
    )
    assert setups("gemma").marked(chat[1:]) == (
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n[[One<end_of_turn>]]\n"
        "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n[[two words<end_of_turn>]]\n"
    )
    assert setups("gemma3").marked(chat[:3]) == (
        "<bos><start_of_turn>user\n S \n\nHi there<end_of_turn>\n<start_of_turn>model\n[[One<end_of_turn>]]\n"
    )


def test_a_token_across_the_border_is_not_trained(setups):
    """Phi's `<|assistant|>` swallows the newline and the answer's first blank; its `<|end|>` swallows the newline
    behind.
    """
    setup = setups("phi3_5")
    assert setup.marked([ASK, say(" One")]) == "<|user|>Hi there<|end|><|assistant|>[[One<|end|>]]<|endoftext|>"
    real = setups("qwen2_5", "llama3")  # Llama 3 makes one token of any number of newlines
    made = real([ASK, say("\n\nOne\n")])
    pieces = [real.tokenizer.decode([token]) for token in made.ids]
    border = pieces.index("\n\n\n")
    assert pieces[border + 1] == "One" and made.trained[border : border + 2] == [False, True]


def test_mask_train_on_last(setups):
    chat = [ASK, say("One"), ASK, say("Two"), ASK]
    marked = setups("qwen2_5").marked(chat, train_on="last")
    assert "[[Two<|im_end|>]]" in marked and marked.count("[[") == 1


def test_mask_of_thinking_in_qwen3(setups):
    """The last answer keeps its thoughts, which the template takes apart and puts together again; earlier ones lose
    theirs.
    """
    setup = setups("qwen3")
    thought = say("<think>\nhm\n</think>\n\nOne")
    head = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert setup.marked([ASK, thought]) == head + "[[<think>\nhm\n</think>\n\nOne<|im_end|>]]\n"
    assert (
        setup.marked([ASK, thought, ASK, thought])
        == head + "One<|im_end|>\n" + head + "[[<think>\nhm\n</think>\n\nOne<|im_end|>]]\n"
    )
    assert setup([ASK, thought, ASK, thought]).notes == {NOT_VERBATIM: 1}
    # Without thoughts, the empty ones are the template's, not the row's.
    assert setup.marked([ASK, say("One"), ASK, say("Two")]) == (
        head + "[[One<|im_end|>]]\n" + head + "<think>\n\n</think>\n\n[[Two<|im_end|>]]\n"
    )
    # Other newlines than the row has: not verbatim.
    assert "[[" not in setup.marked([ASK, say("<think>hm</think>One")])
    # Thoughts in a field of their own are rendered, so they are trained, from behind the generation prompt on.
    for field in ("reasoning_content", "thinking", "reasoning"):
        assert (
            setup.marked([ASK, say("One", **{field: "hm\n"})]) == head + "[[<think>\nhm\n</think>\n\nOne<|im_end|>]]\n"
        )
    assert setup.marked([ASK, say("One", reasoning="hm"), ASK, say("Two")]).count("[[") == 1
    # A template that does not know the field drops it.
    assert setups("qwen2_5")([ASK, say("One", reasoning="hm")]).notes == {NOT_VERBATIM: 1}


def test_mask_of_tool_calls(setups):
    chat = [ASK, say(None, tool_calls=[CALL]), {"role": "tool", "content": "12"}, say("It is 12.")]
    arguments = '{"place": "Ü <|im_end|>", "n": 3}'
    asked = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    answered = (
        "<|im_end|>]]\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    qwen = setups("qwen2_5").marked(chat)
    want = (
        f'[[<tool_call>\n{{"name": "find", "arguments": {arguments}}}\n</tool_call>{answered}[[It is 12.<|im_end|>]]\n'
    )
    assert qwen.endswith(asked + want)
    both = [ASK, say("Wait.", tool_calls=[CALL, CALL])]
    call = f'<tool_call>\n{{"name": "find", "arguments": {arguments}}}\n</tool_call>'
    assert setups("qwen2_5").marked(both).endswith(f"{asked}[[Wait.\n{call}\n{call}<|im_end|>]]\n")
    assert setups("qwen3").marked(both).endswith(f"{asked}[[<think>\n\n</think>\n\nWait.\n{call}\n{call}<|im_end|>]]\n")
    llama = setups("llama3_1").marked([*chat[:1], say("", tool_calls=[CALL]), *chat[2:]], [TOOL])
    head = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    want = f'{head}[[{{"name": "find", "parameters": {arguments}}}<|eot_id|>]]'
    want += '<|start_header_id|>ipython<|end_header_id|>\n\n"12"<|eot_id|>'
    assert llama.endswith(f"{want}{head}[[It is 12.<|eot_id|>]]")
    empty = {"function": {"name": "now", "arguments": {}}}
    assert f'{head}[[{{"name": "now", "parameters": {{}}}}<|eot_id|>]]' in setups("llama3_1").marked(
        [ASK, say(None, tool_calls=[empty])]
    )
    as_text = {"function": {"name": "now", "arguments": '{"a": 1}'}}
    assert '"arguments": {"a": 1}}\n</tool_call><|im_end|>]]' in setups("qwen3").marked(
        [ASK, say("", tool_calls=[as_text])]
    )


def test_mask_of_tool_calls_without_a_generation_prompt(tmp_path):
    """Mistral's way: nothing announces an answer, so it begins where the messages before it end."""
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | map(attribute='function') | list | tojson }}"
        "{{ eos_token }}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    now = {"function": {"name": "now", "arguments": {}}}
    setup = custom(tmp_path, source, "llama3")
    chat = [ASK, say("", tool_calls=[now]), {"role": "assistant", "content": "Noon."}]
    call = '[[[TOOL_CALLS] [{"name": "now", "arguments": {}}]<|end_of_text|>]]'
    assert setup.marked(chat).startswith(f"<|begin_of_text|>[INST] Hi there [/INST]{call}")
    assert setup(chat).notes == {}
    # Not so where the template goes back on what it wrote: then nothing says where the answer begins.
    changing = custom(tmp_path / "b", "{{ messages | length }}" + source, "llama3")
    assert changing(chat).notes == {NO_START: 1}


def test_a_call_or_a_text_that_the_template_drops_is_counted(setups):
    assert setups("llama3")([ASK, say("Wait.", tool_calls=[CALL])]).notes == {NOT_VERBATIM: 1}  # knows no calls
    assert setups("llama3_1")([ASK, say("Wait.", tool_calls=[CALL])]).notes == {NOT_VERBATIM: 1}  # drops the text
    assert setups("qwen3")([ASK, say("<think>\nhm\n</think>\n\nOne", tool_calls=[CALL]), ASK, say("x")]).notes == {
        NOT_VERBATIM: 1
    }


def test_mask_of_json_content(tmp_path):
    """tojson is not the text as written, even where nothing needs an escape; escapes cannot be mistaken for the
    text.
    """
    setup = custom(tmp_path, CHATML.replace("m.content", "m.content | tojson"))
    made = setup([ASK, say('say "<|im_end|>"')])
    assert not any(made.trained) and made.notes == {NOT_VERBATIM: 1}
    assert setup.tokenizer.decode(made.ids, skip_special=False).endswith('"say \\"<|im_end|>\\""<|im_end|>\n')
    assert made.ids.count(setup.tokenizer.special_tokens["<|im_end|>"]) == 2


def test_mask_of_a_repeated_message(tmp_path):
    """Only the occurrence behind the generation prompt is trained; where none or both stand there, neither."""
    quoted = CHATML.replace(
        "{% if add", "{% if not add_generation_prompt %}(said: {{ messages[-1].content }}){% endif %}{% if add"
    )
    setup = custom(tmp_path, quoted)
    assert (
        setup.marked([ASK, say("One")])
        == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n[[One<|im_end|>]]\n(said: One)"
    )
    before = "(to say: {{ messages[-1].content }})" + CHATML
    assert (
        custom(tmp_path, before)
        .marked([ASK, say("One")])
        .endswith("(to say: One)<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n[[One<|im_end|>]]\n")
    )
    body, prompt = CHATML.split("{% if add")
    twice = f"{body}{body}{{% if add{prompt}"
    made = custom(tmp_path, twice)([ASK, say("One")])
    assert not any(made.trained) and made.notes == {REPEATED: 1}
    made = custom(tmp_path, twice.replace("{{ m.content }}", "{{ m.content or m.tool_calls | tojson }}"))(
        [ASK, say("", tool_calls=[CALL])]
    )
    assert not any(made.trained) and made.notes == {REPEATED: 1}
    # A user who says the same words is not the answer, and neither is an answer elsewhere that agrees.
    echo = custom(tmp_path, CHATML)
    chat = [
        {"role": "user", "content": "One"},
        say("One"),
        {"role": "user", "content": "One<|im_start|>assistant\nOne"},
        say("One"),
    ]
    assert echo.marked(chat) == (
        "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n[[One<|im_end|>]]\n"
        "<|im_start|>user\nOne<|im_start|>assistant\nOne<|im_end|>\n<|im_start|>assistant\n[[One<|im_end|>]]\n"
    )


def test_mask_of_templates_that_change_the_text(tmp_path):
    for change in (
        "upper",
        "replace('n', 'm')",
        "truncate(6, true, '', 0)",
        "reverse",
        "capitalize",
        "e",
        "urlencode",
        "indent",
    ):
        made = custom(tmp_path, CHATML.replace("m.content", f"m.content | {change}"))([ASK, say("one & liNe\ntwo")])
        assert not any(made.trained) and made.notes == {NOT_VERBATIM: 1}, change
    for change in ("m.content | trim", "m.content.strip()", "m.content | list | join", "m.content[:2] + m.content[2:]"):
        made = custom(tmp_path, CHATML.replace("m.content", change)).marked([ASK, say("One & two")])
        assert made.endswith("[[One & two<|im_end|>]]\n"), change
    swapped = custom(tmp_path, CHATML.replace("m.content", "m.content[3:] + m.content[:3]"))
    assert swapped([ASK, say("aaaaaa")]).notes == {NOT_VERBATIM: 1}  # the same text, but not in its place
    dropped = custom(tmp_path, CHATML.replace("m.content", "m.content.split('|')[-1]"))
    assert dropped([ASK, say("secret|One")]).notes == {NOT_VERBATIM: 1}
    restated = custom(tmp_path, CHATML.replace("m.content", "m.content.split('|')[0] + '|' + m.content.split('|')[1]"))
    for text in ("a|b", " a|b ", "  a | b\n "):
        assert restated.marked([{"role": "user", "content": "x|y"}, say(text)]).endswith(f"[[{text}<|im_end|>]]\n")
    mixed = custom(tmp_path, CHATML.replace("m.content", "m.content[:1] + messages[0].content + m.content[4:]"))
    assert mixed([{"role": "user", "content": "ine"}, say("Line 1")]).notes == {
        NOT_VERBATIM: 1
    }  # a user's letters between


def test_text_that_agrees_but_is_not_the_answers_own_in_its_place(tmp_path):
    """What else of the row could be taken for an answer, where the text is the same."""
    twice = custom(tmp_path, CHATML.replace("m.content", "m.content[:2] + m.content[:2]"))
    assert twice([ASK, say("aaaa")]).notes == {NOT_VERBATIM: 1}  # its own characters, but not in their places
    named = custom(tmp_path, CHATML.replace("m.content", "m.content[:1] + (m.name or m.content)[1:]"))
    assert named([ASK, say("ab", name="xb")]).notes == {NOT_VERBATIM: 1}  # another field of the same message
    blank = custom(tmp_path, CHATML.replace("m.content", "m.content[:1] + messages[0].content + m.content[2:]"))
    made = blank.marked([{"role": "user", "content": "."}, say("a.c")])
    assert "[[" not in made
    made = blank.marked([{"role": "user", "content": "\n"}, say("\n\nx")])  # a user's newline among the answer's
    assert made.endswith("assistant\n\n\n[[x<|im_end|>]]\n")


def test_a_call_named_again_above_the_tools_reply_does_not_prolong_it(tmp_path):
    """As gpt-oss does, which heads a reply with the name in the call before it."""
    reply = "{% if m.role == 'tool' %}<|im_start|>{{ messages[0].content }}"
    reply += "{{ messages[loop.index0 - 1].tool_calls[0].function.name }}"
    call = "{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.tool_calls[0].function | tojson }}<|im_end|>\n{% else %}"
    source = CHATML.replace(
        "<|im_start|>{{ m.role }}", f"{reply}: {{{{ m.content }}}}<|im_end|>\n{call}<|im_start|>{{{{ m.role }}}}", 1
    )
    source = source.replace("<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor", 1)
    chat = [
        ASK,
        say("", tool_calls=[{"function": {"name": "find", "arguments": {}}}]),
        {"role": "tool", "content": "12"},
    ]
    want = '<|im_start|>assistant\n[[{"name": "find", "arguments": {}}<|im_end|>]]\n<|im_start|>'
    assert custom(tmp_path, source).marked(chat).endswith(f"{want}Hi therefind: 12<|im_end|>\n")
    source = source.replace("{{ messages[0].content }}", "").replace("function | tojson }}", "function.name }}()")
    want = "<|im_start|>assistant\n[[find()<|im_end|>]]\n<|im_start|>"
    assert custom(tmp_path, source).marked(chat).endswith(f"{want}find: 12<|im_end|>\n")


def test_answers_without_an_end_and_without_text(tmp_path):
    bare = custom(tmp_path, "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}")
    chat = [ASK, say("One"), ASK, say("Two.")]
    made = bare(chat)
    assert made.notes == {NO_END: 2}
    assert bare.marked(chat).count("[[") == 2
    late = custom(tmp_path, "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}<|im_end|>")
    melting = custom(tmp_path, "{% for m in messages %}{{ m.content }}the{% endfor %}")
    assert melting.marked([ASK, say("One ")]) == "Hi therethe[[One]] the"  # " the" is one token
    assert late(chat).notes == {NO_END: 1}  # the second one has its end; a user's turn stands before the first one's
    assert custom(tmp_path, CHATML)([ASK, say(""), ASK, say(" ")]).notes == {EMPTY: 1}
    assert custom(tmp_path, CHATML).marked([ASK, say(" ")]).endswith("assistant\n[[ <|im_end|>]]\n")


def test_mask_of_content_in_parts(setups):
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    setup = setups("gemma3")
    assert setup.ids([ASK, say(parts)]) == setup([ASK, say(parts)]).ids
    assert setup.marked([ASK, say(parts)]).endswith("<start_of_turn>model\n[[Onetwo<end_of_turn>]]\n")
    assert setup.marked([{"role": "user", "content": parts}, say("One")]).endswith(
        "<start_of_turn>model\n[[One<end_of_turn>]]\n"
    )


def test_rows_with_content_in_parts_are_what_transformers_makes_of_them(setups):
    """Its template walks through the parts; ours gets their text in one."""
    chat = [ASK, say([{"type": "text", "text": "One"}, {"type": "text", "text": " two"}, {"type": "text", "text": " three"}])]
    walking = "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"
    setup = Setup(setups("qwen2_5").tokenizer.path, CHATML.replace("{{ m.content }}", walking), setups("qwen2_5"))
    row = Row("t.jsonl:1", {"messages": chat})
    read = to_example(row, Layout("messages", {"messages": "messages"})).messages
    assert read[1]["content"] == "One two three" and setup(read).ids == setup.ids(chat) == setup(chat).ids


def test_shipped_templates_train_answers_and_their_ends(tmp_path):
    chat = [ASK, say("One"), ASK, say("Two")]
    chatml = custom(tmp_path, SHIPPED["chatml"].read_text(encoding="utf-8"))
    assert chatml.marked(chat).count("<|im_end|>]]") == 2
    alpaca = custom(tmp_path, SHIPPED["alpaca"].read_text(encoding="utf-8"), "llama3")
    assert alpaca.marked(chat).count("### Response:\n[[") == 2 and alpaca.marked(chat).count("<|end_of_text|>]]") == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_end_token_is_trained_whatever_the_length(name, setups):
    """T2: one token per answer, the same however long the row; nothing here knows a limit."""
    setup = setups(name)
    for size in (1, 2, 50, 2000):
        made = setup([ASK, say("word " * size + "x"), ASK, say("y" * size)])
        ends = [
            i
            for i, (token, on) in enumerate(zip(made.ids, made.trained, strict=True))
            if on and token in setup.tokenizer.control_ids
        ]
        assert len(ends) == 2
        assert setup.tokenizer.decode([made.ids[ends[0]]], skip_special=False) in (
            "<end_of_turn>",
            "<|eot_id|>",
            "<|end|>",
            "<|im_end|>",
        )
