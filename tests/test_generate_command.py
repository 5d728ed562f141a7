"""`tune generate` and exact match: prompts through the chat template, the chat's memory, adapters, and what is said."""

import argparse
import builtins
import functools
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from torchft import answers as answers_module
from torchft import chat
from torchft.adapter import save_adapter
from torchft.answers import Answer, answer_examples, exact_match, shortened
from torchft.chat import load_model, main_generate
from torchft.data.chat_template import ChatTemplate, load_template
from torchft.data.formats import Example
from torchft.data.tokenize import render_prompt
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.generate import generate
from torchft.models import build_model
from torchft.modules.lora import LoraSpec, add_lora, init_lora
from torchft.modules.transformer import CausalLM
from torchft.names import RECIPES

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def scaled_model(hf: dict) -> CausalLM:
    """Random, with logits so far apart that every greedy choice is clear."""
    model = build_model(hf)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory: a random Llama, and a tokenizer of printable characters and a few control tokens."""
    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: index for index, token in enumerate([*characters, *SPECIAL])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.decoder = tokenizers.decoders.Fuse()
    library.add_special_tokens(SPECIAL)
    path = tmp_path / "base"
    path.mkdir()
    library.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|begin|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    hf = LLAMA | {"vocab_size": len(vocab)}
    (path / "config.json").write_text(json.dumps(hf))
    save_file(
        {name: tensor.clone() for name, tensor in scaled_model(hf).state_dict().items()}, path / "model.safetensors"
    )
    return path


def arguments(folder: Path, **others: object) -> argparse.Namespace:
    fixed = {"adapter": "", "prompt": "", "system": "", "chat_template": "", "dtype": "float32", "quantize": "none"}
    decoding = {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    return argparse.Namespace(**({"model": str(folder)} | fixed | decoding | others))


def expected_answer(folder: Path, messages: list[dict[str, str]], adapter: Path | None = None) -> str:
    tokenizer = load_tokenizer(folder)
    prompt = render_prompt(messages, None, tokenizer, load_template("", tokenizer))
    model = load_model(folder, adapter, torch.float32, "none", torch.device("cpu"))
    stops = {tokenizer.special_tokens["<|end|>"], tokenizer.eos_id}
    return tokenizer.decode(generate(model, [prompt], max_new_tokens=9, stop_ids=stops)[0])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_one_prompt_is_answered_through_the_chat_template(folder, capsys):
    main_generate(arguments(folder, prompt="Hello", system="Be brief."))
    answer = expected_answer(folder, [{"role": "system", "content": "Be brief."}, user("Hello")])
    assert answer
    assert capsys.readouterr().out == answer + "\n"


def typed(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Let the user type these lines, then Ctrl-D."""
    remaining: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))


