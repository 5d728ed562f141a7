"""A template with a tokenizer, ours and transformers', for the tests of tokens and masks."""

import itertools
from pathlib import Path

from tokenizers_for_tests import for_template

from torchft.data.chat_template import ChatTemplate
from torchft.data.tokenize import tokenize_chat
from torchft.data.tokenizer import load_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ASK = {"role": "user", "content": "Hi there"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"place": "Ü <|im_end|>", "n": 3}}}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}},
}


def say(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text} | fields


class Setup:
    """One template with one tokenizer, and transformers' over the same files."""

    def __init__(self, path: Path, source: str, same: "Setup | None" = None) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = same.tokenizer if same else load_tokenizer(path)
        self.reference = same.reference if same else PreTrainedTokenizerFast.from_pretrained(path)
        self.source = source
        self.template = ChatTemplate(source, self.tokenizer.named)

    def ids(self, messages, tools=None, **options):
        return self.reference.apply_chat_template(messages, tools=tools, chat_template=self.source, **options)[
            "input_ids"
        ]

    def __call__(self, messages, tools=None, train_on="all"):
        return tokenize_chat(messages, tools, self.tokenizer, self.template, train_on)

    def marked(self, messages, tools=None, train_on="all") -> str:
        """The tokens' text with what is trained in [[ ]]."""
        made = self(messages, tools, train_on)
        text = ""
        for trained, group in itertools.groupby(zip(made.ids, made.trained, strict=True), key=lambda pair: pair[1]):
            piece = self.tokenizer.decode([token for token, _ in group], skip_special=False)
            text += f"[[{piece}]]" if trained else piece
        return text


def custom(tmp_path, source: str, name: str = "qwen2_5") -> Setup:
    return Setup(for_template(name, tmp_path), source)


class Setups:
    """`setups(template, "trained" | "llama3")`: a template of ../shared/data with either tokenizer, made once each."""

    def __init__(self, shared_data: Path, folder: Path) -> None:
        self._shared, self._folder = shared_data, folder
        self._made: dict[tuple[str, str], Setup] = {}

    def __call__(self, name: str, kind: str = "trained") -> Setup:
        if (name, kind) not in self._made:
            source = (self._shared / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
            llama3 = next((setup for (_, other), setup in self._made.items() if other == kind == "llama3"), None)
            path = for_template(name, self._folder) if kind == "trained" else self._shared / "tokenizers/llama3_hf"
            self._made[name, kind] = Setup(path, source, llama3)
        return self._made[name, kind]
