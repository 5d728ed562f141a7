"""Answers of a model to examples of a dataset, and how many of them are right."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from torchft.data.chat_template import ChatTemplate
from torchft.data.dataset import Dataset
from torchft.data.formats import Example, split_answer
from torchft.data.tokenize import render_prompt, tokenize_chat
from torchft.data.tokenize import stop_ids as template_stop_ids
from torchft.data.tokenizer import Tokenizer
from torchft.data.wrapping import REASONING
from torchft.generate import generate
from torchft.modules.transformer import CausalLM
from torchft.ranks import rank

SHOWN_LINES, SHOWN_CHARACTERS = 5, 500  # of a prompt or an expected answer on the terminal
BAR_AFTER = 2.0  # seconds that answers may take without a progress bar


class Answer(NamedTuple):
    """What the model made of one example."""

    prompt: str  # the text of the last message before the answer
    answer: str
    expected: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, blanks at the ends aside."""
        return self.answer.strip() == self.expected.strip()


def shortened(text: str) -> str:
    """The beginning of a text, to be shown below others, and how much is left out: nothing of a short one."""
    head = "\n".join(text.split("\n")[:SHOWN_LINES])[:SHOWN_CHARACTERS]
    left = len(text.rstrip()) - len(head)
    return f"{head} ... ({left:,} more characters)" if left > 0 else text


def first_conversations(dataset: Dataset | None, template: ChatTemplate | None, count: int) -> list[Example]:
    """The first `count` examples that a model can be asked; none of no dataset, and plain texts have no answers."""
    if dataset is None or template is None:
        return []
    examples = (dataset.example(index) for index in range(len(dataset)))
    return list(itertools.islice((example for example in examples if example.messages), count))


def answer_examples(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers to conversations, each asked up to its last assistant turn, with a progress bar on a terminal.

    Raises UserError for a plain text.
    """
    stops = template_stop_ids(tokenizer, template)
    answers = []
    # disable=None: on a terminal only. miniters=0: each token may draw it, so that its clock runs while a batch is answered;
    # smoothing=0: its rate is the mean since the start, as one between drawings would be none.
    shown = {"desc": "answers", "unit": " answers", "leave": False, "delay": BAR_AFTER, "disable": rank() > 0 or None}
    with tqdm(total=len(examples), miniters=0, smoothing=0, **shown) as bar:
        options = {"max_new_tokens": max_new_tokens, "stop_ids": stops, "on_token": lambda row, token: bar.update(0)}
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            asked = [_asked(example, tokenizer, template) for example in batch]
            replies = generate(model, [question.prompt for question in asked], **options)
            bar.update(len(batch))
            for question, reply in zip(asked, replies, strict=True):
                answers.append(Answer(question.text, tokenizer.decode(reply), question.expected))
    return answers


class _Question(NamedTuple):
    text: str
    prompt: list[int]
    expected: str


def _asked(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> _Question:
    """The last message before the last answer, the ids up to that answer, and what the model is to write: its content, or with tool
    calls or reasoning what is trained of it, as the template has it. Raises UserError for a plain text.
    """
    messages, expected = split_answer(example)
    answer = example.messages[len(messages)]
    done = tokenize_chat([*messages, answer], example.tools, tokenizer, template, train_on="last")
    written = tokenizer.decode([token for token, trained in zip(done.ids, done.trained, strict=True) if trained])
    if any(answer.get(name) for name in ("tool_calls", *REASONING)):
        expected = written
    prompt = render_prompt(messages, example.tools, tokenizer, template)
    # Qwen3's template, say, begins an answer without thoughts with empty ones, which are no part of it and not trained.
    if done.ids[: len(prompt)] == prompt and written.strip() == expected.strip() != "":
        prompt = done.ids[: done.trained.index(True)]
    return _Question(str(messages[-1].get("content") if messages else ""), prompt, expected)


def exact_match(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[float, list[Answer]]:
    """Share of examples whose greedy answer is the expected one, blanks at the ends aside (0 of none is 0)."""
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    answers = answer_examples(model, tokenizer, template, examples, **options)
    hits = sum(answer.right for answer in answers)
    return hits / max(1, len(answers)), answers
