"""Batches: every row of every optimizer step of a run, planned before the first one.

    loader = Loader(dataset, cfg.data, cfg.run)
    for index in range(start, loader.total_steps):
        for batch in loader.step(index): ...                # the micro-batches of this process

`step` is a pure function of the index, so that the data position of a run is that integer, at any number of processes:
the rows of a step are the same, only dealt out differently. The last step of an epoch takes the rows that are left,
fewer than the others.

A worked example, one row of 8 tokens packed from two documents; the answers [12 13] and [22] are trained:

    input_ids   10  11  12  13 | 20  21  22 |  0        labels are the ids one further on, where those are trained;
    labels    -100  12  13 -100|-100 22 -100|-100       a document's last token has none, so that none crosses a border
    positions    0   1   2   3 |  0   1   2 |  0
    documents    0   0   0   0 |  1   1   1 |  P        padding is a document of its own, PADDING

A pair of answers (preferences.py), [12 13] better than [22] after the prompt [10 11], is one document with two branches:

    input_ids   10 | 11  12  13 | 11  22 |  0           sequences say whose tokens they are: of answer 0 or 1, or 2 for
    labels    -100 | 12  13 -100| 22 -100|-100          nobody's
    positions    0 |  1   2   3 |  1   2 |  0
    branches     0 |  1   1   1 |  2   2 |  0
    sequences    2 |  0   0   0 |  1   1 |  2
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchft.checks import counted
from torchft.config import DataConfig, RunConfig
from torchft.data.dataset import Dataset
from torchft.data.packing import epoch_samples, plan_rows
from torchft.errors import ConfigError, UserError
from torchft.modules.attention import PADDING

IGNORE = -100  # label of a token that is not trained
PAD_ID = 0  # any id would do: padding has no label, and no other document sees it
WIDTH_MULTIPLE = 16  # of rows without packing: tensor cores like it, and fewer shapes come up


@dataclass(frozen=True)
class Batch:
    """One micro-batch, B rows of T tokens."""

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, already shifted: the target of each position, or -100
    positions: torch.Tensor  # (B, T) int64, from 0 in each document
    documents: torch.Tensor | None  # (B, T) int32; None: every row is one document and has no padding
    num_tokens: int  # without padding
    num_supervised: int  # labels other than -100
    branches: torch.Tensor | None = None  # (B, T) int32, of pairs: 0 prompt, 1 chosen, 2 rejected
    sequences: torch.Tensor | None = None  # (B, T) int64, of pairs and verdicts: the answer of each token, or num_sequences
    num_sequences: int = 0  # answers; the chosen and the rejected one of a pair are neighbours
    desirable: torch.Tensor | None = None  # (num_sequences,) bool, of verdicts
    reference: torch.Tensor | None = None  # (B, T) fp32, of pairs: log-probabilities of the labels, where Dataset has them
    samples: np.ndarray | None = None  # (D,) the dataset's samples in it, row after row

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: _send(value, torch.device(device)) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def _send(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. A GPU copies from pinned memory in its turn; for other memory the host may wait until it is there."""
    if device.type == "cuda" and value.device.type == "cpu":
        with suppress(RuntimeError):  # none can be pinned: the copy is the same. Had a kernel failed, it would fail as well
            value = value.pin_memory()  # torch gives the memory to nobody else before the copy is done
    return value.to(device, non_blocking=True)


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch in training order: row r holds the samples members[starts[r]:starts[r + 1]]."""

    members: np.ndarray  # (number of samples used,) int32
    starts: np.ndarray  # (rows + 1,) int64

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The samples of one row."""
        return self.members[self.starts[index] : self.starts[index + 1]]


