"""Rows with a preference: two answers to one prompt, or one answer with a verdict; and how they become tokens.

    example = read_preference(row, layout)      # messages = prompt + chosen, rejected = prompt + rejected, num_prompt
    samples, notes = preference_samples(example, "pairs", cfg.data, tokenizer, template)

Shapes of a prompt: text, messages, a ShareGPT conversation, or none where chosen and rejected are whole conversations that
begin alike. Of an answer: text, one turn, or several. Both conversations are rendered and masked as for SFT, and only the
answer is trained. A pair is one sample of three parts,

    trunk      the tokens that both begin with, up to the last but one before an answer
    chosen     the prompt's last token, and the answer
    rejected   the prompt's last token again, and the other answer: one token cannot predict two

so that the prompt is stored, and computed, once. `data.max_seq_len` holds for the three together.
"""

from collections import Counter
from typing import Any

import numpy as np

from torchft.config import DataConfig
from torchft.data.account import REFUSED
from torchft.data.chat_template import ChatTemplate, RowError
from torchft.data.formats import Example, check_conversation, from_openai, from_sharegpt, optional_text, read_text, read_tools
from torchft.data.layout import Layout
from torchft.data.rows import BadRow, Row
from torchft.data.samples import Sample, check_tokenized, refuse_huge, row_notes
from torchft.data.tokenize import Tokenized, tokenize_chat
from torchft.data.tokenizer import Tokenizer
from torchft.errors import UserError

EQUAL = "chosen and rejected are equal"
PROMPTS_DIFFER = "the prompts of chosen and rejected differ"
VERDICTS = {True: True, False: False, "true": True, "false": False, "True": True, "False": False, "1": True, "0": False}
Messages = list[dict[str, Any]]


def read_preference(row: Row, layout: Layout) -> Example:
    """The pair or the verdict in one row. Raises: BadRow with the reason if it cannot be used."""
    if row.problem is not None:
        raise row.problem
    columns, values = layout.columns, row.values
    prompt = _prompt(values, columns)
    tools = read_tools(values, columns)
    if "system" in columns and (system := optional_text(values, columns["system"])):
        prompt.insert(0, {"role": "system", "content": system})
    if layout.format == "kto":
        if "completion" not in columns:  # the conversation's last turn is the answer
            prompt, answer = prompt[:-1], prompt[-1:]
        else:
            answer = _answer(values, columns["completion"])
        _check_parts(prompt, answer, columns.get("completion", columns.get("messages", "the conversation")))
        return Example(prompt + answer, tools, None, row.where, len(prompt), desirable=_verdict(values, columns["label"]))
    prompt, chosen, rejected = _split(prompt, *(_answer(values, columns[side]) for side in ("chosen", "rejected")))
    _check_parts(prompt, chosen, columns["chosen"])
    _check_parts(prompt, rejected, columns["rejected"])
    if chosen == rejected:
        raise BadRow(EQUAL)
    return Example(prompt + chosen, tools, None, row.where, len(prompt), prompt + rejected)


def _prompt(values: dict[str, Any], columns: dict[str, str]) -> Messages:
    if "prompt" in columns and isinstance(values.get(columns["prompt"]), list):
        return _turns(values, columns["prompt"])
    if "prompt" in columns:
        return [{"role": "user", "content": read_text(values, columns["prompt"])}]
    if "messages" in columns:
        return from_openai(values, columns)
    return from_sharegpt(values, columns) if "conversations" in columns else []


def _answer(values: dict[str, Any], column: str) -> Messages:
    """An answer given as text, as one turn, or as several; also a whole conversation."""
    if isinstance(values.get(column), list | dict):
        return _turns(values, column)
    return [{"role": "assistant", "content": read_text(values, column)}]


def _turns(values: dict[str, Any], column: str) -> Messages:
    """Turns in either spelling."""
    turns = values[column] if isinstance(values[column], list) else [values[column]]
    table = {column: turns}
    if turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return from_sharegpt(table, {"conversations": column})
    return from_openai(table, {"messages": column})


