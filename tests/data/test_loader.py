"""Batches: their tensors exactly, the same steps on any number of processes, every sample once."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from torchft.config import DataConfig, RunConfig, SourceConfig
from torchft.data import loader as loader_module
from torchft.data.dataset import Dataset
from torchft.data.loader import Loader, eval_batches, make_batch, resolve_micro_batch_size
from torchft.errors import ConfigError, UserError
from torchft.modules.attention import PADDING


def dataset_of(documents, weights=(1.0,), source=None):
    """documents: [(ids, trained)], each the whole of a sample."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int64)
    return Dataset(
        ids=np.concatenate([ids for ids, _ in documents]).astype(np.int32),
        supervised=np.concatenate([np.append(np.array(trained[1:], bool), False) for _, trained in documents]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        source=np.zeros(len(documents), np.int64) if source is None else np.array(source),
        row=np.arange(len(documents)),
        sources=[SourceConfig(path=f"{number}.jsonl", weight=weight) for number, weight in enumerate(weights)],
        reports=[],
        key="data.train",
    )


def numbered(count, longest=12, seed=0):
    """Sample i is i + 1 repeated, of a random length, its second half trained."""
    sizes = np.random.default_rng(seed).integers(2, longest + 1, count)
    return dataset_of([(np.full(n, i + 1), np.arange(n) >= n // 2) for i, n in enumerate(sizes.tolist())])


def make_loader(dataset, *, max_seq_len=16, packing=True, **options):
    cfg = DataConfig(max_seq_len=max_seq_len, packing=packing)
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 0, "epochs": 1} | options
    ranks = {name: settings.pop(name) for name in ("rank", "world_size") if name in settings}
    return Loader(dataset, cfg, RunConfig(**settings), **ranks)


TWO = [([10, 11, 12, 13], [0, 0, 1, 1]), ([20, 21, 22], [1, 0, 1]), ([30, 31, 32, 33, 34, 35, 36, 37], [1] * 8)]


def batch(rows, **options):
    settings = {"num_rows": len(rows), "max_seq_len": 8, "packing": True} | options
    return make_batch(dataset_of(TWO), [np.array(row) for row in rows], **settings)


def test_the_worked_example_of_the_module():
    made = batch([[0, 1], [2]], num_rows=3)
    assert made.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22, 0], list(range(30, 38)), [0] * 8]
    assert made.labels.tolist() == [
        [-100, 12, 13, -100, -100, 22, -100, -100],
        [31, 32, 33, 34, 35, 36, 37, -100],
        [-100] * 8,
    ]
    assert made.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], list(range(8)), list(range(8))]
    assert made.documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, PADDING], [0] * 8, [PADDING] * 8]
    assert (made.num_tokens, made.num_supervised) == (15, 10)
    types = [made.input_ids.dtype, made.labels.dtype, made.positions.dtype, made.documents.dtype]
    assert types == [torch.int64, torch.int64, torch.int64, torch.int32]


def test_documents_is_none_only_for_whole_rows_of_one_document():
    assert batch([[2]]).documents is None
    assert batch([[2], [2]]).documents is None
    assert batch([[2]], num_rows=2).documents is not None  # an empty row
    assert batch([[0]]).documents.tolist() == [[0] * 4 + [PADDING] * 4]
    assert batch([[0, 0]]).documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]  # two documents
    assert batch([[2]], packing=False).documents is None


def test_without_packing_rows_are_as_wide_as_the_longest_up_to_a_multiple_of_16():
    data = dataset_of([(np.arange(1, n + 1), [1] * n) for n in (3, 16, 17, 40)])

    def width(*rows, limit=64):
        return make_batch(
            data, [np.array([r]) for r in rows], num_rows=len(rows), max_seq_len=limit, packing=False
        ).input_ids.shape

    assert width(0) == (1, 16)
    assert width(0, 1) == (2, 16)
    assert width(0, 2) == (2, 32)
    assert width(3) == (1, 48)
    assert width(3, limit=40) == (1, 40)  # never beyond max_seq_len, which the model may not reach over
    empty = make_batch(data, [], num_rows=1, max_seq_len=64, packing=False)
    assert empty.input_ids.shape == (1, 16) and empty.num_tokens == empty.num_supervised == 0


def test_labels_are_never_from_another_document_or_from_padding(monkeypatch):
    """PITFALLS T3: another padding id changes padding only."""
    monkeypatch.setattr(loader_module, "PAD_ID", 7)
    made, other = batch([[1, 0], [1]]), None
    monkeypatch.setattr(loader_module, "PAD_ID", 0)
    other = batch([[1, 0], [1]])
    assert torch.equal(made.labels, other.labels) and torch.equal(made.documents, other.documents)
    differ = made.input_ids != other.input_ids
    assert differ.tolist() == [[False] * 7 + [True], [False] * 3 + [True] * 5]
    assert (made.labels[differ] == -100).all()


