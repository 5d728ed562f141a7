"""The recipe as a whole: what it writes, that it can be stopped anywhere, that cutting a step differently changes nothing."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchft import activations
from torchft.activations import ActivationMemory, Memory
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.metrics import DETERMINISTIC_FIELDS
from torchft.modules import offload
from torchft.parse import parse
from torchft.recipes import lora_single_device as recipe

STEPS = 7


def options(model: Path, data: Path, out: Path, *more: str) -> recipe.Config:
    """A run of 7 steps: 4 of the first epoch's 24 rows, 6 a step in 3 micro-batches, and 3 of the second epoch's."""
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "run.epochs": 2, "run.max_steps": STEPS, "run.global_batch_size": 6}
    values |= {"lora.rank": 4, "lora.alpha": 12, "lora.dropout": 0.1, "optim.lr": 0.01, "optim.warmup_steps": 2}
    values |= {"run.micro_batch_size": 2, "run.max_new_tokens": 4, "run.sample_rows": 1}
    values |= dict(text.split("=", 1) for text in more)
    if "lora.adapter" in values:  # which decides these
        values = {key: value for key, value in values.items() if key not in ("lora.rank", "lora.alpha", "lora.dropout")}
    return parse(recipe.Config, [f"{key}={value}" for key, value in values.items()])


def log_records(out: Path) -> list[dict]:
    """The deterministic fields of the log."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in DETERMINISTIC_FIELDS if name in record} for record in records]


