"""Every weight trained: one curve on any number of processes, transformers' curve, checkpoints in parts, the directory that comes out."""

import difflib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import fork, problems, run_processes
from safetensors.torch import load_file, save_file
from test_lora_distributed import assert_same_log
from test_lora_single_device import log_records, relative_error
from tiny_training import assert_same
from transformers import AutoModelForCausalLM

from torchft import parts
from torchft.adapter import probe_logits
from torchft.data.loader import Loader
from torchft.errors import ConfigError
from torchft.models import build_model
from torchft.modules import attention
from torchft.modules.sharding import whole
from torchft.names import RECIPES
from torchft.parse import parse
from torchft.ranks import rank
from torchft.recipes import full_finetune_distributed as recipe
from torchft.weights import load_weights

STEPS = 4


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def options(model: Path, data: Path, out: Path, *more: str) -> recipe.Config:
    """4 steps of 8 rows; on 4 processes validation has fewer rows than cells."""
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "run.epochs": 2, "run.max_steps": STEPS, "run.global_batch_size": 8}
    values |= {"optim.lr": 0.003, "optim.warmup_steps": 2, "data.valid_fraction": 0.25, "run.save_every": 2}
    values |= {"run.micro_batch_size": 2, "run.max_new_tokens": 4, "run.sample_rows": 1}
    values |= dict(text.split("=", 1) for text in more)
    return parse(recipe.Config, [f"{key}={value}" for key, value in values.items()])


def train(processes: int, model: Path, data: Path, out: Path, *more: str) -> Path:
    cfg = options(model, data, out, *more)
    codes = run_processes(processes, lambda _: recipe.main(cfg), out)
    assert codes == [0] * processes, problems(out)
    return out


def exported(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in (out / "model").glob("*.safetensors") for name, tensor in load_file(file).items()}