def test_lines_from_a_pipe_are_answered_without_prompts(folder, capsys, monkeypatch):
    """So that the output can be read by a program: one answer per line, and nothing else."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd now?\n"))
    main_generate(arguments(folder))
    first = expected_answer(folder, [user("Hello")])
    second = expected_answer(folder, [user("Hello"), {"role": "assistant", "content": first}, user("And now?")])
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_chat_remembers_until_it_is_reset(folder, capsys, monkeypatch):
    typed(monkeypatch, ["Hello", "", "And now?", "/reset", "And now?", "/exit", "never read"])
    main_generate(arguments(folder))
    first = expected_answer(folder, [user("Hello")])
    remembered = expected_answer(folder, [user("Hello"), {"role": "assistant", "content": first}, user("And now?")])
    alone = expected_answer(folder, [user("And now?")])
    assert len({first, remembered, alone}) == 3
    assert capsys.readouterr().out.splitlines()[1:] == [first, remembered, alone]


def test_ctrl_d_ends_a_chat_and_ctrl_c_only_the_answer(folder, capsys, monkeypatch):
    typed(monkeypatch, ["Hello", "Hello again"])
    interrupted = []

    def interrupt_first(*args, **options):
        options["on_token"](0, 40)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupt_first)
    main_generate(arguments(folder))
    assert capsys.readouterr().out.splitlines()[1:] == [chr(32 + 40), chr(32 + 40), ""]


def test_without_a_template_a_prompt_is_continued_as_text(folder, capsys):
    settings = {"bos_token": "<|begin|>", "eos_token": "<|begin|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    main_generate(arguments(folder, prompt="Once"))
    printed = capsys.readouterr()
    assert "no chat template" in printed.err
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, None, torch.float32, "none", torch.device("cpu"))
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once")[0]]
    assert (
        printed.out
        == tokenizer.decode(generate(model, [prompt], max_new_tokens=9, stop_ids={tokenizer.eos_id})[0]) + "\n"
    )
    with pytest.raises(UserError, match="chat template"):  # but a chat needs one
        main_generate(arguments(folder))


def test_an_adapter_is_loaded_over_its_base(folder, capsys, tmp_path):
    model = load_model(folder, None, torch.float32, "none", torch.device("cpu"))
    spec = LoraSpec(rank=4, alpha=32.0)
    add_lora(model, spec)
    init_lora(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, spec, tmp_path / "adapter", base_path=str(folder))
    main_generate(arguments(folder, prompt="Hello", adapter=str(tmp_path / "adapter")))
    answer = expected_answer(folder, [user("Hello")], tmp_path / "adapter")
    assert capsys.readouterr() == (answer + "\n", "")
    assert answer != expected_answer(folder, [user("Hello")])
    renamed = folder.rename(tmp_path / "instruct")
    main_generate(arguments(renamed, prompt="Hello", adapter=str(tmp_path / "adapter")))
    printed = capsys.readouterr()
    assert printed.out == answer + "\n" and printed.err.count("\n") == 1
    assert f"names {str(folder)!r} as the adapter's base, and this is {renamed};" in printed.err


def test_going_beyond_the_trained_length_is_said(folder, capsys):
    main_generate(arguments(folder, prompt="x" * 250, max_new_tokens=5))
    assert "beyond 256" in capsys.readouterr().err


def test_an_answer_that_ends_within_the_trained_length_is_not_said_to_go_beyond(folder, capsys, monkeypatch):
    monkeypatch.setattr(chat, "generate", lambda *args, **options: options["on_token"](0, 40))
    main_generate(arguments(folder, prompt="Hello", max_new_tokens=1000))
    assert capsys.readouterr() == (chr(32 + 40) + "\n", "")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_exact_match_counts_answers_that_are_the_expected_ones(folder, batch_size):
    tokenizer = load_tokenizer(folder)
    template = load_template("", tokenizer)
    model = load_model(folder, None, torch.float32, "none", torch.device("cpu"))
    questions = ["Hello", "What is this?", "One more"]
    right = [expected_answer(folder, [user(question)]) for question in questions]
    expected = [f"  {right[0]}\n", right[1] + "!", right[2]]
    examples = [
        Example([user(question), {"role": "assistant", "content": answer}], None, None, "file:1")
        for question, answer in zip(questions, expected, strict=True)
    ]
    options = {"batch_size": batch_size, "max_new_tokens": 9}
    accuracy, answers = exact_match(model, tokenizer, template, examples, **options)
    assert accuracy == pytest.approx(2 / 3)
    assert answers == list(zip(questions, right, expected, strict=True))
    assert exact_match(model, tokenizer, template, [], **options) == (0.0, [])
    with pytest.raises(UserError, match="file:7"):
        answer_examples(model, tokenizer, template, [Example(None, None, "text", "file:7")], **options)


def test_long_texts_are_shown_in_part_and_compared_whole():
    assert shortened("a\nb\n") == "a\nb\n" and shortened("") == "" and shortened("x" * 500) == "x" * 500
    lines = "\n".join(f"line {number}" for number in range(20))
    assert shortened(lines) == "line 0\nline 1\nline 2\nline 3\nline 4 ... (115 more characters)"
    assert shortened("x" * 2000 + "\n") == "x" * 500 + " ... (1,500 more characters)"
    assert shortened("\n" * 9) == "\n" * 9  # nothing but blanks is left out of nothing
    assert Answer("", lines, lines).right and not Answer("", f"{lines[:-1]}8", lines).right
    for path in RECIPES.glob("*.py"):
        assert "{answer.expected}" not in path.read_text(encoding="utf-8"), path


def test_an_expected_answer_holds_its_tool_calls_and_reasoning(folder, monkeypatch):
    """Content alone is blank beside a call: a model that says nothing would be right, and one that calls would not."""
    tokenizer = load_tokenizer(folder)
    calls = "{% for call in message.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}"
    source = TEMPLATE.replace("{{ message.content }}", "{{ message.reasoning_content or '' }}{{ message.content }}" + calls)
    template = ChatTemplate(source, tokenizer.named)
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    answers = {
        "<find>": {"content": "", "tool_calls": [call]},
        "So: <find><find>": {"content": "So: ", "tool_calls": [call, call]},
        "Hm. Yes": {"content": "Yes", "reasoning_content": "Hm. "},
        "": {"content": "", "tool_calls": [call]},
    }
    replies = iter([tokenizer.encode(text)[0] for text in answers])
    monkeypatch.setattr(answers_module, "generate", lambda model, prompts, **options: [next(replies)])
    turns = [[user("Hello"), {"role": "assistant"} | fields, user("more")] for fields in answers.values()]
    examples = [Example(messages, None, None, "file:1") for messages in turns]
    found = answer_examples(None, tokenizer, template, examples, batch_size=1, max_new_tokens=9)
    assert [answer.expected for answer in found] == ["<find>", "So: <find><find>", "Hm. Yes", "<find>"]
    assert [answer.right for answer in found] == [True, True, True, False]


def test_the_model_is_asked_where_training_begins(folder, monkeypatch):
    """Behind what the template writes ahead of an answer beside its generation prompt, as Qwen3's empty thoughts."""
    tokenizer, prompts = load_tokenizer(folder), []
    empty = "{% if message.role == 'assistant' and not message.reasoning_content %}<think></think>{% endif %}"
    kept = "{{ message.reasoning_content or '' }}"
    template = ChatTemplate(TEMPLATE.replace("{{ message.content }}", empty + kept + "{{ message.content }}"), tokenizer.named)
    monkeypatch.setattr(answers_module, "generate", lambda model, asked, **options: prompts.extend(asked) or [[] for _ in asked])
    answers = [{"content": "Yes"}, {"content": "Yes", "reasoning_content": "Hm. "}, {"content": " Yes "}, {"content": ""}]
    examples = [Example([user("Hello"), {"role": "assistant"} | fields], None, None, "file:1") for fields in answers]
    answer_examples(None, tokenizer, template, examples, batch_size=4, max_new_tokens=9)
    asked = [tokenizer.decode(prompt, skip_special=False) for prompt in prompts]
    plain = "<|user|>Hello<|end|><|assistant|>"
    assert asked == [f"{plain}<think></think>", plain, f"{plain}<think></think>", plain]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds, shown", [(0.0, True), (600.0, False)])
