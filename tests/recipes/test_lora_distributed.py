"""The same options on 1, 2 and 4 processes: one curve, one gradient, one adapter; and what happens when one of them ends."""

import difflib
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from safetensors.torch import load_file, save_file
from test_lora_single_device import log_records, options, relative_error

from torchft.checks import KERNELS
from torchft.errors import ConfigError
from torchft.fuse import swap
from torchft.modules.lora import trainable_parameters
from torchft.modules.sharding import whole
from torchft.names import RECIPES
from torchft.ranks import rank
from torchft.recipes import lora_distributed, lora_single_device

# 24 rows of uneven length, 8 a step; on 4 processes validation has fewer rows than cells
BASE = ("lora.dropout=0", "run.global_batch_size=8", "data.valid_fraction=0.25", "run.max_steps=4", "run.save_every=2")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def train(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    """Run the recipe, the single-device one on 0 processes."""
    cfg = options(model, data, out, *BASE, *more)
    if processes == 0:
        lora_single_device.main(cfg)
    else:
        codes = run_processes(processes, lambda _: lora_distributed.main(cfg), out)
        assert codes == [0] * processes, problems(out)
    return out


def assert_same_log(out: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms and validation to `tolerance` relative, the same step, lr and tokens."""
    ours, theirs = log_records(out), log_records(expected)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=tolerance)


def assert_same_run(out: Path, expected: Path) -> None:
    """The same log, and adapters alike."""
    assert_same_log(out, expected)
    adapters = [load_file(path / "adapter/adapter_model.safetensors") for path in (out, expected)]
    # AdamW divides by the gradient's own size, so that rounding in a tiny one shows: looser than the gradients below
    assert relative_error(*adapters) <= 1e-3


VARIANTS = {
    "lora": [],
    "accumulated": ["run.micro_batch_size=1"],
    "packed": ["data.packing=true", "run.global_batch_size=4", "data.max_seq_len=64"],
    "qlora": ["model.quantize=nf4"],
    "dora": ["lora.dora=true"],
    "added tokens": ["data.new_tokens=['<|a|>','<|b|>']"],
    "whole tables": ["lora.modules_to_save=[embed_tokens,lm_head]", "model.activation_checkpointing=full"],
    "whole": ["model.shard=1"],
    "two copies": ["model.shard=2", "model.quantize=nf4"],
    "smallest": ["model.quantize=nf4_int8_head", "model.offload=[embeddings,activations]", "model.activation_checkpointing=full"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_processes_gives_one_curve(small_model: Path, chat_data: Path, tmp_path: Path, variant: str) -> None:
    more = VARIANTS[variant]
    expected = train(0, small_model, chat_data, tmp_path / "0", *(text for text in more if "shard" not in text))
    for processes in {"lora": (1, 2, 4), "qlora": (2, 4), "two copies": (4,), "smallest": (1, 2)}.get(variant, (2,)):
        assert_same_run(train(processes, small_model, chat_data, tmp_path / f"{processes}", *more), expected)


@pytest.mark.parametrize("more", [["model.shard=all"], ["model.shard=1"], ["model.shard=all", "model.quantize=nf4"]], ids="-".join)
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_fused_blocks_give_the_same_curve_divided(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], recomputed: str
) -> None:
    """A base that stays is re-laid, a divided one is put into the folded matrix while it is gathered; here without Triton."""
    options_of = [*(text for text in more if "shard" not in text), f"model.activation_checkpointing={recomputed}"]
    expected = train(0, small_model, chat_data, tmp_path / "0", *options_of)
    plain = tuple(name for name in KERNELS if name != "lora")
    monkeypatch.setattr(lora_distributed, "fuse", lambda model, switches, device: swap(model, plain))
    out = train(2, small_model, chat_data, tmp_path / "2", *more, f"model.activation_checkpointing={recomputed}")
    assert_same_run(out, expected)


@pytest.mark.parametrize("variant", ["lora", "qlora", "packed"])
def test_gradients_and_their_norm_are_those_of_one_process(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """What the second step's optimizer sees, clipped: A has a gradient by then."""
    results = {}
    for processes in (0, 2, 4):
        recipe, file = lora_distributed if processes else lora_single_device, tmp_path / f"{processes}.pt"
        original, steps = recipe.clip_and_check, []

        def spy(params: dict, max_norm: float, loss: torch.Tensor, original=original, steps=steps, file=file) -> tuple:
            norm, found_inf = original(params, max_norm, loss)
            steps.append({name: whole(param.grad).clone() for name, param in params.items()} | {"norm": norm, "loss": loss})
            if len(steps) == 2 and rank() == 0:
                torch.save(steps[1], file)
            return norm, found_inf

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "clip_and_check", spy)
            train(processes, small_model, chat_data, tmp_path / f"{processes}", "run.max_steps=2", "optim.max_grad_norm=0.1", *VARIANTS[variant])
        results[processes] = torch.load(file)
    for processes in (2, 4):
        assert relative_error(results[processes], results[0]) <= 1e-5
    assert results[0]["norm"] > 0.1  # so that there was something to clip


@pytest.mark.parametrize("processes, shard", [(1, "auto"), (2, "1"), (2, "all")])
def test_the_best_step_is_exported(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shard: str
) -> None:
    """What a forward without gradients left gathered must not be exported in place of what was loaded."""

    def best_first(model: torch.nn.Module, batches: object, device: torch.device) -> float:
        original(model, batches, device)
        return next(losses)

    for recipe, out in ((lora_single_device, "single"), (lora_distributed, "several")):
        original, losses = recipe.evaluate, iter([1.0, 2.0, 2.0, 2.0])
        more = [*BASE, "run.eval_every=1", "run.keep_best=true", "run.sample_rows=0"]
        cfg = options(small_model, chat_data, tmp_path / out, *more, *([f"model.shard={shard}"] if out == "several" else []))
        with monkeypatch.context() as patch:
            patch.setattr(recipe, "evaluate", best_first)
            if out == "single":
                recipe.main(cfg)
            else:
                codes = run_processes(processes, lambda _: recipe.main(cfg), tmp_path / out)  # noqa: B023
                assert codes == [0] * processes, problems(tmp_path / out)
    adapters = [load_file(tmp_path / out / "adapter/adapter_model.safetensors") for out in ("several", "single")]
    kept = load_file(tmp_path / "several/step_000001/params.safetensors")
    assert all(torch.equal(adapters[0]["base_model.model." + name], tensor) for name, tensor in kept.items())
    assert relative_error(*adapters) <= 1e-3


def test_what_cannot_work_on_several_processes_is_refused_first(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    for number, (option, message) in enumerate({
        "model.shard=3": "model.shard=3 does not divide 2 processes",
        "run.global_batch_size=3": "3 rows cannot be divided over 2 processes",
    }.items()):
        cfg, out = options(small_model, chat_data, tmp_path / "out", option), tmp_path / f"{number}"
        assert 0 not in run_processes(2, lambda _: lora_distributed.main(cfg), out)  # noqa: B023
        assert message in problems(out)
    with pytest.raises(ConfigError, match="model.shard=2 needs more processes than this one: start them with --nproc_per_node"):
        lora_distributed.main(options(small_model, chat_data, tmp_path / "out", "model.shard=2"))


def test_other_data_on_another_node_is_refused(
    small_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chat_data.read_text().splitlines(keepends=True)[::-1]))

    def work(number: int) -> None:
        lora_distributed.main(options(small_model, other if number else chat_data, tmp_path / "out"))

    assert 0 not in run_processes(2, work, tmp_path)
    assert "process(es) 1 read another data than process 0" in problems(tmp_path)


def test_other_options_on_another_node_are_refused(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """A run.out of its own is none of them: the first process alone writes."""

    def work(number: int) -> None:
        more = ["optim.lr=1e-5", "model.kernels={rope: eager}"] if number else []
        lora_distributed.main(options(small_model, chat_data, tmp_path / f"out_{number}", *more))

    assert 0 not in run_processes(2, work, tmp_path)
    said = problems(tmp_path)
    assert "process 1 was started with other options than process 0:\n  model.kernels.rope: 'eager' there, None on" in said
    assert "\n  optim.lr: 1e-05 there, 0." in said and "run.out" not in said


@pytest.mark.parametrize("shard", ["all", "1"])
def test_resume_from_2_to_1_to_4_processes(small_model: Path, chat_data: Path, tmp_path: Path, shard: str) -> None:
    """From adapters that are divided, or whole on each process; the 4 divide them."""
    expected = train(0, small_model, chat_data, tmp_path / "straight", "run.max_steps=6")
    out, cfg = tmp_path / "moved", ("run.max_steps=6", "run.resume=auto")
    stops = {2: 2, 0: 4, 4: 6}  # processes -> the step after which they are ended
    for processes, last in stops.items():
        recipe = lora_distributed if processes else lora_single_device
        original, calls = recipe.step_optimizer, []

        def dying(optimizer: object, found_inf: torch.Tensor, original=original, calls=calls, steps=2, last=last) -> None:
            if len(calls) == steps and last < 6:
                os._exit(9)
            calls.append(original(optimizer, found_inf))

        recipe.step_optimizer = dying
        try:
            more = {0: ()}.get(processes, (f"model.shard={shard if processes == 2 else 'all'}",))
            work = options(small_model, chat_data, out, *BASE, *cfg, *more)
            codes = run_processes(max(processes, 1), lambda _: recipe.main(work), out)  # noqa: B023
        finally:
            recipe.step_optimizer = original
        assert codes == [0 if last == 6 else 9] * max(processes, 1), problems(out)
    assert_same_run(out, expected)


@pytest.mark.parametrize("shard", ["all", "1"])
def test_the_same_number_of_processes_continues_bit_for_bit(
    small_model: Path, chat_data: Path, tmp_path: Path, shard: str
) -> None:
    """With dropout, whose masks differ from process to process; killed within an accumulated step."""
    more = (f"model.shard={shard}", "lora.dropout=0.1", "run.save_every=1", "run.resume=auto", "run.micro_batch_size=1")
    straight = train(2, small_model, chat_data, tmp_path / "straight", *more)
    cfg, original = options(small_model, chat_data, tmp_path / "killed", *BASE, *more), lora_distributed.batch_loss

    def killed(number: int) -> None:
        calls = 0

        def dying(model: torch.nn.Module, batch: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 10 and number == 1:  # of 4 a step
                os.kill(os.getpid(), signal.SIGKILL)
            return original(model, batch)

        lora_distributed.batch_loss = dying
        lora_distributed.main(cfg)

    codes = run_processes(2, killed, tmp_path / "killed")
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    train(2, small_model, chat_data, tmp_path / "killed", *more)
    for name in ("params.safetensors", "optimizer.safetensors", "rng.safetensors"):
        one, other = (tmp_path / run / "step_000004" / name for run in ("straight", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
    assert log_records(tmp_path / "killed") == log_records(straight)


@pytest.mark.parametrize("variant", ["dora", "added tokens", "whole tables"])
def test_whole_on_each_process_is_the_same_bits_on_all(small_model: Path, chat_data: Path, tmp_path: Path, variant: str) -> None:
    """Though each has seen other rows, and drawn other masks: nothing but the means of gradients keeps it so."""
    more = (*BASE, "model.shard=1", "run.micro_batch_size=1", "optim.max_grad_norm=0.1", "lora.dropout=0.1", *VARIANTS[variant])
    cfg, original = options(small_model, chat_data, tmp_path, *more), lora_distributed.save_adapter

    def work(number: int) -> None:
        def kept(model: torch.nn.Module, *args: object, **options: object) -> None:
            save_file({name: param.detach() for name, param in trainable_parameters(model).items()}, tmp_path / f"{number}.st")
            original(model, *args, **options)

        lora_distributed.save_adapter = kept
        lora_distributed.main(cfg)

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)
    assert (tmp_path / "0.st").read_bytes() == (tmp_path / "1.st").read_bytes()


def test_a_signal_to_one_process_stops_all_after_the_step(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    cfg, original = options(small_model, chat_data, tmp_path, *BASE), lora_distributed.batch_loss

    def work(number: int) -> None:
        def signalled(model: torch.nn.Module, batch: object) -> torch.Tensor:
            if number == 1 and batch.input_ids.shape[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(model, batch)

        lora_distributed.batch_loss = signalled
        lora_distributed.main(cfg)

    codes = run_processes(2, work, tmp_path)
    assert codes == [128 + signal.SIGTERM] * 2, problems(tmp_path)
    assert (tmp_path / "step_000001/manifest.json").exists()


@pytest.mark.parametrize("shard", ["all", "1"])
def test_not_finite_on_one_process_stops_all(small_model: Path, chat_data: Path, tmp_path: Path, shard: str) -> None:
    more = (*BASE, "run.save_every=1", f"model.shard={shard}")
    cfg, original = options(small_model, chat_data, tmp_path, *more), lora_distributed.batch_loss

    def work(number: int) -> None:
        calls = 0

        def poisoned(model: torch.nn.Module, batch: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return original(model, batch) * (float("nan") if (calls, number) == (5, 1) else 1.0)  # in step 3

        lora_distributed.batch_loss = poisoned
        lora_distributed.main(cfg)

    assert 0 not in run_processes(2, work, tmp_path)
    assert [problems(tmp_path).count(f"step {step}: the loss or gradient norm is not finite") for step in (2, 3)] == [0, 2]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000001", "step_000002"]


def test_a_process_alone_refuses_what_needs_several(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.shard=2 divides weights"):
        lora_single_device.main(options(small_model, chat_data, tmp_path, "model.shard=2"))
    with pytest.raises(ConfigError, match="peers: eager} is of weights on several processes"):
        lora_single_device.main(options(small_model, chat_data, tmp_path, "model.kernels={peers: eager}"))


def test_the_twins_differ_in_distribution_alone() -> None:
    """Every line of the single-device `main` stands in the distributed one, but for these; see D2."""
    texts = [(RECIPES / f"lora_{kind}.py").read_text() for kind in ("single_device", "distributed")]
    single, distributed = (text[text.index("import math") :].splitlines() for text in texts)
    changed = [line for line in difflib.ndiff(single, distributed) if line[:2] in ("- ", "+ ")]
    removed = [line[2:].strip() for line in changed if line[0] == "-"]
    assert len(removed) <= 12 and len(changed) - len(removed) <= 32
    about = ("process", "tune run", "# all recipes", "return loss", "build_datasets(", "Loader(", "train_batch(model", "stop.", "held_out")
    assert [line for line in removed if not any(words in line for words in about)] == []
