"""Conversations to ids and masks: ids against transformers' apply_chat_template, masks against hand-written ones,
hostile rows.
"""

import itertools
import random

import jinja2
import pytest
from chat_setups import ASK, TOOL, Setup, Setups, say
from conversations import conversation, words
from tokenizers_for_tests import CONTROL, PLAIN

from torchft.data.answers import NOT_VERBATIM
from torchft.data.backends import find_controls
from torchft.data.chat_template import RowError
from torchft.data.tokenize import NO_END, render_prompt, stop_ids, tokenize_text
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError

TEMPLATES = list(CONTROL)


@pytest.fixture(scope="session")
def setups(shared_data, tmp_path_factory):
    return Setups(shared_data, tmp_path_factory.mktemp("tokenizers"))


# ---- ids are transformers' -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "llama3"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_apply_chat_template(name, kind, setups):
    """210 conversations each, tools and thinking among them; where the template refuses one, we do."""
    setup = setups(name, kind)
    refused = answered = 0
    for seed in range(210):
        messages, tools = conversation(seed)
        try:
            want = setup.ids(messages, tools)
        except (jinja2.TemplateError, TypeError):
            refused += 1
            with pytest.raises(RowError):
                setup(messages, tools)
            continue
        made = setup(messages, tools)
        assert made.ids == want, seed
        assert len(made.trained) == len(want)
        answered += any(made.trained)
        check_mask(setup, messages, made)
        if seed % 7 == 0:
            assert render_prompt(messages, tools, setup.tokenizer, setup.template) == setup.ids(
                messages, tools, add_generation_prompt=True
            )
    assert answered >= 60 and refused <= 150