def _split(prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The prompt and the two answers, where chosen and rejected may each begin with the prompt.

    Raises: BadRow if they begin otherwise, or otherwise than each other.
    """
    whole = [side[0]["role"] in ("system", "user") for side in (chosen, rejected)]
    if not any(whole):
        return prompt, chosen, rejected
    if not all(whole):
        raise BadRow(PROMPTS_DIFFER, "one of them is a whole conversation, the other an answer alone")
    if chosen == rejected:
        raise BadRow(EQUAL)
    differ = (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = next(differ, min(len(chosen), len(rejected)))
    if prompt and _said(prompt) not in ([], _said(chosen[:shared])):
        raise BadRow(PROMPTS_DIFFER, "or the prompt column holds another one")
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" and chosen[0]["role"] != "system" else []
    return system + chosen[:shared], chosen[shared:], rejected[shared:]


def _said(messages: Messages) -> list[Any]:
    return [message["content"] for message in messages if message["role"] != "system"]


def _check_parts(prompt: Messages, answer: Messages, column: str) -> None:
    if not prompt or all(message["role"] == "system" for message in prompt):
        raise BadRow("no prompt before the answer", column)
    if not answer or answer[0]["role"] != "assistant":
        raise BadRow(PROMPTS_DIFFER if answer and answer[0]["role"] == "user" else "no assistant turn to judge", column)
    if prompt[-1]["role"] == "assistant":
        raise BadRow("the prompt ends in an answer", column)
    check_conversation(prompt + answer)


def _verdict(values: dict[str, Any], column: str) -> bool:
    value = values.get(column)
    if isinstance(value, list | dict) or value not in VERDICTS:
        raise BadRow(f'"{column}" is not true or false', repr(value)[:40])
    return VERDICTS[value]


def preference_samples(
    example: Example, kind: str, data_cfg: DataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[Sample], Counter[str]]:
    """The sample of a pair or of a verdict, and notes to count; of a pair, where verdicts are wanted, two.

    kind: pairs or verdicts. Raises: BadRow, UserError as make_samples.
    """
    done = [_tokenize(example, side, data_cfg, tokenizer, template) for side in (example.messages, example.rejected) if side]
    notes = sum((side.notes for side in done), Counter())
    notes += row_notes(done[0], template)  # of the prompt, which both answers have
    if kind == "pairs":
        samples = [_join(*done, data_cfg)]
    else:
        verdicts = [bool(example.desirable)] if example.rejected is None else [True, False]
        samples = [_cut_verdict(side, verdict, data_cfg) for side, verdict in zip(done, verdicts, strict=True)]
    length = sum(len(side.ids) for side in done)
    if length > sum(len(sample.ids) + sample.num_trunk for sample in samples):
        notes["cut at data.max_seq_len"] += 1
    return samples, notes


def _tokenize(
    example: Example, messages: Messages, data_cfg: DataConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> Tokenized:
    if data_cfg.truncation == "drop":
        refuse_huge(messages, data_cfg.max_seq_len)
    try:
        options = {"train_on": data_cfg.train_on, "first": example.num_prompt}
        done = tokenize_chat(messages, example.tools, tokenizer, template, **options)
    except RowError as error:
        raise BadRow(REFUSED, str(error)) from None
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from None
    check_tokenized(done)
    return done


def _cut_verdict(done: Tokenized, desirable: bool, data_cfg: DataConfig) -> Sample:
    limit, length = data_cfg.max_seq_len, len(done.ids)
    _refuse_length(length, data_cfg)
    sample = Sample(np.array(done.ids[:limit], np.int32), np.array(done.trained[:limit], bool), desirable=desirable)
    if not sample.trained[1:].any():
        raise BadRow(f"no answer left within data.max_seq_len={limit}", f"{length:,} tokens", length)
    return sample


def _join(chosen: Tokenized, rejected: Tokenized, data_cfg: DataConfig) -> Sample:
    """A pair's sample; too long a pair loses the end of its longer answer, or of both, down to one length."""
    trunk = min(_first_trained(chosen), _first_trained(rejected)) - 1
    same = (n for n, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=False)) if a != b)
    trunk = min(trunk, next(same, trunk))
    limit, sides = data_cfg.max_seq_len, [len(chosen.ids) - trunk, len(rejected.ids) - trunk]
    length = trunk + sum(sides)
    _refuse_length(length, data_cfg)
    if length > limit:
        room = limit - trunk
        longest = max(room - min(sides), room // 2)
        sides = [max(0, min(side, longest)) for side in sides]
    cuts = [(done, slice(trunk, trunk + side)) for done, side in zip((chosen, rejected), sides, strict=True)]
    parts = [(done.ids[cut], done.trained[cut]) for done, cut in cuts]
    if not all(any(trained) for _, trained in parts):
        raise BadRow(f"no answer left within data.max_seq_len={limit}", f"{length:,} tokens", length)
    if parts[0][0] == parts[1][0]:
        raise BadRow(EQUAL, f"within data.max_seq_len={limit}" if length > limit else "in their tokens")
    ids = np.array(chosen.ids[:trunk] + parts[0][0] + parts[1][0], np.int32)
    trained = np.array([False] * trunk + parts[0][1] + parts[1][1], bool)
    return Sample(ids, trained, trunk, sides[0])


def _first_trained(done: Tokenized) -> int:
    """The first token that another one can predict and that is trained."""
    return done.trained.index(True, 1)


def _refuse_length(length: int, data_cfg: DataConfig) -> None:
    if length > data_cfg.max_seq_len and data_cfg.truncation == "drop":
        raise BadRow(f"longer than data.max_seq_len={data_cfg.max_seq_len}", f"{length:,} tokens", length)
