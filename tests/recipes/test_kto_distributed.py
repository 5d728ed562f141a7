"""KTO as a whole: its baseline, where it starts, one curve however a step is cut, resume bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import problems, run_processes
from test_dpo_distributed import SHORT, STEPS, assert_same_run
from test_lora_single_device import log_records

from torchft.checks import KERNELS
from torchft.config import ASSETS, DataConfig, SourceConfig
from torchft.data.chat_template import load_template
from torchft.data.dataset import Dataset, build_dataset
from torchft.data.mismatched import mismatched
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import ConfigError, UserError
from torchft.fuse import swap
from torchft.parse import parse
from torchft.recipes import kto_distributed as recipe

TOKENIZER = load_tokenizer(ASSETS / "tiny_llama")
TEMPLATE = load_template("", TOKENIZER)
RECOMPUTED = "model.activation_checkpointing=full"
PACKED = ["data.packing=true", "run.global_batch_size=4"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def options(model: Path, data: Path, out: Path, *more: str) -> recipe.Config:
    """5 steps of 8 answers, one a row, in 4 micro-batches, into a second epoch; 6 of 24 are held out."""
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 64, "data.valid_fraction": 0.25, "run.epochs": 2, "run.max_steps": STEPS}
    values |= {"lora.rank": 4, "lora.alpha": 12, "optim.lr": 0.01, "optim.warmup_steps": 2, "run.global_batch_size": 8}
    values |= {"run.micro_batch_size": 2, "run.max_new_tokens": 4, "run.sample_rows": 1, "run.eval_every": 3}
    values |= dict(text.split("=", 1) for text in more)
    return parse(recipe.Config, [f"{key}={value}" for key, value in values.items()])


def train(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    cfg = options(model, data, out, *more)
    codes = run_processes(processes, lambda _: recipe.main(cfg), out)
    assert codes == [0] * processes, problems(out)
    return out


@pytest.fixture(scope="module")
def straight(small_model: Path, verdict_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train(1, small_model, verdict_data, out, "run.save_every=1", "run.keep_last=9", "run.log_every=2")


def test_it_starts_at_one_half_and_learns(small_model: Path, verdict_data: Path, tmp_path: Path) -> None:
    """PITFALLS P1: every reward and the baseline are 0 at the start, so that each answer's loss is 1 - sigma(0)."""
    records = log_records(train(1, small_model, verdict_data, tmp_path))
    first = next(record for record in records if "loss" in record)
    assert abs(first["loss"] - 0.5) <= 1e-6 and first["kl"] == 0 and first["accuracy"] == 0.5
    assert abs(records[0]["valid_loss"] - 0.5) <= 1e-6
    last = [record for record in records if "loss" in record][-1]
    assert last["loss"] < 0.45 and last["margin"] > 0.1


