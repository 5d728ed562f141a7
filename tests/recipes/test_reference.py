"""The log-probabilities of a reference that are computed once: what each batch brings along, and the file that keeps them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_dpo_distributed import options as adapter_options
from test_dpo_full import FULL
from test_dpo_trl import datasets

from torchft import reference
from torchft.data.loader import Batch, Loader, eval_batches
from torchft.errors import UserError
from torchft.models import build_model, read_config
from torchft.reference import FILE, StoredReference, label_logprobs, precompute
from torchft.weights import load_weights


class Case:
    """A model, its pairs and the reference that is kept of them, on one process."""

    def __init__(self, model: Path, data: Path, out: Path, *more: str) -> None:
        cfg = adapter_options(model, data, out, *FULL, *more)
        self.train, self.valid = datasets(cfg)
        self.loader = Loader(self.train, cfg.data, cfg.run)
        self.cells = {"data_cfg": cfg.data, "micro_batch_size": cfg.run.micro_batch_size}
        self.facts = {"data": self.train.fingerprint, "model": "m"}
        self.stored = StoredReference(out, self.loader, self.valid, self.cells, self.facts)
        with torch.device("meta"):
            self.model = build_model(read_config(model))
        load_weights(self.model, model, device="cpu", dtype=torch.float32)
        self.said: list[str] = []

    def compute(self) -> str:
        """What is said while it is made or read."""
        self.said.clear()
        precompute(self.model, self.stored, torch.device("cpu"), self.said.append)
        return "; ".join(self.said)


@pytest.mark.parametrize("packing", [True, False])
def test_every_batch_brings_its_own_reference(small_model: Path, pair_data: Path, tmp_path: Path, packing: bool) -> None:
    """Of all epochs, of which each takes other pairs and packs them otherwise, on each of two processes."""
    more = (f"data.packing={packing}".lower(), "data.max_seq_len=160", "run.epochs=4", "run.max_steps=0")
    weighted = f"data.train=[{{path: {pair_data}, weight: 0.5}}, {{path: {pair_data}, weight: 2.0}}]"
    case = Case(small_model, pair_data, tmp_path, *more, weighted, "run.global_batch_size=4")
    case.compute()
    cfg = replace(adapter_options(small_model, pair_data, tmp_path).run, epochs=4, max_steps=0, global_batch_size=4)
    loaders = [Loader(case.train, case.loader.data_cfg, cfg, rank, 2) for rank in (0, 1)]
    batches = [batch for loader in loaders for index in range(loader.total_steps) for batch in loader.step(index)]
    batches += eval_batches(case.valid, **case.cells)
    assert len(batches) > 20
    for batch in batches:
        with torch.no_grad():
            expected = label_logprobs(case.model, batch)
        assert (batch.reference - expected).abs().max() <= 1e-5 and batch.reference.dtype == torch.float32
        assert not batch.reference[batch.labels < 0].any()


def test_each_pair_is_computed_once_and_only_if_it_is_used(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    for more, pairs in (([], 18 + 6), (["run.max_steps=1"], 8 + 6), (["data.valid_fraction=0", "run.eval_every=0"], 24)):
        case = Case(small_model, pair_data, tmp_path, "run.epochs=3", "run.max_steps=0", *more)
        assert case.stored.num_pairs == pairs
        assert sum(batch.num_sequences // 2 for _, batch in case.stored.batches()) == pairs


def test_the_file_is_read_again_where_it_fits(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    case = Case(small_model, pair_data, tmp_path)
    assert "computing the log-probabilities of 24 pairs" in case.compute()
    made, file = case.train.reference, tmp_path / FILE
    kept = file.read_bytes()
    again = Case(small_model, pair_data, tmp_path)
    again.model = None  # nothing is computed
    assert again.compute() == f"reference: log-probabilities of 24 pairs from {file}"
    assert (again.train.reference == made).all() and again.train.reference.any() and again.valid.reference.any()
    more_steps = Case(small_model, pair_data, tmp_path, "run.max_steps=1", "run.epochs=1")
    assert "it is of another choice of pairs" in more_steps.compute()
    assert file.read_bytes() != kept
    case.compute()
    assert file.read_bytes() == kept, "the same bytes each time"


def damaged(file: Path) -> None:
    """One number is another, and everything else is as it should be."""
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    values = load_file(file)
    values["train"][3] += 1
    save_file(values, file, about)


SPOILT = {
    "another model": (lambda case, file: case.facts.update(model="n"), "it is of another model"),
    "damaged": (lambda case, file: damaged(file), "it is damaged"),
    "cut short": (lambda case, file: file.write_bytes(file.read_bytes()[:-10]), "it cannot be read"),
    "of another program": (lambda case, file: save_file({"a": torch.zeros(1)}, file), "it is of another data, model, choice"),
    "a directory": (lambda case, file: (file.unlink(), file.mkdir()), "cannot be written"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_file_that_does_not_fit_is_said_and_made_again(small_model: Path, pair_data: Path, tmp_path: Path, what: str) -> None:
    case = Case(small_model, pair_data, tmp_path)
    case.compute()
    expected, file = case.train.reference, tmp_path / FILE
    spoil, words = SPOILT[what]
    spoil(case, file)
    case.stored = StoredReference(tmp_path, case.loader, case.valid, case.cells, case.facts)
    if what == "a directory":
        with pytest.raises(UserError, match=words):
            case.compute()
        return
    assert words in case.compute() and (case.train.reference == expected).all()
    assert "from" in case.compute(), "what was made again is read"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_model_without_finite_numbers_is_refused(
    small_model: Path, pair_data: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(small_model, pair_data, tmp_path)

    def broken(model: object, batch: Batch) -> torch.Tensor:
        return label_logprobs(model, batch).masked_fill(batch.labels == batch.labels.max(), value)

    monkeypatch.setattr(reference, "label_logprobs", broken)
    with pytest.raises(UserError, match=r"no finite log-probability to \d+ tokens, first to one of row \d+ of .*pairs.jsonl"):
        case.compute()
    assert not (tmp_path / FILE).exists()