class Loader:
    """All optimizer steps of a run, as seen by one process.

    Args:
        run_cfg: its global_batch_size, rows per optimizer step over all processes (a row is max_seq_len packed tokens, or
            one example); micro_batch_size, an upper bound, `.micro_batch_size` being the one used; seed, which with the
            epoch decides order and packing; epochs and max_steps, the first of which to be reached ends the run.
    Raises: UserError if global_batch_size cannot be divided over the processes.
    """

    def __init__(
        self, dataset: Dataset, data_cfg: DataConfig, run_cfg: RunConfig, rank: int = 0, world_size: int = 1
    ) -> None:
        self.dataset, self.data_cfg = dataset, data_cfg
        self.global_batch_size, max_steps = run_cfg.global_batch_size, run_cfg.max_steps
        self.micro_batch_size = resolve_micro_batch_size(
            run_cfg.global_batch_size, run_cfg.micro_batch_size, world_size
        )
        self.rank, self.world_size = rank, world_size
        self.plans: list[Plan] = []  # of the epochs, up to the one in which the run ends
        self._first_step = [0]  # of each epoch; the last is the number of steps planned
        while len(self.plans) < run_cfg.epochs and not 0 < max_steps <= self._first_step[-1]:
            self.plans.append(_plan_epoch(dataset, data_cfg, run_cfg.seed, len(self.plans)))
            self._first_step.append(self._first_step[-1] + -(-self.plans[-1].num_rows // self.global_batch_size))
        self.total_steps = min(self._first_step[-1], max_steps or self._first_step[-1])  # optimizer steps of the run

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of one whole epoch, the partial one at its end included."""
        return self._first_step[epoch + 1] - self._first_step[epoch]

    def epoch_of(self, index: int) -> int:
        """The epoch, counted from 0, of a step."""
        return bisect_right(self._first_step, index) - 1

    def step(self, index: int) -> list[Batch]:
        """The micro-batches of this process for optimizer step `index`: equally many on every process."""
        rows = self._rows(index)
        cells = _deal(self.dataset, rows, self.micro_batch_size, self.world_size)
        mine = cells[self.rank :: self.world_size]
        return [_cell_batch(self.dataset, cell, self.micro_batch_size, self.data_cfg) for cell in mine]

    def step_tokens(self, index: int) -> tuple[int, int]:
        """(tokens, supervised tokens) of step `index` over all processes, known on each of them without communication."""
        samples = self.step_samples(index)
        return int(self.dataset.lengths[samples].sum()), int(self.dataset.num_supervised[samples].sum())

    def step_samples(self, index: int) -> np.ndarray:
        """The samples of step `index` over all processes, in the global order, (n,)."""
        return np.concatenate(self._rows(index))

    def _rows(self, index: int) -> list[np.ndarray]:
        assert 0 <= index < self.total_steps, (index, self.total_steps)
        epoch = self.epoch_of(index)
        plan, first = self.plans[epoch], (index - self._first_step[epoch]) * self.global_batch_size
        return [plan.row(row) for row in range(first, min(first + self.global_batch_size, plan.num_rows))]

    def summary(self) -> str:
        """What was planned, in lines: rows and their fill, steps and examples per step, how a step is divided."""
        samples = sum(len(plan.members) for plan in self.plans)
        rows = sum(plan.num_rows for plan in self.plans)
        kind = "of one example"
        if self.data_cfg.packing:
            limit = self.data_cfg.max_seq_len
            fill = sum(int(self.dataset.lengths[plan.members].sum()) for plan in self.plans) / (rows * limit)
            kind = f"of {limit} tokens, {100 * fill:.1f}% filled, {samples / rows:.1f} examples each"
        steps = [self.steps_per_epoch(epoch) for epoch in range(len(self.plans))]
        per_epoch = f"{min(steps):,}" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,}"
        per_step = samples / self._first_step[-1]
        accumulated = self.global_batch_size // (self.micro_batch_size * self.world_size)
        return (
            f"{counted(rows, 'row')} {kind}, in {counted(len(steps), 'epoch')}\n"
            f"{counted(self.total_steps, 'optimizer step')}, {per_epoch} per epoch, {per_step:.1f} examples per step\n"
            f"{counted(self.global_batch_size, 'row')} per step = {counted(self.world_size, 'process')} x "
            f"{counted(accumulated, 'micro-batch')} x {counted(self.micro_batch_size, 'row')}"
        )


def eval_batches(
    dataset: Dataset, *, data_cfg: DataConfig, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every example once, in a fixed order; equally many batches on every process, empty ones at the end where need be.

    The loss over the set is the sum of the batches' losses over the sum of their `num_supervised`, over all processes:
    it depends neither on micro_batch_size nor on the number of processes. Weights of sources do not count
    here.
    """
    rows = plan_rows(dataset.lengths, seed=0, epoch=0, max_seq_len=data_cfg.max_seq_len, packing=data_cfg.packing)
    cells = _deal(dataset, [np.asarray(row) for row in rows], micro_batch_size, world_size)
    for cell in cells[rank::world_size]:
        yield _cell_batch(dataset, cell, micro_batch_size, data_cfg)


def resolve_micro_batch_size(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """The largest m up to micro_batch_size with global_batch_size % (m * world_size) == 0.

    Raises: ConfigError, naming valid values, if there is none.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        valid = [str(value) for value in (below, below + world_size) if value > 0]
        raise ConfigError(
            f"run.global_batch_size: {global_batch_size} rows cannot be divided over {world_size} processes; "
            f"set it to {' or '.join(valid)}, or start another number of processes"
        )
    if micro_batch_size < 1:
        raise ConfigError(f"run.micro_batch_size: {micro_batch_size} is not a number of rows; set it to 1 or more")
    per_process = global_batch_size // world_size
    return next(m for m in range(min(micro_batch_size, per_process), 0, -1) if per_process % m == 0)


def _plan_epoch(dataset: Dataset, data_cfg: DataConfig, seed: int, epoch: int) -> Plan:
    samples = epoch_samples(dataset.weights, dataset.source, seed=seed, epoch=epoch)
    if not len(samples):
        raise UserError(
            f"data: the weights {dataset.weights} leave no example in epoch {epoch}; raise them or add data"
        )
    limits = {"max_seq_len": data_cfg.max_seq_len, "packing": data_cfg.packing}
    rows = plan_rows(dataset.lengths[samples], seed=seed, epoch=epoch, **limits)
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    members = np.fromiter((index for row in rows for index in row), np.int64, len(samples))
    return Plan(samples[members].astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]))


def _deal(dataset: Dataset, rows: list[np.ndarray], micro_batch_size: int, world_size: int) -> list[list[np.ndarray]]:
    """Rows to micro-batches: cell c is micro-batch c // world_size of process c % world_size.

    Every process gets as many cells; where rows are missing, some cells have one row less than others, at the end none.
    Rows go by length, so that those of one micro-batch are about equally long (it matters without packing only).
    """
    tokens = np.array([dataset.lengths[row].sum() for row in rows])
    order = np.argsort(-tokens, kind="stable")
    num_cells = -(-len(rows) // (micro_batch_size * world_size)) * world_size
    return [[rows[index] for index in cell] for cell in np.array_split(order, num_cells)] if rows else []


def _cell_batch(dataset: Dataset, cell: list[np.ndarray], micro_batch_size: int, data_cfg: DataConfig) -> Batch:
    """Packed batches always have one shape, for torch.compile; others no empty row but where there is no other."""
    num_rows = micro_batch_size if data_cfg.packing else max(1, len(cell))
    return make_batch(dataset, cell, num_rows=num_rows, max_seq_len=data_cfg.max_seq_len, packing=data_cfg.packing)


def make_batch(dataset: Dataset, rows: list[np.ndarray], *, num_rows: int, max_seq_len: int, packing: bool) -> Batch:
    """One batch from rows of samples. See the example at the top.

    Args:
        num_rows: B; rows beyond those given are all padding.
        max_seq_len, packing: T is max_seq_len with packing, else the longest row rounded up to a multiple of 16 within
        the limit.
    """
    per_row = np.array([len(row) for row in rows] + [0] * (num_rows - len(rows)))  # (B,) documents
    samples = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)  # (D,), D documents in all
    lengths = dataset.lengths[samples]  # (D,)
    row_tokens = np.bincount(np.repeat(np.arange(num_rows), per_row), lengths, num_rows).astype(np.int64)  # (B,)
    width = max_seq_len
    if not packing:
        width = min(-(-max(int(row_tokens.max()), 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, max_seq_len)

    num_tokens = int(lengths.sum())
    first = np.cumsum(lengths) - lengths  # (D,) where a document begins among the batch's N tokens
    position = np.arange(num_tokens) - np.repeat(first, lengths)  # (N,)
    index = position + np.repeat(dataset.starts[samples], lengths)  # (N,) into the dataset's flat arrays
    number = np.arange(len(samples)) - np.repeat(np.cumsum(per_row) - per_row, per_row)  # (D,) of a document in its row
    supervised = dataset.supervised[index]
    following = np.take(dataset.ids, index + 1, mode="clip")  # past the last token only where nothing is supervised

    column = np.arange(width)
    real = column < row_tokens[:, None]  # (B, T); row after row these are the N tokens
    input_ids = np.full((num_rows, width), PAD_ID, np.int64)
    labels = np.full((num_rows, width), IGNORE, np.int64)
    positions = column - row_tokens[:, None]  # of the padding
    documents = np.full((num_rows, width), PADDING, np.int32)
    input_ids[real] = dataset.ids[index]
    labels[real] = np.where(supervised, following, IGNORE)
    documents[real] = np.repeat(number, lengths)
    answers, position = _answers(dataset, samples, position, real)
    positions[real] = position
    whole = bool((per_row == 1).all() and (row_tokens == width).all()) and "branches" not in answers
    if dataset.reference is not None:
        reference = np.zeros((num_rows, width), np.float32)
        reference[real] = dataset.reference[index]
        answers["reference"] = torch.from_numpy(reference)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        None if whole else torch.from_numpy(documents),
        num_tokens,
        int(supervised.sum()),
        samples=samples,
        **answers,
    )


def _answers(
    dataset: Dataset, samples: np.ndarray, position: np.ndarray, real: np.ndarray
) -> tuple[dict[str, torch.Tensor | int], np.ndarray]:
    """The fields of a Batch that pairs and verdicts have, and the tokens' positions, which restart in each branch.

    samples (D,), position (N,) of each token in its sample, real (B, T): where the batch's N tokens stand.
    """
    if dataset.parts is None and dataset.desirable is None:
        return {}, position
    lengths, number = dataset.lengths[samples], np.arange(len(samples))
    per_sample = 1 if dataset.parts is None else 2
    sequences = np.full(real.shape, per_sample * len(samples), np.int64)
    fields: dict[str, torch.Tensor | int] = {"num_sequences": per_sample * len(samples)}
    if dataset.parts is None:
        sequences[real] = np.repeat(number, lengths)
        fields["desirable"] = torch.from_numpy(dataset.desirable[samples])
    else:
        trunk, chosen = (np.repeat(part, lengths) for part in dataset.parts[samples].T)  # (N,) each
        branch = (position >= trunk).astype(np.int32) + (position >= trunk + chosen)
        branches = np.zeros(real.shape, np.int32)
        branches[real] = branch
        fields["branches"] = torch.from_numpy(branches)
        own = 2 * np.repeat(number, lengths) + branch - 1
        sequences[real] = np.where(branch > 0, own, fields["num_sequences"])
        position = position - np.where(branch == 2, chosen, 0)
    return fields | {"sequences": torch.from_numpy(sequences)}, position