VARIANTS = {
    "plain": [],
    "accumulated": ["run.micro_batch_size=1"],
    "packed, recomputed": ["data.packing=true", "run.global_batch_size=4", "model.activation_checkpointing=full"],
    "two copies": ["model.shard=2"],
    "whole on each": ["model.shard=1"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_processes_gives_one_curve(small_model: Path, chat_data: Path, tmp_path: Path, variant: str) -> None:
    more = VARIANTS[variant]
    expected = train(1, small_model, chat_data, tmp_path / "1", *(text for text in more if "shard" not in text))
    for processes in {"plain": (2, 4), "two copies": (4,)}.get(variant, (2,)):
        out = train(processes, small_model, chat_data, tmp_path / f"{processes}", *more)
        assert_same_log(out, expected)
        # AdamW divides by the gradient's own size, so that rounding in a tiny one shows: looser than the gradients below
        assert relative_error(exported(out), exported(expected)) <= 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_and_their_norm_are_those_of_one_process(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """What the second step's optimizer sees, clipped, with accumulation on one process and less of it on more."""
    model, results = tied_copy(small_model, tmp_path) if tied else small_model, {}
    for processes in (1, 2, 4):
        original, steps, file = recipe.norm_and_check, [], tmp_path / f"{processes}.pt"

        def spy(params: dict, max_norm: float, loss: torch.Tensor, original=original, steps=steps, file=file) -> tuple:
            norm, found_inf, clip = original(params, max_norm, loss)
            steps.append({name: clip * whole(param.grad) for name, param in params.items()} | {"norm": norm, "loss": loss})
            if len(steps) == 2 and rank() == 0:
                torch.save(steps[1], file)
            return norm, found_inf, clip

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "norm_and_check", spy)
            train(processes, model, chat_data, tmp_path / f"{processes}", "run.max_steps=2", "optim.max_grad_norm=0.1")
        results[processes] = torch.load(file)
    for processes in (2, 4):
        assert relative_error(results[processes], results[1]) <= 1e-5
    assert results[1]["norm"] > 0.1  # so that there was something to clip


def tied_copy(model: Path, tmp_path: Path) -> Path:
    """The same model with one table for both ends."""
    copy = tmp_path / "tied"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, copy / "model.safetensors")
    return copy


def test_the_curve_is_transformers_own(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 steps in fp32 on the same tokens: loss to 1e-4, and the weights that come out."""
    loaders: list[Loader] = []

    def kept(*args: object) -> Loader:
        loaders.append(Loader(*args))
        return loaders[-1]

    more = ["run.max_steps=30", "run.epochs=20", "data.valid_fraction=0", "run.save_every=0", "optim.weight_decay=0.1"]
    cfg = options(small_model, chat_data, tmp_path / "ours", *more)

    def run() -> None:
        recipe.Loader = kept
        recipe.main(cfg)
        losses = transformers_losses(small_model, loaders[0], cfg)
        (tmp_path / "losses.json").write_text(json.dumps(losses))

    assert fork(run) == 0  # the process groups of this run go with the child
    ours = [record["loss"] for record in log_records(tmp_path / "ours") if "loss" in record]
    assert ours == pytest.approx(json.loads((tmp_path / "losses.json").read_text()), abs=1e-4)
    assert len(ours) == 30 and ours[-1] < ours[0] - 1


def transformers_losses(path: Path, loader: Loader, cfg: recipe.Config) -> list[float]:
    """A training loop of its own around transformers' model: whole steps of padded rows, torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    decayed = [param for name, param in model.named_parameters() if param.ndim > 1 and "embed" not in name and "lm_head" not in name]
    others = [param for name, param in model.named_parameters() if param.ndim == 1 or "embed" in name or "lm_head" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr)
    losses = []
    for step in range(30):
        total, count = 0.0, 0
        for batch in loader.step(step):
            logits = model(input_ids=batch.input_ids).logits  # padding stands at the ends: nothing that counts sees it
            total = total + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
            )
            count += batch.num_supervised
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step, 30, cfg.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_comes_out(small_model: Path, chat_data: Path, tmp_path: Path, tied: bool) -> None:
    model = tied_copy(small_model, tmp_path) if tied else small_model
    out = train(2, model, chat_data, tmp_path / "out", "run.sample_rows=0")
    assert {name: t.shape for name, t in exported(out).items()} == {
        name: t.shape for name, t in load_file(model / "model.safetensors").items()
    }
    theirs, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = build_model(json.loads((out / "model/config.json").read_text()))
    load_weights(ours, out / "model", device="cpu", dtype=torch.float32)
    ids = torch.randint(ours.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))  # as probe_logits asks
    with torch.no_grad():
        assert (theirs(ids).logits - probe_logits(ours)).abs().max() <= 2e-5 * max(1, probe_logits(ours).std())
    before = load_file(model / "model.safetensors")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in exported(out).items())


