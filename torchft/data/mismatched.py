"""KTO's baseline: each prompt of a step with the answer to another one, from which the KL divergence is estimated.

    rows = mismatched(dataset, loader.step_samples(index), cfg.data.max_seq_len)    # a Dataset, for eval_batches

The answers are those of the step, moved on by one (section 4.2 of Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306); it
depends on the step alone, and not on how it is dealt out over micro-batches and processes.
"""

from dataclasses import replace

import numpy as np

from torchft.data.dataset import Dataset
from torchft.errors import UserError


def mismatched(dataset: Dataset, samples: np.ndarray, max_seq_len: int) -> Dataset:
    """One sample for each of `samples` (n,): its prompt, and the answer of the one before it, the last one for the first.

    An answer is cut at max_seq_len. One that would meet its own prompt, because a step has one sample or has it twice, is
    replaced by the answer of the sample that follows in the data. Raises: UserError if there is no other.
    """
    if len(dataset) < 2:
        raise UserError(f"{dataset.key}: KTO needs two rows or more, to pair a prompt with the answer to another one")
    ids, supervised = [], []
    for sample, other in zip(samples, np.roll(samples, 1), strict=True):
        other = (sample + 1) % len(dataset) if other == sample else other
        mine, theirs = _span(dataset, sample), _span(dataset, other)
        start, answer = _answer_start(dataset, mine), _answer_start(dataset, theirs)
        row = np.concatenate([dataset.ids[mine][:start], dataset.ids[theirs][answer:]])[:max_seq_len]
        on = np.zeros(len(row), bool)
        on[start - 1] = True  # the prompt's last token predicts the answer's first
        on[start:-1] = dataset.supervised[theirs][answer:-1][: len(row) - 1 - start]
        ids.append(row)
        supervised.append(on)
    lengths = np.array([len(row) for row in ids], np.int64)
    flat = {"ids": np.concatenate(ids), "supervised": np.concatenate(supervised)}
    kept = {name: getattr(dataset, name)[samples] for name in ("source", "row", "desirable")}
    return replace(dataset, **flat, **kept, lengths=lengths, starts=np.cumsum(lengths) - lengths)


def _span(dataset: Dataset, sample: int) -> slice:
    start = int(dataset.starts[sample])
    return slice(start, start + int(dataset.lengths[sample]))


def _answer_start(dataset: Dataset, span: slice) -> int:
    """Tokens of a sample before its first target."""
    return int(np.argmax(dataset.supervised[span])) + 1