def test_run_trains_and_exports(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    recipe.main(options(small_model, chat_data, tmp_path, "data.valid_fraction=0.25", "run.eval_every=3"))
    losses = [record["loss"] for record in log_records(tmp_path) if "loss" in record]
    assert len(losses) == 6  # 18 of 24 rows are left: 3 steps an epoch
    assert losses[-1] < losses[0] - 0.1
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert all(tensor.abs().max() > 0 for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values())


def killed_run(cfg: recipe.Config, micro_batch: int) -> None:
    """Run the recipe and die without warning before its `micro_batch`-th forward."""
    gc.freeze()  # see tests/processes.py
    torch.set_num_threads(1)
    original, count = recipe.batch_loss, 0

    def dying(model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, batch)

    recipe.batch_loss = dying
    recipe.main(cfg)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_killed_anywhere_continues_bit_for_bit(small_model: Path, chat_data: Path, tmp_path: Path, optimizer: str) -> None:
    """Killed at a step's first micro-batch, in the middle of accumulation, around the epoch's end and twice in a row."""
    often = ("run.save_every=1", "run.resume=auto", "run.keep_last=1", f"optim.name={optimizer}")
    straight = tmp_path / "straight"
    recipe.main(options(small_model, chat_data, straight, *often))
    expected = {path.name: path.read_bytes() for path in (straight / f"step_{STEPS:06d}").iterdir()}
    context = multiprocessing.get_context("spawn" if optimizer == "adamw_8bit" else "fork")
    for points in [(1,), (5, 3), (12,), (14, 2)] if optimizer == "adamw" else [(8,)]:
        out = tmp_path / f"killed_{'_'.join(map(str, points))}"
        cfg = options(small_model, chat_data, out, *often)
        for point in points:
            child = context.Process(target=killed_run, args=(cfg, point))
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        recipe.main(cfg)
        for name in ("params.safetensors", "optimizer.safetensors", "rng.safetensors"):
            assert (out / f"step_{STEPS:06d}" / name).read_bytes() == expected[name], (points, name)
        assert log_records(out) == log_records(straight), points
        adapter = Path("adapter/adapter_model.safetensors")
        assert (out / adapter).read_bytes() == (straight / adapter).read_bytes()


def step_gradients(cfg: recipe.Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The gradients that the recipe's first step hands to clipping."""
    seen: dict[str, torch.Tensor] = {}
    original = recipe.clip_and_check

    def spy(params: dict[str, torch.nn.Parameter], max_norm: float, loss: torch.Tensor) -> tuple:
        seen.update({name: param.grad.clone() for name, param in params.items()} if not seen else {})
        return original(params, max_norm, loss)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "clip_and_check", spy)
        recipe.main(cfg)
    return seen


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ||g - g'|| / ||g'|| over the tensors; tiny ones are held against the norm of all (DESIGN D6)."""
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    largest = max(g.norm() for g in expected.values())
    errors = []
    for name, g in expected.items():
        scale = g.norm() if g.norm() >= 1e-6 * largest else total
        errors.append(((found[name] - g).norm() / scale).item())
    return max(errors)


@pytest.mark.parametrize("change", ["micro_batch_size=1", "micro_batch_size=4", "micro_batch_size=8", "packing", "checkpointing"])
def test_one_step_whatever_way_it_is_cut(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """8 rows of uneven length as 1, 2, 4 or 8 micro-batches, packed or recomputed: one gradient to 1e-5."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    base = ["lora.dropout=0", "run.global_batch_size=8", "run.max_steps=1", "data.max_seq_len=1024"]
    more = {
        "packing": ["data.packing=true", "run.global_batch_size=1"],
        "checkpointing": ["model.activation_checkpointing=full", "model.offload=[activations]"],
    }.get(change, [f"run.{change}"])
    if change == "packing":  # the whole data as one packed row, against all of it as rows of their own
        base[1] = "run.global_batch_size=24"
    expected = step_gradients(options(small_model, chat_data, tmp_path / "a", *base), monkeypatch)
    # B starts at zero, so A has no gradient yet: what is compared are the gradients of B
    expected = {name: g for name, g in expected.items() if "lora_B" in name}
    found = step_gradients(options(small_model, chat_data, tmp_path / "b", *base, *more), monkeypatch)
    assert expected and relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("room, blocks", [(-1, 2), (10**10, 0)])
def test_auto_decides_after_two_steps_and_changes_no_bit_of_the_log(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, blocks: int
) -> None:
    """As on a GPU with that much room. With dropout, whose masks are drawn again where a block is recomputed."""
    recipe.main(options(small_model, chat_data, tmp_path / "none"))
    monkeypatch.setattr(activations, "read_memory", lambda device: Memory(0, 10**9, 0, 10**9 + room, 0))
    on_gpu = lambda model, cfg, data, run, device, log: ActivationMemory(model, cfg, data, run, torch.device("cuda"), log)  # noqa: E731
    monkeypatch.setattr(recipe, "ActivationMemory", on_gpu)
    recipe.main(options(small_model, chat_data, tmp_path / "auto", "model.activation_checkpointing=auto"))
    assert log_records(tmp_path / "auto") == log_records(tmp_path / "none")
    records = [json.loads(line) for line in (tmp_path / "auto/log.jsonl").read_text().splitlines()]
    counts = [record["recomputed_blocks"] for record in records if "tokens_per_s" in record]
    assert counts == [1, 1, *[blocks] * (STEPS - 2)]


def test_stop_signal_saves_and_exits(small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = recipe.batch_loss

    def terminate(model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch)

    monkeypatch.setattr(recipe, "batch_loss", terminate)
    with pytest.raises(SystemExit) as exit_info:
        recipe.main(options(small_model, chat_data, tmp_path))
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "step_000002/manifest.json").exists()


def test_not_finite_stops_the_run_and_names_the_step(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = recipe.batch_loss

    def poisoned(model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(model, batch) * (float("nan") if calls == 8 else 1.0)  # in step 3

    monkeypatch.setattr(recipe, "batch_loss", poisoned)
    with pytest.raises(ValueError, match="step 3"):
        recipe.main(options(small_model, chat_data, tmp_path, "run.save_every=1"))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000001", "step_000002"]


@pytest.mark.parametrize(
    "more",
    [
        ["model.quantize=nf4"],
        ["lora.dora=true"],
        ["lora.rslora=true", "lora.modules_to_save=[embed_tokens,lm_head]"],
        ["data.new_tokens=['<|a|>','<|b|>']"],
        ["model.dtype=bfloat16", "data.packing=true"],
    ],
    ids=lambda more: more[0],
)
def test_variants_train(small_model: Path, chat_data: Path, tmp_path: Path, more: list[str]) -> None:
    recipe.main(options(small_model, chat_data, tmp_path, *more))
    losses = [record["loss"] for record in log_records(tmp_path) if "loss" in record]
    assert losses[-1] < losses[0]


def test_continues_from_an_adapter(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """A second run that starts from the first one's adapter begins where that one ended, with its rank."""
    recipe.main(options(small_model, chat_data, tmp_path / "a"))
    recipe.main(options(small_model, chat_data, tmp_path / "b", f"lora.adapter={tmp_path / 'a/adapter'}"))
    first, second = ([r["loss"] for r in log_records(tmp_path / name) if "loss" in r] for name in ("a", "b"))
    assert second[0] < first[0] - 0.1


def test_keep_best_exports_the_lowest_validation_loss(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation losses 3, 1, 2, ... the second step's parameters are kept although newer ones push it out, and exported."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(recipe, "evaluate", lambda *_: next(losses))
    more = ["data.valid_fraction=0.25", "run.eval_every=1", "run.keep_best=true", "run.keep_last=1"]
    recipe.main(options(small_model, chat_data, tmp_path, *more))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000006"]
    kept = load_file(tmp_path / "step_000002/params.safetensors")
    exported = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(exported["base_model.model." + name], tensor) for name, tensor in kept.items())


def test_an_interrupted_scoring_does_not_cost_the_export(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers at the end may take minutes; the adapter is saved and verified before them."""

    def exact_match(*_: object, **__: object) -> tuple[float, list]:
        if list(tmp_path.glob("step_*")):  # not before training
            raise KeyboardInterrupt
        return 0.0, []

    monkeypatch.setattr(recipe, "exact_match", exact_match)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(options(small_model, chat_data, tmp_path, "data.valid_fraction=0.25", "run.exact_match_rows=2"))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_a_chosen_template_and_added_tokens_go_with_the_adapter(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """ChatML's tokens are added; a second run continues from the adapter alone and passes tokenizer and template on."""
    chatml = ("data.chat_template=chatml", "data.new_tokens=['<|im_start|>','<|im_end|>']")
    recipe.main(options(small_model, chat_data, tmp_path / "a", *chatml))
    first = tmp_path / "a/adapter"
    assert "<|im_start|>" in (first / "chat_template.jinja").read_text()
    recipe.main(options(small_model, chat_data, tmp_path / "b", f"lora.adapter={first}", "run.max_steps=2"))
    assert (tmp_path / "b/adapter/chat_template.jinja").read_bytes() == (first / "chat_template.jinja").read_bytes()
    assert load_tokenizer(tmp_path / "b/adapter").special_tokens["<|im_end|>"] == load_tokenizer(small_model).vocab_size + 1


def test_ids_beyond_the_model_are_refused_by_name(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """A tokenizer that knows a token more than the model has rows for."""
    copy = tmp_path / "model"
    shutil.copytree(small_model, copy)
    tokenizer = load_tokenizer(small_model)
    tokenizer.add_tokens(["<|start|>!"], "<|start|>!")
    tokenizer.save(copy)
    config = json.loads((copy / "config.json").read_text())
    assert config["vocab_size"] == load_tokenizer(copy).vocab_size - 1
    (copy / "template.jinja").write_text("{{ '<|start|>!' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    with pytest.raises(UserError, match="writes the id"):
        recipe.main(options(copy, chat_data, tmp_path / "out", f"data.chat_template={copy / 'template.jinja'}"))


def test_a_checkpoint_beyond_the_end_is_refused(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    recipe.main(options(small_model, chat_data, tmp_path))
    with pytest.raises(UserError, match="raise run.max_steps"):
        recipe.main(options(small_model, chat_data, tmp_path, "run.max_steps=3", "run.resume=auto"))


def test_changed_data_is_not_resumed(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """Neither other training rows nor other validation rows, though their paths are the same."""
    copies = {name: tmp_path / f"{name}.jsonl" for name in ("train", "valid")}
    for file in copies.values():
        shutil.copyfile(chat_data, file)
    more = (f"data.valid={copies['valid']}", "run.resume=auto", "run.max_steps=1")
    recipe.main(options(small_model, copies["train"], tmp_path / "out", *more))
    for name, file in copies.items():
        whole = file.read_text()
        file.write_text("".join(whole.splitlines(keepends=True)[1:]))
        with pytest.raises(UserError, match=f"another {'data' if name == 'train' else name} "):
            recipe.main(options(small_model, copies["train"], tmp_path / "out", *more))
        file.write_text(whole)
