"""KTO's baseline: each prompt of a step with the answer to another one, from which the KL divergence is estimated.

    rows = mismatched(dataset, loader.step_samples(index), cfg.data.max_seq_len)    # a Dataset, for eval_batches

The answers are those of the step, moved on by one (section 4.2 of Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306), or
by more, past answers to the same prompt, as the two of a pair are. It depends on the step alone, and not on how it is dealt out
over micro-batches and processes.
"""

from dataclasses import replace

import numpy as np

from torchft.data.dataset import Dataset
from torchft.errors import UserError


def mismatched(dataset: Dataset, samples: np.ndarray, max_seq_len: int) -> Dataset:
    """One sample for each of `samples` (n,): its prompt, and an answer to another one (`_other_answers`), cut at max_seq_len.

    Raises: UserError if there is no other sample.
    """
    if len(dataset) < 2:
        raise UserError(f"{dataset.key}: KTO needs two rows or more, to pair a prompt with the answer to another one")
    ids, supervised = [], []
    for sample, other in zip(samples, _other_answers(dataset, samples), strict=True):
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


def _other_answers(dataset: Dataset, samples: np.ndarray) -> list[int]:
    """Whose answer each sample's prompt gets: of the samples before it (before the first is the last) the nearest with another
    prompt.
    """
    prompts, count = [_prompt(dataset, sample) for sample in samples], len(samples)
    if len(set(prompts)) == 1:
        return _beyond_the_step(dataset, samples, prompts[0])
    return [next(samples[i - k] for k in range(1, count) if prompts[i - k] != prompts[i]) for i in range(count)]


def _beyond_the_step(dataset: Dataset, samples: np.ndarray, prompt: bytes) -> list[int]:
    """The same in a step of one prompt: the next with another one in the data; where all have that one, another sample."""
    following = ((samples[0] + k) % len(dataset) for k in range(1, len(dataset)))
    other = next((sample for sample in following if _prompt(dataset, sample) != prompt), None)
    if other is not None:
        return [other] * len(samples)
    before = zip(samples, np.roll(samples, 1), strict=True)
    return [(sample + 1) % len(dataset) if sample == last else last for sample, last in before]


def _prompt(dataset: Dataset, sample: int) -> bytes:
    """The tokens before a sample's first target, to compare."""
    span = _span(dataset, sample)
    return dataset.ids[span][: _answer_start(dataset, span)].tobytes()


def _span(dataset: Dataset, sample: int) -> slice:
    start = int(dataset.starts[sample])
    return slice(start, start + int(dataset.lengths[sample]))


def _answer_start(dataset: Dataset, span: slice) -> int:
    """Tokens of a sample before its first target."""
    return int(np.argmax(dataset.supervised[span])) + 1