def test_computing_in_bf16_keeps_fp32_weights(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """The curve stays near the fp32 one, steps smaller than bf16 can hold are not lost, and the result is bf16."""
    exact = train(1, small_model, chat_data, tmp_path / "fp32")
    out = train(2, small_model, chat_data, tmp_path / "bf16", "model.dtype=bfloat16", "optim.lr=1e-6")
    assert {tensor.dtype for tensor in exported(out).values()} == {torch.bfloat16}
    assert json.loads((out / "model/config.json").read_text())["torch_dtype"] == "bfloat16"
    losses = [[record["loss"] for record in log_records(path) if "loss" in record] for path in (out, exact)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3) and losses[0][0] != losses[1][0]
    kept = dcp_tensors(out / "step_000004")
    moved = [
        (kept[f"params/{name}"] - tensor).abs().mean().item()
        for name, tensor in load_file(small_model / "model.safetensors").items()
        if "proj" in name  # rows of an embedding that no token took do not move
    ]
    assert min(moved) > 1e-7  # where bf16 weights of 0.02 have steps of 6e-5


def dcp_tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in parts, put together without our own code."""
    reader = dcp.HuggingFaceStorageReader(str(step))
    shapes = reader.read_metadata().state_dict_metadata.items()  # random states among them
    mine = {name: info for name, info in shapes if name.startswith(("params/", "optimizer/"))}
    tensors = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in mine.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_resume_from_2_to_1_to_4_processes(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    expected = train(1, small_model, chat_data, tmp_path / "straight", "run.max_steps=6")
    out, stops = tmp_path / "moved", {2: 2, 1: 4, 4: 6}  # processes -> the step after which they are ended
    cfg = options(small_model, chat_data, out, "run.max_steps=6", "run.resume=auto")
    for processes, last in stops.items():
        codes = run_processes(processes, lambda _: dying_run(cfg, 3 if last < 6 else 9), out)  # noqa: B023
        assert codes == [0 if last == 6 else 9] * processes, problems(out)
    assert_same_log(out, expected)
    assert relative_error(exported(out), exported(expected)) <= 1e-3


def dying_run(cfg: recipe.Config, before: int) -> None:
    """Run, and leave without a word before the optimizer step of this process with that number, once the last save is whole."""
    original, calls = recipe.step_optimizer, 0
    writers = []

    class Watched(parts.PartsWriter):
        def __init__(self, out: Path) -> None:
            super().__init__(out)
            writers.append(self)

    def dying(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == before:
            writers[0].wait()
            torch.distributed.barrier()
            os._exit(9)
        original(*args)

    recipe.step_optimizer, recipe.PartsWriter = dying, Watched
    recipe.main(cfg)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_number_of_processes_continues_bit_for_bit(
    small_model: Path, chat_data: Path, tmp_path: Path, processes: int
) -> None:
    more = ("run.save_every=1", "run.resume=auto", "run.micro_batch_size=1")
    straight = train(processes, small_model, chat_data, tmp_path / "straight", *more)
    cfg, original = options(small_model, chat_data, tmp_path / "killed", *more), recipe.batch_loss

    def killed(number: int) -> None:
        calls = 0

        def dying(model: torch.nn.Module, batch: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 20 // processes and number == processes - 1:  # of 8 a step on one process
                os.kill(os.getpid(), signal.SIGKILL)
            return original(model, batch)

        recipe.batch_loss = dying
        recipe.main(cfg)

    codes = run_processes(processes, killed, tmp_path / "killed")
    assert codes[-1] == -signal.SIGKILL and 0 not in codes
    train(processes, small_model, chat_data, tmp_path / "killed", *more)
    files = sorted(path.name for path in (straight / "step_000004").glob("*.safetensors"))
    assert len(files) == processes + 1
    for name in files:
        one, other = (tmp_path / run / "step_000004" / name for run in ("straight", "killed"))
        assert_same(load_file(one), load_file(other))  # the library writes its header in no particular order
    assert log_records(tmp_path / "killed") == log_records(straight)
    ours, theirs = exported(tmp_path / "killed"), exported(straight)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_signal_to_one_process_stops_all_after_the_step(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    cfg, original = options(small_model, chat_data, tmp_path), recipe.batch_loss

    def work(number: int) -> None:
        def signalled(model: torch.nn.Module, batch: object) -> torch.Tensor:
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(model, batch)

        recipe.batch_loss = signalled
        recipe.main(cfg)

    assert run_processes(2, work, tmp_path) == [128 + signal.SIGTERM] * 2, problems(tmp_path)
    assert (tmp_path / "step_000001/manifest.json").exists()  # whole before the processes left


def test_the_best_step_is_exported(small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, original = iter([1.0, 2.0, 2.0, 2.0]), recipe.evaluate

    def best_first(model: torch.nn.Module, batches: object, device: torch.device) -> float:
        original(model, batches, device)
        return next(losses)

    monkeypatch.setattr(recipe, "evaluate", best_first)
    out = train(2, small_model, chat_data, tmp_path, "run.eval_every=1", "run.keep_best=true")
    kept, ours = dcp_tensors(out / "step_000001"), exported(out)
    assert all(torch.equal(tensor, kept[f"params/{name}"]) for name, tensor in ours.items())
    assert not torch.equal(ours["lm_head.weight"], dcp_tensors(out / "step_000004")["params/lm_head.weight"])


def test_4_bits_and_adapters_are_refused_by_name(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.quantize stores weights that are not trained"):
        options(small_model, chat_data, tmp_path, "model.quantize=nf4")
    with pytest.raises(ConfigError, match="lora.rank is not an option"):
        options(small_model, chat_data, tmp_path, "lora.rank=4")


def test_it_differs_from_the_lora_recipe_in_what_is_trained_alone() -> None:
    """The loop, the data and the set-up are the same lines (D2), but for adapters, the way of saving, and the result."""
    texts = [(RECIPES / f"{name}.py").read_text() for name in ("lora_distributed", "full_finetune_distributed")]
    lora, full = (text[text.index("import math") :].splitlines() for text in texts)
    changed = [line for line in difflib.ndiff(lora, full) if line[:2] in ("- ", "+ ")]
    added = [line[2:].strip() for line in changed if line[0] == "+"]
    about = ("import", "tune run", "OptimConfig", "Train all", "# ", "new_rows", "home", "load_tokenizer", "load_template", "dtype", "parts", "writer", "save_model", "updates", "micro_loss", "kept", "optimizer", "norm_and_check")
    assert [line for line in added if not any(words in line for words in (*about, "saved", "try it", "else:"))] == []
    assert len(added) <= 46 and len(changed) <= 98


def test_rope_stays_exact_in_bf16(small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M1: the angles' tables reach the blocks in fp32, whatever the blocks compute in."""
    seen, original = [], attention.apply_rope

    def spy(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: object) -> torch.Tensor:
        seen.append((x.dtype, cos.dtype, sin.dtype))
        return original(x, cos, sin, *more)

    cfg = options(small_model, chat_data, tmp_path, "model.dtype=bfloat16", "run.max_steps=1", "model.activation_checkpointing=full")

    def work(_: int) -> None:
        monkeypatch.setattr(attention, "apply_rope", spy)
        recipe.main(cfg)
        assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}

    assert run_processes(1, work, tmp_path) == [0], problems(tmp_path)


