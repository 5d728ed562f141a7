"""A dataset: the tokens of all its examples in flat arrays, made once, kept on disk, and accounted for row by row.

    dataset = build_dataset(cfg.data.train, cfg.data, tokenizer, template)
    train, valid = build_datasets(cfg.data, tokenizer, template, cfg.run.seed)  # the same for both parts of a config

Every row read is either used or dropped under a reason, which counts it once; a source that loses more than
`data.max_bad_rows` of its rows is refused. A conversation is one sample. A plain text is cut into as many samples as it
needs. Order, packing and batches are not decided here (packing.py, loader.py).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

from torchft.config import DataConfig, SourceConfig
from torchft.data.account import SourceReport, refuse_too_many
from torchft.data.cache import cache_key, cache_note, hash_arrays, load_arrays, store_arrays
from torchft.data.chat_template import ChatTemplate
from torchft.data.formats import Example, to_example
from torchft.data.layout import KINDS, Layout, detect_layout
from torchft.data.packing import HOLD_OUT, shuffled
from torchft.data.preferences import preference_samples, read_preference
from torchft.data.rows import BadRow, Row
from torchft.data.samples import Sample, make_samples
from torchft.data.sources import announce_hub, read_source
from torchft.data.tokenizer import Tokenizer
from torchft.errors import UserError

ARRAYS = ("ids", "supervised", "starts", "lengths", "source", "row")
OF_SAMPLES = ("starts", "lengths", "source", "row", "parts", "desirable")


@dataclass
class Dataset:
    """Samples, each a run of tokens in flat arrays: sample s is ids[starts[s]:starts[s] + lengths[s]]."""

    ids: np.ndarray  # (N,) int32
    supervised: np.ndarray  # (N,) bool: the NEXT token is a target; False at the last token of a sample
    starts: np.ndarray  # (S,) int64
    lengths: np.ndarray  # (S,) int64
    source: np.ndarray  # (S,) int64, index into sources
    row: np.ndarray  # (S,) int64, which row of its source, from 0
    sources: list[SourceConfig]
    reports: list[SourceReport]
    key: str  # config key of the sources
    parts: np.ndarray | None = None  # (S, 2) int64, of pairs: tokens of the trunk and of the chosen branch (preferences.py)
    desirable: np.ndarray | None = None  # (S,) bool, of verdicts
    reference: np.ndarray | None = None  # (N,) fp32, of pairs: the next token's log-probability; see torchft/reference.py
    cache_note: str = ""  # where the tokens came from, one line

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def weights(self) -> list[float]:
        """How often each source's samples are used per epoch."""
        return [source.weight for source in self.sources]

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """Targets in each sample, (S,) int64."""
        before = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return before[self.starts + self.lengths] - before[self.starts]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        values = {name: getattr(self, name) for name in dict.fromkeys(ARRAYS + OF_SAMPLES)}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that training sees of the data: with equal options, equal fingerprints give equal batches."""
        return hash_arrays(self.arrays | {"weights": np.array(self.weights)})

    def example(self, index: int) -> Example:
        """The conversation or text of a sample, read again from its source when first asked for."""
        number = int(self.source[index])
        if number not in self._rows:
            self._rows[number] = read_source(self.sources[number], f"{self.key}[{number}]")
        return _read(self._rows[number][self.row[index]], self.reports[number].layout)

    @cached_property
    def _rows(self) -> dict[int, list[Row]]:
        return {}

    def select(self, samples: np.ndarray) -> "Dataset":
        """The dataset of some samples, over the same arrays; its reports are still those of all that was read."""
        return replace(self, **{name: self.arrays[name][samples] for name in OF_SAMPLES if name in self.arrays})


def build_dataset(
    sources: list[SourceConfig],
    data_cfg: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    key: str = "data.train",
    kind: str = "sft",
    use_cache: bool = True,
    quiet: bool = False,
) -> Dataset:
    """Read and tokenise the sources, or take the tokens from the cache if nothing that decides them has changed.

    Args:
        template: None is enough for plain texts.
        key: config key of the sources, for messages.
        kind: what the recipe reads, one of torchft.data.layout.KINDS.
        quiet: no progress bar and no lines, as on all but one process.
    Raises: UserError, naming file and line, for what read_source and detect_layout refuse, for a conversation without a
        template, and for a source with too many bad rows or none that can be used.
    """
    if not sources:
        raise UserError(f"{key}: no data; name a file or a hub dataset, e.g. {key}=train.jsonl")
    if not quiet:
        announce_hub(sources, key)
    entry = cache_key(sources, data_cfg, tokenizer, template, key, kind) if use_cache else ""
    stored = load_arrays(entry, quiet) if use_cache else None
    if stored is not None:
        arrays, facts = stored
        reports = [SourceReport.from_json(report) for report in facts["reports"]]
        return Dataset(**arrays, sources=sources, reports=reports, key=key, cache_note=cache_note(entry))
    dataset = _tokenize_sources(sources, data_cfg, tokenizer, template, key=key, kind=kind, quiet=quiet)
    if use_cache:
        store_arrays(entry, dataset.arrays, {"reports": [report.to_json() for report in dataset.reports]}, quiet)
    return dataset


def _tokenize_sources(
    sources: list[SourceConfig],
    data_cfg: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    key: str,
    kind: str,
    quiet: bool,
) -> Dataset:
    heres = [f"{key}[{number}]" for number in range(len(sources))]
    tables = [read_source(source, here) for source, here in zip(sources, heres, strict=True)]
    reports = [
        SourceReport(source.path, _layout(rows, source, template, here, kind), read=len(rows))
        for source, rows, here in zip(sources, tables, heres, strict=True)
    ]
    samples: list[Sample] = []
    owners: list[tuple[int, int]] = []  # (source, row) of each sample
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=sum(map(len, tables)), desc="tokenising", unit=" rows", leave=False, disable=quiet or None) as bar:
        for number, (rows, report) in enumerate(zip(tables, reports, strict=True)):
            for index, row in enumerate(rows):
                made = _count_samples(row, kind, report, data_cfg, tokenizer, template)
                samples += made
                owners += [(number, index)] * len(made)
                bar.update()
            refuse_too_many(report, data_cfg, heres[number])
    lengths = np.array([len(sample.ids) for sample in samples], np.int64)
    where = np.array(owners, np.int64)
    return Dataset(
        ids=np.concatenate([sample.ids for sample in samples]),
        supervised=np.concatenate([np.append(sample.trained[1:], False) for sample in samples]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        source=where[:, 0].copy(),
        row=where[:, 1].copy(),
        parts=np.array([(sample.num_trunk, sample.num_chosen) for sample in samples], np.int64) if kind == "pairs" else None,
        desirable=np.array([sample.desirable for sample in samples]) if kind == "verdicts" else None,
        sources=sources,
        reports=reports,
        key=key,
    )


def _read(row: Row, layout: Layout) -> Example:
    return to_example(row, layout) if layout.format in KINDS["sft"] else read_preference(row, layout)


def _count_samples(
    row: Row, kind: str, report: SourceReport, data_cfg: DataConfig, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[Sample]:
    """The samples of one row, which the report counts as used, or as dropped if there are none."""
    try:
        example = _read(row, report.layout)
        if kind == "sft":
            samples, notes = make_samples(example, data_cfg, tokenizer, template)
        else:
            samples, notes = preference_samples(example, kind, data_cfg, tokenizer, template)
    except BadRow as error:
        report.drop(row.where, error)
        return []
    report.use(row.where, notes)
    return samples


def _layout(rows: list[Row], source: SourceConfig, template: ChatTemplate | None, here: str, kind: str) -> Layout:
    if not rows:
        raise UserError(f"{here}: {source.path} is empty, there is no row in it; name another file or leave it out")
    if not any(row.values is not None for row in rows):
        first = f"{rows[0].where}: {rows[0].problem}"
        raise UserError(f"{here}: none of the {len(rows)} rows of {source.path} can be read; the first, {first}")
    layout = detect_layout(rows, source, here, kind)
    if layout.format != "text" and template is None:
        raise UserError(
            f"{here}: {source.path} holds conversations and the tokenizer has no chat template; "
            f"set data.chat_template to chatml, alpaca or a .jinja file"
        )
    return layout


def build_datasets(
    data_cfg: DataConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seed: int,
    *,
    kind: str = "sft",
    quiet: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """(training data, validation data): `data.valid` if it names any, else a share of the training data, else None.

    Arguments and errors as in `build_dataset` and `hold_out`.
    """
    train = build_dataset(data_cfg.train, data_cfg, tokenizer, template, kind=kind, quiet=quiet)
    if data_cfg.valid:
        return train, build_dataset(data_cfg.valid, data_cfg, tokenizer, template, key="data.valid", kind=kind, quiet=quiet)
    return hold_out(train, data_cfg.valid_fraction, seed) if data_cfg.valid_fraction else (train, None)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training part, held-out part) of a dataset: a random share of its rows, the same for the same seed.

    Rows, not samples: the pieces of one long text stay on one side.

    Raises: UserError if either part would be empty.
    """
    _, row = np.unique(np.stack([dataset.source, dataset.row]), axis=1, return_inverse=True)  # (S,) number of its row
    num_rows = int(row.max()) + 1
    count = round(fraction * num_rows)
    if not 0 < count < num_rows:
        raise UserError(
            f"data.valid_fraction: {fraction} of {num_rows} rows is {count}: one part would be empty; "
            f"change it, or name a file in data.valid"
        )
    held_out = np.isin(row, shuffled(num_rows, seed, HOLD_OUT)[:count])  # (S,)
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
