"""DPO with all weights trained: both kinds of reference, one curve, resume bit for bit, a run cut short before its first step."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from test_dpo_distributed import STEPS, train
from test_dpo_distributed import options as adapter_options
from test_full_finetune_distributed import dcp_tensors, exported
from test_lora_single_device import log_records, relative_error
from tiny_training import assert_same
from transformers import AutoModelForCausalLM

from torchft import reference
from torchft.errors import ConfigError
from torchft.recipes import dpo_distributed as recipe

FULL = ("lora.rank=0", "lora.alpha=32", "optim.lr=0.001")
KINDS = ("precomputed", "copy")
SAVING = ("run.save_every=1", "run.keep_last=9")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def train_all(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    return train(processes, model, data, out, *FULL, *more)


@pytest.fixture(scope="module")
def straight(small_model: Path, pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on one process with each kind of reference, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("full")
    return {kind: train_all(1, small_model, pair_data, folder / kind, f"dpo.reference={kind}", *SAVING) for kind in KINDS}


def assert_same_curve(out: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = log_records(out), log_records(expected)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_ln_2_and_learns(straight: dict[str, Path], kind: str) -> None:
    """PITFALLS P1, and what comes out is a model directory in which every weight has moved."""
    records = log_records(straight[kind])
    steps = [record for record in records if "lr" in record]
    assert abs(steps[0]["loss"] - math.log(2)) <= 1e-6 and abs(steps[0]["margin"]) <= 1e-6 and steps[0]["kl"] == 0
    assert abs(records[0]["valid_loss"] - math.log(2)) <= 1e-6 and records[0]["valid_accuracy"] == 0.5
    assert len(steps) == STEPS and steps[-1]["loss"] < steps[0]["loss"] - 0.08
    assert steps[-1]["margin"] > 0.2 and steps[-1]["kl"] > 0
    assert (straight[kind] / "reference.safetensors").exists() == (kind == "precomputed")
    assert not (straight[kind] / "adapter").exists()


def test_both_kinds_give_one_curve_which_begins_as_an_adapters(
    small_model: Path, pair_data: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    """Token by token the same numbers, so that the KL divergence is the same too."""
    assert_same_curve(straight["copy"], straight["precomputed"], 1e-6)
    adapter = train(1, small_model, pair_data, tmp_path, "run.max_steps=1", "run.sample_rows=0")
    for ours, theirs in zip(log_records(straight["copy"])[:2], log_records(adapter)[:2], strict=True):
        names = [name for name in ours if name not in ("lr", "grad_norm")]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_first_step_compares_equal_numbers(small_model: Path, pair_data: Path, tmp_path: Path, kind: str) -> None:
    """Packed, fp32 weights computed in bf16: the reference is taken in the very batches of the step and of the validation."""
    more = ("model.dtype=bfloat16", "data.packing=true", "data.max_seq_len=160", "run.global_batch_size=4", "run.max_steps=1")
    train_all(2, small_model, pair_data, tmp_path, f"dpo.reference={kind}", *more)
    before, first, *_ = log_records(tmp_path)
    assert before["valid_kl"] == first["kl"] == first["margin"] == 0 and first["grad_norm"] > 0
    assert {tensor.dtype for tensor in exported(tmp_path).values()} == {torch.bfloat16}


VARIANTS = {
    "precomputed": [],
    "copy": ["dpo.reference=copy", "run.max_steps=3"],
    "two copies of the model": ["model.shard=2", "run.max_steps=3"],
    "ipo, packed": ["dpo.loss=ipo", "dpo.beta=0.5", "data.packing=true", "run.global_batch_size=4", "data.max_seq_len=160"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_processes_gives_one_curve(
    small_model: Path, pair_data: Path, straight: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    more, expected = VARIANTS[variant], straight["precomputed"]
    if more:
        alone = [text for text in more if "shard" not in text]
        expected = train_all(1, small_model, pair_data, tmp_path / "1", *alone)
    for processes in {"precomputed": (2, 4), "two copies of the model": (4,)}.get(variant, (2,)):
        out = train_all(processes, small_model, pair_data, tmp_path / f"{processes}", *more)
        assert_same_curve(out, expected, 1e-5)
        assert relative_error(exported(out), exported(expected)) <= 1e-3  # AdamW divides by the gradient's own size


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_bits(
    small_model: Path, pair_data: Path, straight: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Also where the file of the reference is gone: it is made again before the trained weights are put back."""
    for step, with_file in ((2, True), (4, False)):
        out = tmp_path / f"from_{step}"
        out.mkdir()
        (out / f"step_{step:06d}").symlink_to(straight[kind] / f"step_{step:06d}")
        if with_file and kind == "precomputed":
            (out / reference.FILE).symlink_to(straight[kind] / reference.FILE)
        train_all(1, small_model, pair_data, out, "run.resume=auto", f"dpo.reference={kind}", *SAVING)
        assert_same(*(dcp_tensors(path / f"step_{STEPS:06d}") for path in (out, straight[kind])))
        assert_same(exported(out), exported(straight[kind]))
        resumed, whole = log_records(out), log_records(straight[kind])
        assert resumed == whole[len(whole) - len(resumed) :] and resumed


