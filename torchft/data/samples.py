"""One row to samples: its tokens, which of them are trained, and what the limit on their number does to it.

    samples, notes = make_samples(example, cfg.data, tokenizer, template)

A conversation is one sample, dropped or cut at `data.max_seq_len` by `data.truncation`. A text is as many as it needs.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from torchft.config import DataConfig
from torchft.data.account import LOST_CALL, REFUSED
from torchft.data.chat_template import ChatTemplate, RowError
from torchft.data.formats import Example
from torchft.data.rows import BadRow
from torchft.data.sandbox import NOW
from torchft.data.tokenize import Tokenized, tokenize_chat, tokenize_text
from torchft.data.tokenizer import Tokenizer
from torchft.errors import UserError

NO_TOOLS = "the chat template does not write the tools"
MAX_TOKEN_CHARS = 128  # characters in the longest token of vocabularies in use: Llama 3's run of blanks


class Sample(NamedTuple):
    """A run of tokens, and how it is made up: an SFT sample has neither parts nor a verdict (see preferences.py)."""

    ids: np.ndarray  # (T,) int32
    trained: np.ndarray  # (T,) bool: whether the token itself is a target
    num_trunk: int = 0  # of a pair: tokens that both answers follow
    num_chosen: int = 0  # of a pair: tokens of the chosen branch, behind the trunk; the rest is the rejected one
    desirable: bool = False  # of a verdict


def make_samples(
    example: Example, data_cfg: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[list[Sample], Counter[str]]:
    """The samples of one row, and notes to count.

    Raises: BadRow if there are none; UserError, naming file and line, if the template or the tokenizer cannot be used.
    """
    try:
        if example.text is not None:
            return _cut_text(tokenize_text(example.text, tokenizer), data_cfg.max_seq_len), Counter()
        assert example.messages is not None and template is not None
        if data_cfg.truncation == "drop":
            refuse_huge(example.messages, data_cfg.max_seq_len)
        done = tokenize_chat(example.messages, example.tools, tokenizer, template, data_cfg.train_on)
    except RowError as error:
        raise BadRow(REFUSED, str(error)) from None
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from None
    check_tokenized(done)
    done.notes += row_notes(done, template)
    return _truncate(done, data_cfg)


def row_notes(done: Tokenized, template: ChatTemplate) -> Counter[str]:
    """What the template makes of a whole row, however many answers it has."""
    dated = f"the chat template's date is {NOW:%d %b %Y}, whatever the day"
    return Counter({NO_TOOLS: int(done.no_tools), dated: int(template.is_dated)})


def check_tokenized(done: Tokenized) -> None:
    """Raises BadRow for a conversation that lost a tool call, which would be trained as an empty answer, or without answers."""
    if done.lost:
        raise BadRow(LOST_CALL, done.lost)
    if not any(done.trained[1:]):
        raise BadRow("nothing to train", ", ".join(done.notes))


def refuse_huge(messages: list[dict[str, Any]], limit: int) -> None:
    """Raises BadRow: rows far beyond the limit are not tokenised first: it would take half a minute per 10 MB."""
    characters = sum(len(message.get("content") or "") for message in messages)
    if characters > MAX_TOKEN_CHARS * limit:
        raise BadRow(f"longer than data.max_seq_len={limit}", f"{characters:,} characters")


def _truncate(done: Tokenized, data_cfg: DataConfig) -> tuple[list[Sample], Counter[str]]:
    """The sample of a conversation within the limit, by the policy. Raises: BadRow if none is left."""
    limit, length, notes = data_cfg.max_seq_len, len(done.ids), Counter(done.notes)
    if length > limit and data_cfg.truncation == "drop":
        raise BadRow(f"longer than data.max_seq_len={limit}", f"{length:,} tokens", length)
    # what follows the limit is gone, the end token too: a cut answer is not taught to stop there
    ids, trained = np.array(done.ids[:limit], np.int32), np.array(done.trained[:limit], bool)
    if not trained[1:].any():
        raise BadRow(f"no answer left within data.max_seq_len={limit}", f"{length:,} tokens", length)
    if length > limit:
        notes["cut at data.max_seq_len"] += 1
    return [Sample(ids, trained)], notes


def _cut_text(ids: list[int], limit: int) -> list[Sample]:
    """A text in pieces of up to `limit` tokens, all of them targets but a piece's first. A piece begins with the last
    token of the one before, so that every token of the text but the first is a target once."""
    if len(ids) < 2:
        raise BadRow("nothing to train", "a text of one token")
    starts = range(0, len(ids) - 1, limit - 1)
    pieces = [np.array(ids[start : start + limit], np.int32) for start in starts]
    return [Sample(piece, np.ones(len(piece), bool)) for piece in pieces]