def rows_of(batches):
    """The document ids of each row, as ids are sample numbers; empty rows left out."""
    rows = []
    for made in batches:
        for ids, documents in zip(
            made.input_ids, made.documents if made.documents is not None else made.input_ids * 0, strict=True
        ):
            row = tuple(dict.fromkeys((int(d), int(i)) for d, i in zip(documents, ids, strict=True) if i))
            rows += [tuple(i for _, i in row)] if row else []
    return rows


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_is_every_sample_once_and_its_last_step_what_is_left(packing):
    """PITFALLS L4, D3: nothing is dropped, repeated, or carried into the next epoch."""
    loader = make_loader(numbered(43), packing=packing, epochs=2, global_batch_size=8)
    for epoch in range(2):
        steps = [index for index in range(loader.total_steps) if loader.epoch_of(index) == epoch]
        assert len(steps) == loader.steps_per_epoch(epoch)
        assert sorted(sample for index in steps for sample in loader.step_samples(index)) == list(range(43))


def check_step(loaders, index):
    """One step as all processes see it: equally many batches, the right rows, the right count. Returns the rows."""
    shares = [loader.step(index) for loader in loaders]
    assert len({len(share) for share in shares}) == 1 and shares[0], "every process must run equally many batches"
    batches = list(itertools.chain(*shares))
    assert max(made.input_ids.shape[0] for made in batches) <= loaders[0].micro_batch_size
    totals = (sum(made.num_tokens for made in batches), sum(made.num_supervised for made in batches))
    assert {loader.step_tokens(index) for loader in loaders} == {totals}
    return rows_of(batches)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 8), (2, 1), (2, 3), (2, 8), (4, 1), (4, 2)])
def test_a_step_holds_the_same_rows_on_1_2_and_4_processes(packing, world, micro):
    """PITFALLS T13, K6: one global order, dealt out."""
    data = numbered(43)
    options = {"packing": packing, "epochs": 2, "global_batch_size": 8}
    single = make_loader(data, **options, micro_batch_size=1)
    loaders = [make_loader(data, **options, micro_batch_size=micro, rank=r, world_size=world) for r in range(world)]
    for index in range(single.total_steps):
        assert Counter(check_step(loaders, index)) == Counter(rows_of(single.step(index)))
        assert all((loader.step_samples(index) == single.step_samples(index)).all() for loader in loaders)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_rows_gives_every_process_equally_many_batches(packing, world):
    """PITFALLS D1, with fewer rows than processes too."""
    for count in range(1, 2 * world * 2 + 2):
        data = numbered(count)
        options = {"packing": packing, "global_batch_size": 2 * world, "world_size": world}
        loaders = [make_loader(data, rank=rank, **options) for rank in range(world)]
        seen = Counter(i for index in range(loaders[0].total_steps) for row in check_step(loaders, index) for i in row)
        assert seen == Counter(range(1, count + 1))


def test_packed_batches_all_have_one_shape():
    for count in range(1, 20):  # whatever is left for the last step
        loader = make_loader(numbered(count, longest=16), global_batch_size=6, micro_batch_size=3)
        shapes = {made.input_ids.shape for index in range(loader.total_steps) for made in loader.step(index)}
        assert shapes == {(3, 16)}


def test_a_step_depends_on_nothing_but_its_index():
    data = numbered(30)
    one, other = make_loader(data, epochs=2), make_loader(data, epochs=2)
    for index in reversed(range(one.total_steps)):
        other.step(index)
    for index in range(one.total_steps):
        for a, b in zip(one.step(index), other.step(index), strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.positions, b.positions) and torch.equal(a.documents, b.documents)