WAYS = {  # options of a run's first two steps, on 2 processes, and of the others, on 1
    "QLoRA": (["lora.rank=4", "optim.lr=0.01", "model.quantize=nf4"], ["model.shard=all"], ["model.shard=1"]),
    "all weights": ([], ["dpo.reference=copy"], ["dpo.reference=precomputed"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_on_other_processes(small_model: Path, pair_data: Path, tmp_path: Path, way: str) -> None:
    """With the other kind of reference, and with adapters, which are saved in parts too."""
    more, first, then = WAYS[way]
    more = [*more, "optim.schedule=constant", "run.resume=auto", "run.sample_rows=0", "run.eval_every=0"]
    expected = train_all(1, small_model, pair_data, tmp_path / "straight", *more)
    train_all(2, small_model, pair_data, tmp_path / "moved", *more, *first, "run.max_steps=2", "data.valid_fraction=0.25")
    out = train_all(1, small_model, pair_data, tmp_path / "moved", *more, *then)
    steps = [[record for record in log_records(path) if "lr" in record] for path in (out, expected)]
    assert len(steps[0]) == STEPS
    for record, wanted in zip(*steps, strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def killed_in_the_pass(cfg: recipe.Config, number: int) -> None:
    """Process 1 dies when it has computed half of its share."""
    original, calls = reference.label_logprobs, 0

    def dying(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if number == 1 and calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    reference.label_logprobs = dying
    recipe.main(cfg)


def test_a_pass_that_is_cut_short_starts_over(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "killed", (*FULL, "run.max_steps=3", "run.resume=auto")
    cfg = adapter_options(small_model, pair_data, out, *more)
    codes = run_processes(2, lambda number: killed_in_the_pass(cfg, number), out)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert not list(out.glob("reference*"))
    train(2, small_model, pair_data, out, *more)
    expected = train(2, small_model, pair_data, tmp_path / "straight", *more)
    assert log_records(out) == log_records(expected)
    assert_same(exported(out), exported(expected))
    assert_same(*(load_file(path / reference.FILE) for path in (out, expected)))


REFUSED = {
    "lora.rank=0 lora.alpha=16": "lora.alpha has no effect with lora.rank=0, which trains all weights",
    "lora.rank=0 lora.dropout=0.1": "lora.dropout has no effect with lora.rank=0",
    "lora.rank=0 lora.modules_to_save=[lm_head]": "lora.modules_to_save has no effect with lora.rank=0",
    "lora.rank=0 data.new_tokens=[a]": "data.new_tokens and lora.rank=0 cannot go together",
    "lora.rank=0 model.quantize=nf4": "model.quantize stores weights that are not trained, and here all are",
    "lora.rank=0 dpo.loss=simpo dpo.reference=copy": "dpo.reference has no effect on dpo.loss=simpo, which needs no reference",
    "dpo.reference=copy": "dpo.reference can be chosen only where all weights are trained",
    "lora.rank=0 dpo.reference=base": "dpo.reference is 'base'; the choices are auto, precomputed, copy",
    "optim.name=adamw_bf16": "optim.name is adamw_bf16, for models that are trained whole",
    "lora.rank=0 optim.in_backward=true": "optim.in_backward and optim.max_grad_norm cannot go together",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_does_not_go_together_is_refused_once(small_model: Path, pair_data: Path, given: str) -> None:
    values = [f"model.path={small_model}", f"data.train={pair_data}", "run.micro_batch_size=8", *given.split()]
    with pytest.raises(ConfigError, match=f"^command line: {REFUSED[given]}") as caught:
        recipe.parse(recipe.Config, values)
    assert "\n" not in str(caught.value), "one problem"


def test_the_best_step_is_exported(small_model: Path, pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, original = iter([9.0, 1.0, 2.0, 2.0]), recipe.evaluate
    monkeypatch.setattr(recipe, "evaluate", lambda *args: original(*args) | {"valid_loss": next(losses)})
    out = train_all(1, small_model, pair_data, tmp_path, "run.eval_every=1", "run.keep_best=true", "run.max_steps=3")
    best = dcp_tensors(out / "step_000001").items()
    assert_same(exported(out), {name.removeprefix("params/"): tensor for name, tensor in best if name.startswith("params/")})


def test_a_step_in_backward_is_the_ordinary_step(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    more = ("optim.max_grad_norm=0", "run.micro_batch_size=8", "run.max_steps=3", "run.sample_rows=0")
    ways = {way: (*more, f"optim.in_backward={way}") for way in ("false", "true")}
    assert_same(*(exported(train_all(1, small_model, pair_data, tmp_path / way, *ways[way])) for way in ways))


def test_a_loss_without_a_reference_makes_none(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    """In bf16 weights, rounded stochastically; transformers loads what comes out."""
    more = ("dpo.loss=simpo", "optim.name=adamw_bf16", "model.dtype=bfloat16", "run.max_steps=2", "run.sample_rows=0")
    out = train_all(1, small_model, pair_data, tmp_path, *more)
    assert not (out / reference.FILE).exists() and "kl" not in log_records(out)[1]
    _, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
