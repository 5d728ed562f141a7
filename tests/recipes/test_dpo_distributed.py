"""DPO as a whole: where it starts, that cutting a step or a row differently changes nothing, one curve on any number of
processes, resume bit for bit; and the text it shares with lora_distributed.
"""

import difflib
import json
import math
import os
import signal
from pathlib import Path

import pytest
from processes import problems, run_processes
from safetensors.torch import load_file
from test_lora_single_device import log_records, relative_error
from tiny_training import assert_same

from torchft.checks import KERNELS
from torchft.errors import ConfigError
from torchft.fuse import swap
from torchft.losses import REFERENCE_FREE
from torchft.names import RECIPES
from torchft.parse import parse
from torchft.recipes import dpo_distributed as recipe

STEPS = 5
SHORT = ("run.max_steps=3", "run.sample_rows=0")
LOSSES = ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo", "cpo")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def options(model: Path, data: Path, out: Path, *more: str) -> recipe.Config:
    """5 steps of 8 pairs, one a row, in 4 micro-batches, into a second epoch; 6 of 24 pairs are held out."""
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "data.valid_fraction": 0.25, "run.epochs": 2, "run.max_steps": STEPS}
    values |= {"lora.rank": 4, "lora.alpha": 12, "optim.lr": 0.01, "optim.warmup_steps": 2, "run.global_batch_size": 8}
    values |= {"run.micro_batch_size": 2, "run.max_new_tokens": 4, "run.sample_rows": 1, "run.eval_every": 3}
    values |= dict(text.split("=", 1) for text in more)
    return parse(recipe.Config, [f"{key}={value}" for key, value in values.items()])


