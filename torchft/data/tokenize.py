"""A conversation, or a text, to ids and to what is trained of them: the one place where both are made.

    tokenized = tokenize_chat(messages, tools, tokenizer, template, train_on="all")
    tokenized.ids, tokenized.trained     # equal length; trained[i]: token i is a target of the loss

The rendered text is split only at control tokens that the template itself wrote; all between two of them is tokenised
as one string, so that ids are those of transformers' `apply_chat_template` and no row can write a control token. What
is trained is decided by where in the rendered text an answer's own characters lie (answers.py), never by a search, an
id or a second render; a token that lies partly outside is not:

    <|im_start|>assistant \\n  The  answer  .  <|im_end|> \\n
                              [----- trained ----------]

Left out: truncation (the data set's), shifting labels (the loader's).
"""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchft.data.answers import Conversation, find_answers
from torchft.data.chat_template import ChatTemplate, Rendered, RowError
from torchft.data.lost import lost_call, lost_tools
from torchft.data.tokenizer import Tokenizer
from torchft.data.vocabularies import Offsets

ANSWER_ROLES = ("assistant", "model")
NO_END = "no control token ends the answer (it is trained without an end)"


@dataclass(slots=True)
class Tokenized:
    """Ids of one example, whether each is trained, and why answers are not, or not wholly: reason -> how many.

    `lost`: a tool call that the template left out, or ""; `no_tools`: whether it left out the tools.
    """

    ids: list[int]
    trained: list[bool]
    notes: Counter[str] = field(default_factory=Counter)
    lost: str = ""
    no_tools: bool = False


def tokenize_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    train_on: str = "all",
    first: int = 0,
) -> Tokenized:
    """Ids and mask of a conversation; `train_on`: all answers, or the last, among the messages from number `first` on.

    Raises:
        RowError: the template refuses the conversation or fails on it.
        UserError: the text cannot be encoded; the template is hostile.
    """
    rendered = template.render(messages, tools)
    ids, offsets, controls = tokenizer.encode_rendered(rendered.text, [span[:2] for span in rendered.spans])
    tokenized = Tokenized(ids, [False] * len(ids))
    answers = [i for i, message in enumerate(messages) if i >= first and message.get("role") in ANSWER_ROLES]
    wanted = answers[-1:] if train_on == "last" else answers
    chat = Conversation(messages, tools, template, rendered, [offsets[i] for i in controls])
    for found in find_answers(chat, wanted):
        if isinstance(found, str):
            tokenized.notes[found] += 1
            continue
        for start, end in found:
            stop = _end_token(rendered, end, offsets, controls)
            tokenized.notes[NO_END] += stop is None
            first = bisect.bisect_left(offsets, (start,))
            last = _last_inside(offsets, end) if stop is None else stop
            tokenized.trained[first : last + 1] = [True] * (last + 1 - first)
    tokenized.notes += Counter()  # drops zeros
    tokenized.lost, tokenized.no_tools = lost_call(messages, rendered), lost_tools(tools, rendered)
    return tokenized


def tokenize_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a plain document: BOS (where the tokenizer has one), the text, EOS (likewise). All of it is to be trained.

    Raises:
        UserError: the text cannot be encoded.
    """
    ids, _ = tokenizer.encode(text)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + ids + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])


def render_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> list[int]:
    """Ids of a conversation up to where the next answer begins, for generation.

    Raises:
        RowError, UserError: as `tokenize_chat`.
    """
    rendered = template.render(messages, tools, add_generation_prompt=True)
    return tokenizer.encode_rendered(rendered.text, [span[:2] for span in rendered.spans])[0]


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> set[int]:
    """The ids at which generation stops: EOS, and the control token that ends an answer of this template."""
    stops = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if template is None:
        return stops
    try:
        probe = tokenize_chat(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], None, tokenizer, template
        )
    except RowError:  # a template that wants more of a conversation
        return stops
    trained = [token for token, on in zip(probe.ids, probe.trained, strict=True) if on]
    return stops | (set(trained[-1:]) & tokenizer.control_ids)


def _end_token(rendered: Rendered, end: int, offsets: Offsets, controls: list[int]) -> int | None:
    """Index of the first control token behind an answer, if only the template's text lies between."""
    at = bisect.bisect_right(controls, end, key=lambda i: offsets[i][1])
    if at == len(controls):
        return None
    start = offsets[controls[at]][0]
    next_span = bisect.bisect_left(rendered.spans, end, key=lambda span: span[0])
    blocked = next_span < len(rendered.spans) and rendered.spans[next_span][0] < start
    return None if blocked else controls[at]


def _last_inside(offsets: Offsets, end: int) -> int:
    """Index of the last token that lies wholly before `end`."""
    last = bisect.bisect_left(offsets, (end,)) - 1
    while last >= 0 and offsets[last][1] > end:
        last -= 1
    return last