def dataset(rows: list[tuple[str, str]]) -> Dataset:
    """Prompts and answers, all good."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps({"prompt": p, "completion": c, "label": True}) + "\n" for p, c in rows))
        file.flush()
        cfg = DataConfig(train=[SourceConfig(path=file.name)], max_seq_len=64)
        return build_dataset(cfg.train, cfg, TOKENIZER, TEMPLATE, kind="verdicts", use_cache=False, quiet=True)


def read(data: Dataset) -> list[tuple[str, str]]:
    """Each sample whole, and its targets."""
    found = []
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids, on = data.ids[start : start + length], np.append(False, data.supervised[start : start + length - 1])
        assert not data.supervised[start + length - 1]
        found.append(tuple(TOKENIZER.decode(part.tolist(), skip_special=False) for part in (ids, ids[on])))
    return found


def test_the_baseline_pairs_each_prompt_with_the_answer_before() -> None:
    """PITFALLS P5: never with its own, in a step of any size; cut to what a row holds."""
    data = dataset([("p0", "a"), ("p1", "b b"), ("p2", "c c c")])
    own = {sample: text.split("assistant\n") for sample, (text, _) in enumerate(read(data))}
    for samples in ([2, 0, 1], [1], [0, 0], [2]):
        others = [(s + 1) % 3 if o == s else o for s, o in zip(samples, np.roll(samples, 1), strict=True)]
        got = read(mismatched(data, np.array(samples), 64))
        assert got == [(f"{own[s][0]}assistant\n{own[o][1]}", own[o][1]) for s, o in zip(samples, others, strict=True)]
        assert all(s != o for s, o in zip(samples, others, strict=True))
    limit = int(data.lengths[0])
    cut = mismatched(data, np.array([0, 2]), limit)
    assert cut.lengths[0] == limit and cut.num_supervised[0] == data.num_supervised[0]
    with pytest.raises(UserError, match="KTO needs two rows or more"):
        mismatched(data.select(np.array([0])), np.array([0]), 64)


def test_the_baseline_pairs_no_prompt_with_another_answer_to_it() -> None:
    """As the two answers of a pair, which stand side by side in the data, and so in validation."""
    data = dataset([("p0", "a"), ("p0", "b b"), ("p1", "c"), ("p1", "d d"), ("p1", "e")])
    for samples, others in {(0, 1, 2, 3, 4): (4, 4, 1, 1, 1), (1, 3, 2): (2, 1, 1), (1,): (2,), (3, 4): (0, 0)}.items():
        answers = [answer for _, answer in read(mismatched(data, np.array(samples), 64))]
        assert answers == [read(data)[other][1] for other in others], samples
    one = data.select(np.array([2, 3, 4]))  # of one prompt: of another sample then
    assert [answer for _, answer in read(mismatched(one, np.array([0, 1]), 64))] == [read(one)[other][1] for other in (1, 0)]


def test_the_baseline_takes_no_gradient_and_is_never_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([torch.tensor([-3.0, 1.0]), torch.tensor([4.0, 1.0])])
    monkeypatch.setattr(recipe, "log_ratios", lambda model, batch: next(ratios).requires_grad_() * 1)
    batch = type("Batch", (), {"num_sequences": 2, "to": lambda self, device: self})()
    assert recipe.baseline(None, [batch], torch.device("cpu")) == 0
    kl = recipe.baseline(None, [batch], torch.device("cpu"))
    assert kl == 2.5 and not kl.requires_grad


@pytest.mark.parametrize("more", [["run.micro_batch_size=8"], ["run.micro_batch_size=1", RECOMPUTED]], ids="-".join)
def test_cutting_a_step_differently_changes_nothing(
    small_model: Path, verdict_data: Path, straight: Path, tmp_path: Path, more: list[str]
) -> None:
    """The baseline too is that of the whole step."""
    assert_same_run(train(1, small_model, verdict_data, tmp_path, "run.log_every=2", *more), straight)


@pytest.mark.parametrize("more", [["model.quantize=nf4"], PACKED, ["model.shard=1"]], ids=["qlora", "packed", "whole"])
def test_any_number_of_processes_gives_one_curve(
    small_model: Path, verdict_data: Path, tmp_path: Path, more: list[str]
) -> None:
    expected = train(1, small_model, verdict_data, tmp_path / "1", *SHORT, *more)
    processes = 4 if more == PACKED else 2
    assert_same_run(train(processes, small_model, verdict_data, tmp_path / "several", *SHORT, *more), expected)


def test_fused_blocks_of_a_divided_base_give_the_same_curve(
    small_model: Path, verdict_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three forwards a step, of the policy, its reference and mismatched answers; here without Triton."""
    monkeypatch.setattr(recipe, "fuse", lambda model, switches, device: swap(model, tuple(name for name in KERNELS if name != "lora")))
    expected = train(1, small_model, verdict_data, tmp_path / "1", *SHORT)
    assert_same_run(train(2, small_model, verdict_data, tmp_path / "2", *SHORT, "model.shard=all"), expected)


def test_a_resumed_run_is_the_same_bits(small_model: Path, verdict_data: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    out.mkdir()
    (out / "step_000003").symlink_to(straight / "step_000003")
    train(1, small_model, verdict_data, out, "run.resume=auto", "run.save_every=1", "run.keep_last=9", "run.log_every=2")
    for name in ("params.safetensors", "optimizer.safetensors"):
        last = f"step_{STEPS:06d}/{name}"
        assert (out / last).read_bytes() == (straight / last).read_bytes(), name
    assert log_records(out) == log_records(straight)[-len(log_records(out)) :]


def test_pairs_are_two_verdicts_each(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    train(1, small_model, pair_data, tmp_path, "data.max_seq_len=128", *SHORT)
    records = [record for record in log_records(tmp_path) if "loss" in record]
    assert records[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_what_does_not_go_together_is_refused(small_model: Path, verdict_data: Path, tmp_path: Path) -> None:
    for given, said in {"run.global_batch_size=1": "must be 2 or more", "lora.dropout=0.1": "without dropout"}.items():
        with pytest.raises(ConfigError, match=said):
            options(small_model, verdict_data, tmp_path, given)
