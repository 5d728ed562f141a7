"""A run that goes on with other processes sees each row once; one that goes on with other options is refused, or says so.

PITFALLS K6, T13 and 2b. The curve over 2, 1 and 4 processes is in tests/recipes; here is who reads what.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from byte_tokenizer import row
from scale import random_of, scaled
from some_config import NAMES, NEEDED, Config
from tiny_training import TinyRun, hide_cuda

from torchft.checkpoint import MAY_CHANGE, MUST_STAY, NOT_SAID, find_checkpoint, save_checkpoint
from torchft.config import DataConfig, RunConfig
from torchft.data.loader import Loader
from torchft.errors import UserError
from torchft.parse import flatten, read_config


def rows_read(loaders: list[Loader], step: int) -> Counter[tuple[int, ...]]:
    """What all processes train in one step, document by document."""
    found: Counter[tuple[int, ...]] = Counter()
    for loader in loaders:
        for batch in loader.step(step):
            for number, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
                if batch.documents is None:  # one document a row, which ends with a trained token
                    end = int((labels >= 0).nonzero().max()) + 1
                    found[(*ids[:end].tolist(), int(labels[end - 1]))] += 1
                    continue
                documents = batch.documents[number]
                found.update(tuple(ids[documents == n].tolist()) for n in documents[labels >= 0].unique().tolist())
    return found


def divisors(number: int) -> list[int]:
    return [n for n in (1, 2, 4) if number % n == 0]


@pytest.mark.parametrize("packing", [True, False])
def test_each_row_once_an_epoch_whoever_reads(packing: bool, build: Callable, tally: Callable) -> None:
    """At every step another number of processes and another micro-batch, as after as many resumes."""
    random, number = random_of("world", packing), scaled(6, 60)
    for turn in range(number):
        seed, examples, rows = random.randrange(10**6), random.randint(4, 40), 4 * random.randint(1, 3)
        texts = [row(f"q{i}" + "x" * random.randint(0, 12), f"a{i}") for i in range(examples)]
        dataset = build(texts, name=f"{turn}.jsonl")
        data = DataConfig(max_seq_len=64, packing=packing)
        epochs = 2

        def loaders(world: int) -> list[Loader]:
            run = RunConfig(seed=seed, epochs=epochs, global_batch_size=rows, micro_batch_size=random.choice([1, 2, 4]))  # noqa: B023
            return [Loader(dataset, data, run, rank, world) for rank in range(world)]  # noqa: B023

        steps = [rows_read(loaders(random.choice(divisors(rows))), step) for step in range(loaders(1)[0].total_steps)]
        assert sum(steps, Counter()) == Counter({text: epochs * count for text, count in _all(dataset).items()})
        alone = [rows_read(loaders(1), step) for step in range(len(steps))]
        assert steps == alone  # step by step the same rows
    tally(number, "runs over changing numbers of processes")


def _all(dataset: object) -> Counter[tuple[int, ...]]:
    spans = zip(dataset.starts, dataset.lengths, strict=True)
    return Counter(tuple(dataset.ids[start : start + length].tolist()) for start, length in spans)


def other_values(value: object) -> Iterator[object]:
    """A value of the same type that an option may be edited to."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    elif isinstance(value, str):
        yield value + "x"
    elif isinstance(value, list):
        yield [*value, {"path": "b.jsonl"} if not value or isinstance(value[0], dict) else value[0]]
    else:
        yield {"rope": "eager"}


def test_every_edited_option_is_refused_or_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable) -> None:
    """Each option of every group, one at a time: never silently another run."""
    hide_cuda(monkeypatch)
    (tmp_path / "c.yaml").write_text("")
    cfg = asdict(read_config(Config, str(tmp_path / "c.yaml"), [*NEEDED, f"run.out={tmp_path}"], paths=False))
    run = TinyRun().train(0, 1)
    save_checkpoint(tmp_path, 1, params=run.params, optimizer=run.optimizer, state={}, config=cfg, keep_last=1)
    edited = 0
    for name in NAMES:
        group, _, leaf = name.rpartition(".")
        for value in other_values(cfg[group][leaf] if group else cfg[leaf]):
            changed = json.loads(json.dumps(cfg))
            (changed[group] if group else changed)[leaf] = value
            said: list[str] = []
            try:
                find_checkpoint(tmp_path, "auto", changed, said.append)
                assert any(f"resume: changed {name}" in line for line in said) or name in (*NOT_SAID, "run.out"), name
                assert MAY_CHANGE.fullmatch(name) and name not in MUST_STAY, name
            except UserError as error:
                assert name in str(error) and "cannot be continued" in str(error)
            edited += 1
    assert edited >= len(flatten(Config()))
    tally(edited, "edited options")