def test_answers_that_take_long_show_how_far_they_are_on_a_terminal(folder, monkeypatch, seconds, shown):
    """Between batches, and within one too: its clock runs; nothing of it stays, nor is there any in a file or a pipe."""
    tokenizer = load_tokenizer(folder)
    template = load_template("", tokenizer)
    model = load_model(folder, None, torch.float32, "none", torch.device("cpu"))
    examples = [Example([user("Hello"), {"role": "assistant", "content": "x"}], None, None, "file:1")] * 4
    monkeypatch.setattr(answers_module, "BAR_AFTER", seconds)
    monkeypatch.setattr(answers_module, "tqdm", functools.partial(tqdm, mininterval=0.0))
    original = answers_module.render_prompt
    monkeypatch.setattr(answers_module, "render_prompt", lambda *args: time.sleep(0.06) or original(*args))
    for screen, written in ((Terminal(), shown), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", screen)
        exact_match(model, tokenizer, template, examples, batch_size=2, max_new_tokens=9)
        drawn = re.findall(r"answers: +\d+%\|[^|]*\| (\d)/4", screen.getvalue())
        assert sorted(set(drawn)) == (["0", "2", "4"] if written else [])
        assert drawn.count("2") > 2 or not written  # the second batch's tokens draw it again
        # its rate, and so the time left, are means since the start, as drawing between batches would falsify others
        rates = re.findall(r"4/4 \[.*, ([\d.]+) answers/s\]", screen.getvalue())
        assert all(float(rate) < 4 / 0.2 for rate in rates) and (rates or not written)
        assert screen.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_a_model_directory_that_cannot_be_read_is_named(folder):
    (folder / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["OtherForCausalLM"]}))
    with pytest.raises(UserError, match=r"base: config\.json: architecture 'OtherForCausalLM' is not supported"):
        load_model(folder, None, torch.float32, "none", torch.device("cpu"))