def test_seeds_give_other_orders():
    orders = [make_loader(numbered(30), seed=seed).step_samples(0).tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_micro_batches_without_packing_hold_rows_of_about_one_length():
    data = numbered(64, longest=100)
    loader = make_loader(data, max_seq_len=128, packing=False, global_batch_size=64, micro_batch_size=8)
    widths = [made.input_ids.shape[1] for made in loader.step(0)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 2 * widths[-1]
    options = {"max_seq_len": 128, "packing": False, "global_batch_size": 64, "micro_batch_size": 8, "world_size": 2}
    shares = [make_loader(data, rank=rank, **options).step(0) for rank in range(2)]
    turns = [made.input_ids.shape[1] for pair in zip(*shares, strict=True) for made in pair]
    assert turns == widths, "processes that wait for each other should work on rows of about one length"


def test_weights_of_sources_are_followed_per_epoch():
    documents = [(np.full(4, i + 1), [1] * 4) for i in range(30)]
    data = dataset_of(documents, weights=(1.0, 2.0, 0.5), source=[0] * 10 + [1] * 10 + [2] * 10)
    loader = make_loader(data, epochs=2)
    for epoch in range(2):
        steps = [index for index in range(loader.total_steps) if loader.epoch_of(index) == epoch]
        used = Counter(i for index in steps for i in loader.step_samples(index).tolist())
        assert [used[i] for i in range(20)] == [1] * 10 + [2] * 10
        assert sum(used[i] for i in range(20, 30)) == 5


def test_max_steps_ends_the_run_within_or_between_epochs():
    data = numbered(20)
    per_epoch = make_loader(data).total_steps
    assert make_loader(data, epochs=3, max_steps=1).total_steps == 1
    assert make_loader(data, epochs=10**6, max_steps=per_epoch + 1).total_steps == per_epoch + 1
    assert make_loader(data, epochs=1, max_steps=10**6).total_steps == per_epoch
    assert len(make_loader(data, epochs=10**6, max_steps=per_epoch).plans) == 1, "epochs never reached are not planned"


@pytest.mark.parametrize(
    ("rows", "bound", "world", "size"),
    [(8, 1, 1, 1), (8, 8, 1, 8), (8, 100, 1, 8), (8, 3, 1, 2), (8, 8, 4, 2), (6, 4, 1, 3), (6, 2, 2, 1), (7, 6, 1, 1)],
)
def test_the_micro_batch_is_the_largest_that_divides(rows, bound, world, size):
    assert resolve_micro_batch_size(rows, bound, world) == size


@pytest.mark.parametrize(
    ("rows", "bound", "world", "said"),
    [
        (6, 1, 4, r"run\.global_batch_size: 6 rows cannot be divided over 4 processes; set it to 4 or 8"),
        (2, 1, 4, r"set it to 4,"),
        (0, 1, 1, r"run\.global_batch_size: 0"),
        (4, 0, 1, r"run\.micro_batch_size: 0"),
    ],
)
def test_sizes_that_do_not_divide_name_valid_ones(rows, bound, world, said):
    with pytest.raises(ConfigError, match=said):  # status 2, as of every other option
        resolve_micro_batch_size(rows, bound, world)


def test_weights_that_leave_nothing_are_an_error():
    with pytest.raises(UserError, match=r"weights \[0\.01\] leave no example in epoch 0"):
        make_loader(dataset_of(TWO, weights=(0.01,)), max_seq_len=8)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 7), (2, 2), (3, 1), (3, 7)])
def test_evaluation_sees_each_sample_once_for_any_micro_batch_and_process_count(packing, world, micro):
    data = numbered(23)
    options = {"data_cfg": DataConfig(max_seq_len=16, packing=packing), "micro_batch_size": micro, "world_size": world}
    shares = [list(eval_batches(data, rank=rank, **options)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert Counter(i for share in shares for row in rows_of(share) for i in row) == Counter(range(1, 24))
    assert sum(made.num_supervised for share in shares for made in share) == data.num_supervised.sum()


def test_the_batch_goes_to_a_device_whole():
    moved = batch([[0, 1]]).to("meta")
    assert {x.device.type for x in (moved.input_ids, moved.labels, moved.positions, moved.documents)} == {"meta"}
    assert (moved.num_tokens, moved.num_supervised) == (7, 3)
    assert batch([[2]]).to("cpu").documents is None


def test_the_summary_counts_what_is_planned():
    data = dataset_of([(np.full(4, 1), [1] * 4)] * 10)
    text = make_loader(data, epochs=2, max_seq_len=8, global_batch_size=4, micro_batch_size=2, world_size=2).summary()
    assert text.splitlines() == [
        "10 rows of 8 tokens, 100.0% filled, 2.0 examples each, in 2 epochs",
        "4 optimizer steps, 2 per epoch, 5.0 examples per step",
        "4 rows per step = 2 processes x 1 micro-batch x 2 rows",
    ]
    text = make_loader(data, packing=False, max_seq_len=8, max_steps=2).summary()
    assert text.splitlines()[:2] == [
        "10 rows of one example, in 1 epoch",
        "2 optimizer steps, 3 per epoch, 3.3 examples per step",
    ]
    text = make_loader(data, max_seq_len=64, global_batch_size=1).summary()
    assert text.splitlines() == [
        "1 row of 64 tokens, 62.5% filled, 10.0 examples each, in 1 epoch",
        "1 optimizer step, 1 per epoch, 10.0 examples per step",
        "1 row per step = 1 process x 1 micro-batch x 1 row",
    ]