def train(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    cfg = options(model, data, out, *more)
    codes = run_processes(processes, lambda _: recipe.main(cfg), out)
    assert codes == [0] * processes, problems(out)
    return out


def assert_same_run(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, rewards, accuracies and validation to `tolerance`; the adapters alike."""
    ours, theirs = log_records(out), log_records(expected)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    adapters = [load_file(path / "adapter/adapter_model.safetensors") for path in (out, expected)]
    assert relative_error(*adapters) <= 1e-3  # AdamW divides by the gradient's own size


@pytest.fixture(scope="module")
def straight(small_model: Path, pair_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, with a checkpoint at every step, and a log that sums two steps."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train(1, small_model, pair_data, out, "run.save_every=1", "run.keep_last=9", "run.log_every=2")


def test_it_starts_at_ln_2_and_learns(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    """PITFALLS P1: policy and reference are one model at the start."""
    train(1, small_model, pair_data, tmp_path)
    records = log_records(tmp_path)
    first = next(record for record in records if "loss" in record)
    assert abs(first["loss"] - math.log(2)) <= 1e-6 and abs(first["margin"]) <= 1e-6
    assert abs(records[0]["valid_loss"] - math.log(2)) <= 1e-6 and records[0]["valid_accuracy"] == 0.5
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    last = next(record for record in reversed(records) if "loss" in record)
    assert last["margin"] > 0.1 and last["kl"] > 0
    assert last["rewards_chosen"] - last["rewards_rejected"] == pytest.approx(last["margin"], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(small_model: Path, pair_data: Path, tmp_path: Path, loss: str) -> None:
    """All pairs in every step, so that the losses can be compared."""
    own = {"robust": "dpo.label_smoothing=0.1", "simpo": "dpo.gamma=0.5", "ipo": "dpo.sft_weight=0.1"}
    whole = ("run.epochs=3", "run.global_batch_size=18", "run.micro_batch_size=9", "run.eval_every=0")
    train(1, small_model, pair_data, tmp_path, f"dpo.loss={loss}", own.get(loss, "dpo.beta=0.2"), *whole, *SHORT)
    records = [record for record in log_records(tmp_path) if "loss" in record]
    assert records[2]["loss"] < records[1]["loss"] < records[0]["loss"]
    assert ("kl" in records[0]) == (loss not in REFERENCE_FREE)


CUT = {
    "one micro-batch": ["run.micro_batch_size=8"],
    "pair by pair": ["run.micro_batch_size=1"],
    "recomputed": ["model.activation_checkpointing=full"],
}


@pytest.mark.parametrize("variant", CUT)
def test_cutting_a_step_differently_changes_nothing(
    small_model: Path, pair_data: Path, straight: Path, tmp_path: Path, variant: str
) -> None:
    assert_same_run(train(1, small_model, pair_data, tmp_path, *CUT[variant], "run.log_every=2"), straight)


VARIANTS = {
    "lora": [],
    "packed": ["data.packing=true", "run.global_batch_size=4", "data.max_seq_len=160"],
    "qlora, whole": ["model.quantize=nf4", "model.shard=1"],
    "orpo": ["dpo.loss=orpo"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_processes_gives_one_curve(small_model: Path, pair_data: Path, tmp_path: Path, variant: str) -> None:
    more = (*SHORT, *VARIANTS[variant])
    expected = train(1, small_model, pair_data, tmp_path / "1", *more)
    for processes in (2, 4) if variant == "packed" else (2,):
        assert_same_run(train(processes, small_model, pair_data, tmp_path / f"{processes}", *more), expected)


def test_fused_blocks_of_a_divided_base_give_the_same_curve(
    small_model: Path, pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their matrices hold the policy's adapters and the reference's by turns; here without Triton."""
    monkeypatch.setattr(recipe, "fuse", lambda model, switches, device: swap(model, tuple(name for name in KERNELS if name != "lora")))
    expected = train(1, small_model, pair_data, tmp_path / "1")
    assert_same_run(train(2, small_model, pair_data, tmp_path / "2", "model.shard=all"), expected)
    assert_same_run(train(2, small_model, pair_data, tmp_path / "again", "model.shard=all", "model.activation_checkpointing=full"), expected)


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_is_the_same_bits(small_model: Path, pair_data: Path, straight: Path, tmp_path: Path, step: int) -> None:
    """Also where the log sums two steps and the run was stopped between them."""
    out = tmp_path / "resumed"
    more = ("run.save_every=1", "run.keep_last=9", "run.log_every=2")
    (out / f"step_{step:06d}").parent.mkdir(parents=True)
    (out / f"step_{step:06d}").symlink_to(straight / f"step_{step:06d}")
    train(1, small_model, pair_data, out, "run.resume=auto", *more)
    last = f"step_{STEPS:06d}"
    names = [path.name for path in (straight / last).glob("*.safetensors")]
    assert len(names) == 2  # of the one process, and the generators
    for name in names:
        assert_same(load_file(out / last / name), load_file(straight / last / name))
    resumed, whole = log_records(out), log_records(straight)
    assert resumed == whole[len(whole) - len(resumed) :] and resumed


def train_until(last: int, cfg: recipe.Config) -> None:
    """Train on, as one of the processes, which all get a signal after two steps unless the run is over by then."""
    steps, original = [], recipe.step_optimizer

    def counted(*arguments: object) -> None:
        original(*arguments)
        steps.append(arguments)
        if len(steps) == 2 and last < STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe.step_optimizer = counted
    recipe.main(cfg)


def test_it_goes_on_from_whole_adapters_on_2_processes_to_1_to_divided_ones(
    small_model: Path, pair_data: Path, straight: Path, tmp_path: Path
) -> None:
    """Each process wrote a share of the tensors that all of them held. The log sums two steps here as there."""
    parts = {}
    for processes, shard, last in ((2, "1", 2), (1, "auto", 4), (2, "all", STEPS)):
        cfg = options(small_model, pair_data, tmp_path, "run.resume=auto", "run.log_every=2", f"model.shard={shard}")
        codes = run_processes(processes, lambda _: train_until(last, cfg), tmp_path)  # noqa: B023
        assert codes == [0 if last == STEPS else 128 + signal.SIGTERM] * processes, problems(tmp_path)
        parts[last] = sorted(path.name[:11] for path in (tmp_path / f"step_{last:06d}").glob("shard-*"))
    assert parts == {2: ["shard-00001", "shard-00002"], 4: ["shard-00001"], STEPS: ["shard-00001", "shard-00002"]}
    assert_same_run(tmp_path, straight)


REFUSED = {
    "lora.dropout=0.1": "compared without dropout",
    "lora.modules_to_save=[lm_head]": "cannot be trained here: the reference is the base model",
    "data.new_tokens=[<|a|>]": "cannot be trained here",
    "dpo.loss=ipo dpo.label_smoothing=0.1": "has no effect on dpo.loss=ipo",
    "dpo.gamma=1": "has no effect on dpo.loss=sigmoid",
    "dpo.loss=orpo dpo.sft_weight=1": "dpo.loss=orpo has one",
    "dpo.loss=ppo": "the choices are sigmoid, robust",
    "dpo.beta=0": "accepted are 1e-06 to 1000.0",
    "dpo.label_smoothing=0.5": "accepted are 0.0 to 0.49",
    "dpo.model=x": "is not an option",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_does_not_go_together_is_refused(small_model: Path, pair_data: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[given]):
        options(small_model, pair_data, tmp_path, *given.split())


def test_an_adapter_to_train_further_is_no_reference(small_model: Path, pair_data: Path, straight: Path) -> None:
    values = [f"model.path={small_model}", f"data.train={pair_data}", f"lora.adapter={straight / 'adapter'}"]
    with pytest.raises(ConfigError, match=r"merge it first \(tune merge\)"):
        parse(recipe.Config, values)
    assert parse(recipe.Config, [*values, "dpo.loss=simpo"]).dpo.loss == "simpo"


def test_other_data_is_refused(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    cfg = options(small_model, chat_data, tmp_path)
    assert run_processes(1, lambda _: recipe.main(cfg), tmp_path) == [1]
    assert "which fit no format (preference: prompt, chosen, rejected or" in problems(tmp_path)


CHANGED = ("loss", "train_batch", "divisor =", "build_datasets(", "log.begin(", "cells", "held_out", "# ----")  # what each copy may say otherwise
ANSWERS = ("build_model(", "rows_at_once", "answering", "samples", "scored", "accuracy", "log.paused()", "show(", "new_ids")
COPIES = {  # (original, copy) -> lines taken away, lines added, and the words of one of which each line taken away has one
    ("lora", "kto"): (12, 20, CHANGED),
    ("lora", "reward"): (29, 20, (*CHANGED, *ANSWERS, "freeze_old_rows", "log.print(", "balance_routers")),
}


def main_of(name: str) -> list[str]:
    text = (RECIPES / f"{name}_distributed.py").read_text()
    return text[text.index("def main(") :].splitlines()


@pytest.mark.parametrize("original, copy", COPIES)
def test_main_is_the_other_recipes_but_for_what_it_trains(original: str, copy: str) -> None:
    """Every line of one `main` stands in the other, but for these; see D2."""
    changed = [line for line in difflib.ndiff(main_of(original), main_of(copy)) if line[:2] in ("- ", "+ ")]
    removed = [line[2:].strip() for line in changed if line[0] == "-"]
    most_removed, most_added, about = COPIES[original, copy]
    assert len(removed) <= most_removed and len(changed) - len(removed) <= most_added
    assert [line for line in removed if not any(words in line for words in about)] == []


PARTING = ("backward", "dtype", "load_", "save_", "divide(", "sync_gradients", "clip_and_check", "optimizer", "weights", "new_rows")


def test_main_trains_an_adapter_as_one_recipe_and_all_weights_as_the_other() -> None:
    """Its lines, in their order, are those of the two, but for the pairs, their reference, and where the two part."""
    ours, lora, full = ([line.strip() for line in main_of(name)] for name in ("dpo", "lora", "full_finetune"))
    assert len([line for line in ours if line not in (*lora, *full)]) <= 36
    for other, most in ((lora, 27), (full, 28)):
        removed = [line[2:] for line in difflib.ndiff(other, ours) if line[:2] == "- "]
        assert len(removed) <= most
        assert [line for line in removed if not any(words in line for words in (*CHANGED, *PARTING, "all recipes", '"""'))] == []


def test_the_adapter_says_what_it_is(straight: Path) -> None:
    config = json.loads((straight / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 12, "LORA")