@pytest.mark.parametrize("name, dtype", [("adamw", "float32"), ("adamw_bf16", "bfloat16")])
def test_a_step_in_backward_is_the_ordinary_step(
    small_model: Path, chat_data: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    """Bit for bit, without any gradient left over; also where FSDP2 computes in bf16 over fp32 weights."""
    more = [f"optim.name={name}", "optim.max_grad_norm=0", "run.micro_batch_size=8", f"model.dtype={dtype}"]
    for kept in {dtype, "bfloat16"}:
        outs = [tmp_path / kept / str(n) for n in (0, 1)]
        for out, in_backward in zip(outs, ("false", "true"), strict=True):
            train(1, small_model, chat_data, out, *more, f"model.dtype={kept}", f"optim.in_backward={in_backward}")
        ours, theirs = (exported(out) for out in outs)
        assert_same(ours, theirs)
        assert_same(*(dcp_tensors(out / "step_000004") for out in outs))
        logs = [log_records(out) for out in outs]
        for record, wanted in zip(*logs, strict=True):
            assert record == pytest.approx(wanted, rel=1e-5)  # the norm is summed in another order


def test_bf16_weights_rounded_stochastically(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """One curve on 1 and 2 processes up to bf16's noise, near the fp32 weights' own; half the bytes in the checkpoint."""
    runs = {
        "fp32": train(1, small_model, chat_data, tmp_path / "fp32", "model.dtype=bfloat16"),
        1: train(1, small_model, chat_data, tmp_path / "1", "model.dtype=bfloat16", "optim.name=adamw_bf16"),
        2: train(2, small_model, chat_data, tmp_path / "2", "model.dtype=bfloat16", "optim.name=adamw_bf16"),
    }
    losses = {name: [record["loss"] for record in log_records(out) if "loss" in record] for name, out in runs.items()}
    assert losses[1] == pytest.approx(losses["fp32"], rel=5e-3) and losses[2] == pytest.approx(losses[1], rel=5e-3)
    assert losses["fp32"][0] - losses["fp32"][-1] > 0.2  # far more than the runs differ by
    assert {t.dtype for name, t in dcp_tensors(runs[2] / "step_000004").items() if "step" not in name} == {torch.bfloat16}


def test_resume_of_bf16_weights_is_bitwise_on_any_number_of_processes(
    small_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    """The rounding's random bits follow from the step: nothing of a generator has to be put back."""
    more = ("model.dtype=bfloat16", "optim.name=adamw_bf16", "run.save_every=2")
    straight = train(2, small_model, chat_data, tmp_path / "straight", *more)
    cfg = options(small_model, chat_data, tmp_path / "killed", *more, "run.resume=auto")
    assert run_processes(2, lambda _: dying_run(cfg, 4), tmp_path / "killed") == [9, 9]
    assert run_processes(2, lambda _: recipe.main(cfg), tmp_path / "killed") == [0, 0], problems(tmp_path / "killed")
    assert_same(exported(tmp_path / "killed"), exported(straight))


@pytest.mark.parametrize(
    "more, message",
    [
        (["optim.name=adamw_bf16", "model.dtype=float32"], "adamw_bf16, which keeps weights in bf16"),
        (["optim.in_backward=true"], "optim.in_backward and optim.max_grad_norm cannot go together"),
        (["optim.in_backward=true", "optim.max_grad_norm=0"], "optim.in_backward and run.micro_batch_size cannot go together"),
    ],
)
def test_optimizers_that_cannot_be_are_refused_by_name(
    small_model: Path, chat_data: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        options(small_model, chat_data, tmp_path, *more)


def test_names_in_a_checkpoint_depend_on_nothing_but_the_model(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """K11: recomputed, divided and computed in bf16, or none of it."""
    more = ["run.max_steps=1", "run.save_every=1", "run.sample_rows=0", "data.valid_fraction=0"]
    outs = [
        train(1, small_model, chat_data, tmp_path / "plain", *more, "optim.name=adamw_bf16", "model.dtype=bfloat16"),
        train(2, small_model, chat_data, tmp_path / "all", *more, "model.activation_checkpointing=full", "model.dtype=bfloat16"),
    ]
    names = [set(dcp_tensors(out / "step_000001")) for out in outs]
    weights = load_file(small_model / "model.safetensors").keys()
    states = {f"optimizer/{name}/{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names[0] == names[1] == states | {f"params/{name}" for name in weights}


def test_a_run_for_measuring_leaves_no_checkpoint(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """12 bytes a parameter at the end of a run with random weights, which nobody wants, would not fit on many disks."""
    more = ["model.weights=random", "run.save_every=0", "run.sample_rows=0"]
    out = train(1, small_model, chat_data, tmp_path, *more)
    assert len(log_records(out)) > STEPS and not list(out.glob("step_*")) and not (out / "model").exists()


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_fewer_rows_than_processes_never_hang(small_model: Path, chat_data: Path, tmp_path: Path, rows: int) -> None:
    """PITFALLS D1: on 4 processes, with as few rows to train and to validate."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chat_data.read_text().splitlines(keepends=True)[:rows]))
    more = ["run.max_steps=2", "run.global_batch_size=4", "run.save_every=0", "data.valid_fraction=0", f"data.valid={few}"]
    out = train(4, small_model, few, tmp_path / "out", *more)
    assert len([record for record in log_records(out) if "loss" in record]) == 2
