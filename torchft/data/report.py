"""What became of the data, in words and in colour: behind `tune data CONFIG`.

    print(report(dataset, loader))          # all of it; a run prints its summary(loader, valid)
    print(render_example(dataset, 0, tokenizer, color=wants_color(sys.stdout)))

The report accounts for every row read, with file and line of what was dropped. An example is shown as the model sees
it, control tokens by name, the tokens that are trained in green (or between {+ and +} where there is no colour).
"""

import os
from typing import TextIO

import numpy as np

from torchft.checks import counted
from torchft.data.account import FIRST, SourceReport, brief
from torchft.data.dataset import Dataset
from torchft.data.loader import Loader
from torchft.data.tokenizer import Tokenizer

TRAINED, BOLD, DIM, OFF = "\x1b[32m", "\x1b[1m", "\x1b[2m", "\x1b[0m"


def wants_color(stream: TextIO) -> bool:
    """Whether to write colours to a stream: a terminal, and no NO_COLOR in the environment (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def report(dataset: Dataset, loader: Loader | None = None) -> str:
    """The account of a data set: rows per source and reason, tokens, lengths, and what the loader planned with them."""
    lines = []
    for number, source in enumerate(dataset.reports):
        mine = dataset.source == number
        lines += [f"{dataset.key}[{number}]  {source.name}", *_source_lines(source)]
        weight = dataset.weights[number]
        if weight != 1:
            lines.append(f"  weight      {weight:g}: a row is used {weight:g} times per epoch on average")
        if dataset.desirable is not None:
            good = int(dataset.desirable[mine].sum())
            lines.append(f"  verdicts    {good:,} good, {int(mine.sum()) - good:,} bad")
        lines += _token_lines(dataset.lengths[mine], dataset.num_supervised[mine])
    if len(dataset.reports) > 1:
        lines += ["all together", *_token_lines(dataset.lengths, dataset.num_supervised)]
    if dataset.cache_note:
        lines.append(f"tokens read {dataset.cache_note}")
    if loader is not None:
        lines += [*loader.summary().splitlines(), *_one_sided(dataset)]
    return "\n".join(lines)


def summary(loader: Loader, valid: Dataset | None) -> str:
    """What a run says of its data: what the loader planned, and a line each on rows dropped, rows cut and other notes.

    valid: validation data. Held-out rows of the training data were read, and are told of, with it.
    """
    datasets = [loader.dataset, *([valid] if valid is not None and valid.key != loader.dataset.key else [])]
    lines = [
        line
        for dataset in datasets
        for number, source in enumerate(dataset.reports)
        for line in brief(source, f"{dataset.key}[{number}]")
    ]
    return "\n".join([loader.summary(), *lines, *_one_sided(loader.dataset)])


def _one_sided(dataset: Dataset) -> list[str]:
    """A warning where all verdicts are the same."""
    if dataset.desirable is None or dataset.desirable.any() != dataset.desirable.all():
        return []
    which = "good" if dataset.desirable.all() else "bad"
    said = f"all {counted(len(dataset), 'answer')} are {which} ones, and KTO learns from good and bad ones: look at the labels"
    return [f"WARNING: {dataset.key}: {said}"]


def _source_lines(source: SourceReport) -> list[str]:
    columns = ", ".join(
        ours if ours == theirs else f"{ours}={theirs}" for ours, theirs in source.layout.columns.items()
    )
    lines = [
        f"  format      {source.layout.format} ({columns})",
        f"  rows        {source.read:,} read: {source.used:,} used, {source.read - source.used:,} dropped",
    ]
    for reason, count in source.reasons.most_common():
        lines.append(f"  dropped     {count:,} {reason}")
        lines += [f"                {place}" for place in source.places[reason]]
        lines += [f"                and {count - FIRST:,} more"] * (count > FIRST)
    for note, count in source.notes.most_common():
        lines.append(f"  note        {count:,} x {note}, first in {source.noted[note]}")
    if source.layout.unused:
        lines.append(f"  not read    columns {', '.join(source.layout.unused)}")
    return lines


def _token_lines(lengths: np.ndarray, supervised: np.ndarray) -> list[str]:
    if not len(lengths):
        return ["  tokens      none: no example of it is in this part"]
    total, trained = int(lengths.sum()), int(supervised.sum())
    low, half, most, nearly, high = np.percentile(lengths, [0, 50, 90, 99, 100], method="inverted_cdf").tolist()
    return [
        f"  tokens      {total:,} in {counted(len(lengths), 'example')}, {trained:,} trained ({100 * trained / total:.1f}%)",
        f"  length      {low:,} to {high:,} tokens, median {half:,}, 90% up to {most:,}, 99% up to {nearly:,}",
    ]


def render_example(dataset: Dataset, index: int, tokenizer: Tokenizer, *, color: bool) -> str:
    """One example as the model sees it, below a line that says where it comes from."""
    start, length = int(dataset.starts[index]), int(dataset.lengths[index])
    ids = dataset.ids[start : start + length].tolist()
    # a token is trained if the position before it is supervised; the first token never is
    trained = [False, *dataset.supervised[start : start + length - 1].tolist()]
    layout = "" if dataset.parts is None else "; the prompt, its end twice: before chosen and before rejected"
    verdict = "" if dataset.desirable is None else f"; a {'good' if dataset.desirable[index] else 'bad'} answer"
    header = f"--- {dataset.example(index).where}: {counted(length, 'token')}, {sum(trained):,} trained{layout}{verdict} ---"
    control = set(tokenizer.special_tokens.values())
    kinds = [(on, color and token in control) for token, on in zip(ids, trained, strict=True)]
    borders = [0, *(i for i in range(1, length) if kinds[i] != kinds[i - 1]), length]
    parts, shown = [], ""
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        # decoded from the start, as a token's text may depend on the one before (blanks of sentencepiece)
        text = tokenizer.decode(ids[:end], skip_special=False)
        parts.append(_paint(text[len(shown) :], *kinds[begin], color))
        shown = text
    body = "".join(parts)
    return f"{DIM}{header}{OFF}\n{body}" if color else f"{header}\n{body}"


def _paint(text: str, trained: bool, control: bool, color: bool) -> str:
    """Text of one kind of token. Control characters of the data are spelled out: a terminal would obey them."""
    visible = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    if not color:
        return f"{{+{visible}+}}" if trained and visible else visible
    codes = TRAINED * trained + (BOLD if trained else DIM) * control
    return f"{codes}{visible}{OFF}" if codes else visible