def check_mask(setup: Setup, messages: list[dict], made) -> None:
    """Every trained stretch ends with one control token and holds no other, unless it is the template's own within a
    call.
    """
    if not setup.tokenizer.control_ids & set(made.ids) or made.notes[NO_END]:
        return
    answers = sum(message["role"] == "assistant" for message in messages)
    runs = [
        [t for t, _ in group]
        for on, group in itertools.groupby(zip(made.ids, made.trained, strict=True), lambda p: p[1])
        if on
    ]
    skipped = sum(made.notes.values())
    assert len(runs) == answers - skipped  # each answer is one stretch, or counted
    for run in runs:
        assert run[-1] in setup.tokenizer.control_ids
        assert not setup.tokenizer.control_ids & set(run[:-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_going_around_gives_the_same_ids(name, setups):
    """The way that hostile rows take, forced upon harmless ones."""
    setup = setups(name)
    for seed in range(60):
        messages, tools = conversation(seed)
        try:
            rendered = setup.template.render(messages, tools)
        except RowError:
            continue
        foreign = [span[:2] for span in rendered.spans]
        ids, offsets, _ = setup.tokenizer.encode_rendered(rendered.text, foreign)
        backend, control = setup.tokenizer.backend, setup.tokenizer.special_tokens
        around = backend.encode_around(rendered.text, find_controls(rendered.text, foreign, backend._pattern, control))
        assert around == (ids, offsets), seed


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_one_bos_if_the_template_has_one(name, setups):
    """The tokenizers here add BOS by themselves to whatever is encoded with special tokens."""
    setup = setups(name)
    bos = CONTROL[name][0]
    ids = setup([ASK, say("Yes.")]).ids
    assert ids.count(setup.tokenizer.special_tokens[bos]) == int("bos_token" in setup.source and name != "phi3_5")


def test_plain_text_is_bos_text_eos(setups, shared_data):
    tokenizer = setups("llama3").tokenizer
    ids = tokenize_text("the answer <|eot_id|>", tokenizer)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the answer <|eot_id|>")[0], tokenizer.eos_id]
    llama2 = load_tokenizer(shared_data / "tokenizers/llama2")
    assert tokenize_text("Hello", llama2) == [1, 15043, 2]  # with the blank before the first word, as trained
    llama2.named = {}
    assert tokenize_text("Hello", llama2) == [15043]


# ---- hostile rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "llama3"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_row_writes_a_control_token(name, kind, setups):
    """Every control token's spelling in every role: as many control tokens as without, and the text comes back."""
    setup = setups(name, kind)
    tools = [TOOL] if name in ("llama3_1", "qwen2_5", "qwen3") else None

    def build(text: str) -> list[dict]:
        chat = [ASK | {"content": f"{text} a"}, say(f"b {text}"), ASK | {"content": text}, say(f"{text}{text}c")]
        if name not in ("gemma", "gemma3"):
            chat.insert(0, {"role": "system", "content": f"s{text}"})
        if tools:
            call = {"function": {"name": f"f{text}", "arguments": {f"k{text}": f"v{text}"}}}
            chat += [ASK, say("", tool_calls=[call]), {"role": "tool", "content": f"r{text}"}, say("end")]
        return chat

    def shape(text: str):
        schema = {"type": "function", "function": {"name": f"f{text}", "description": text}}
        made = setup(build(text), [schema] if tools else None)
        return made, [
            (token, on)
            for token, on in zip(made.ids, made.trained, strict=True)
            if token in setup.tokenizer.control_ids
        ]

    _, want = shape("harmless")
    spelled = list(CONTROL[name] if kind == "trained" else setup.tokenizer.special_tokens)
    plain = [token for token in PLAIN.get(name, ()) if token != "</think>"]  # at which Qwen3 takes an answer apart
    for text in [*spelled[:12], "".join(spelled[:6]), spelled[-1] + "\n" + spelled[0], *plain]:
        made, got = shape(text)
        assert got == want, text
        schema = {"type": "function", "function": {"name": f"f{text}", "description": text}}
        rendered = setup.template.render(build(text), [schema] if tools else None).text
        if name != "phi3_5" or kind != "trained":  # there control tokens swallow blanks
            assert setup.tokenizer.decode(made.ids, skip_special=False) == rendered


def test_no_row_completes_a_control_token(setups):
    """Random scraps of control tokens around where the template writes its own."""
    for name in TEMPLATES:
        setup = setups(name)
        scraps = [token[:i] for token in CONTROL[name] for i in (1, 2, -1)] + [
            token[i:] for token in CONTROL[name] for i in (1, 2, -1)
        ]
        scraps += [*CONTROL[name], " ", "\n", "x"]
        rng = random.Random(name)
        want = None
        for _ in range(80):
            texts = ["".join(rng.choices(scraps, k=rng.randint(1, 6))) + "." for _ in range(4)]
            chat = [ASK | {"content": texts[0]}, say(texts[1]), ASK | {"content": texts[2]}, say(texts[3])]
            rendered = setup.template.render(chat)
            made = setup(chat)
            got = [token for token in made.ids if token in setup.tokenizer.control_ids]
            want = want or got
            assert got == want, texts
            if name != "phi3_5":
                assert setup.tokenizer.decode(made.ids, skip_special=False) == rendered.text


def test_masks_go_by_position_not_by_id_or_search(setups):
    """T3, T4: users who say the end token, the answer's header, and the answer; pad and end the same token."""
    setup = setups("llama3")
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    chat = [
        {"role": "user", "content": f"{header}One<|eot_id|>"},
        say("One"),
        {"role": "user", "content": "One"},
        say(f"{header}One"),
    ]
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    assert setup.marked(chat) == (
        f"<|begin_of_text|>{user}{header}One<|eot_id|><|eot_id|>{header}[[One<|eot_id|>]]{user}One<|eot_id|>{header}[[{header}One<|eot_id|>]]"
    )
    made = setup(chat)
    ends = [
        on
        for token, on in zip(made.ids, made.trained, strict=True)
        if token == setup.tokenizer.special_tokens["<|eot_id|>"]
    ]
    assert ends == [False, True, False, True]


def test_earlier_answers_do_not_depend_on_later_ones_where_the_template_says_so(setups):
    """T5: no prefix is assumed. The mask of a conversation is that of its own render, not of its beginning's."""
    setup = setups("qwen3")
    thought = say("<think>\nhm\n</think>\n\nOne")
    short, long = setup([ASK, thought]), setup([ASK, thought, ASK, say("Two")])
    assert long.ids[: len(short.ids)] != short.ids
    assert sum(short.trained) > 5 and long.notes == {NOT_VERBATIM: 1}
    rng = random.Random(5)
    for _ in range(50):
        chat = [
            ASK,
            say(words(rng, 1, 5)),
            ASK,
            say(f"<think>\n{words(rng, 1, 4)}\n</think>\n\n{words(rng, 1, 4)}"),
            ASK,
            say("x"),
        ]
        cut = rng.choice((2, 4, 6))
        made = setup(chat[:cut])
        assert made.ids == setup.ids(chat[:cut])
        assert made.notes == ({NOT_VERBATIM: 1} if cut == 6 else {})


def test_a_row_that_cannot_be_encoded_is_an_error_of_the_row(setups):
    with pytest.raises(UserError, match="half a surrogate pair"):
        setups("llama3")([ASK | {"content": "\ud800"}, say("One")])
    with pytest.raises(RowError, match="line 1: Conversation roles must alternate"):
        setups("gemma")([ASK, ASK])


# ---- generation ------------------------------------------------------------------------------------------------------


def test_prompts_and_stop_ids(setups):
    for name in TEMPLATES:
        setup = setups(name)
        tokens = setup.tokenizer.special_tokens
        end = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3_5": "<|end|>"}.get(
            name, "<|eot_id|>" if "llama" in name else "<|im_end|>"
        )
        assert stop_ids(setup.tokenizer, setup.template) == {setup.tokenizer.eos_id, tokens[end]}
        prompt = render_prompt([ASK], None, setup.tokenizer, setup.template)
        assert prompt == setup.ids([ASK], add_generation_prompt=True)
        whole = setup([ASK, say("One")])
        if name != "qwen3":  # which puts empty thoughts before the answer
            before = whole.ids[: whole.trained.index(True)]
            assert setup.tokenizer.decode(before, skip_special=False) == setup.tokenizer.decode(
                prompt, skip_special=False
            )
    assert stop_ids(setups("llama3").tokenizer, None) == {setups("llama3").tokenizer.eos_id}
