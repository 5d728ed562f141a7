"""Continuation bit for bit, what resume accepts and refuses, how it says so. Faults while writing: test_atomic.py."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_training import CONFIG, TinyRun, assert_same
from torch import Tensor, nn

from torchft.atomic import atomic_directory
from torchft.checkpoint import StopSignal, find_checkpoint, load_checkpoint, save_checkpoint
from torchft.errors import UserError
from torchft.modules.compiler import missing_compiler
from torchft.run_dir import FORMAT

MISSING = missing_compiler(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(bool(MISSING), reason=f"8-bit AdamW needs {MISSING}")
OPTIMIZERS = ["adamw", pytest.param("adamw_8bit", marks=needs_compiler)]


def save(run: TinyRun, out: Path, step: int, **changes: Any) -> Path:
    arguments = {"state": {"data": "abc", "log": {"sum": 0.1}}, "config": CONFIG, "keep_last": 9} | changes
    return save_checkpoint(out, step, params=run.params, optimizer=run.optimizer, **arguments)


def load(run: TinyRun, path: Path, **unchanged: Any) -> dict[str, Any]:
    return load_checkpoint(path, params=run.params, optimizer=run.optimizer, unchanged=unchanged)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continuing_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """PITFALLS K5. Stopped once after any step, or after every step: weights, moments and generators as if never."""
    expected = TinyRun(name).train(0, 6).snapshot()
    for stop in range(1, 6):
        path = save(TinyRun(name).train(0, stop), tmp_path / "once", stop)
        resumed = TinyRun(name, seed=99)
        assert load(resumed, path)["step"] == stop
        assert_same(resumed.train(stop, 6).snapshot(), expected)
    run = TinyRun(name)
    for step in range(6):
        path = save(run.train(step, step + 1), tmp_path / "often", step + 1)
        run = TinyRun(name, seed=step + 50)
        load(run, path)
    assert_same(run.snapshot(), expected)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    run = TinyRun().train(0, 2)
    before = run.snapshot()
    save(run, tmp_path, 2)
    assert_same(run.snapshot(), before)


def test_a_run_before_its_first_step_can_be_saved(tmp_path: Path) -> None:
    expected = TinyRun().train(0, 2).snapshot()
    path = save(TinyRun(), tmp_path, 0)
    resumed = TinyRun(seed=9).train(0, 1)  # has moments, which the load must take away
    load(resumed, path)
    assert_same(resumed.train(0, 2).snapshot(), expected)


def test_state_comes_back_and_holds_what_the_recipe_gave(tmp_path: Path) -> None:
    path = save(TinyRun().train(0, 1), tmp_path, 1)
    assert load(TinyRun(), path, data="abc") == {"data": "abc", "log": {"sum": 0.1}, "step": 1}
    with pytest.raises(UserError, match=r"step_000001 was saved with another data \('abc' then, 'xyz' now\)"):
        load(TinyRun(), path, data="xyz")


def test_names_do_not_depend_on_compile_or_wrappers(tmp_path: Path) -> None:
    """PITFALLS K11."""
    plain, wrapped = TinyRun().train(0, 1), TinyRun().train(0, 1)
    wrapped.params = dict(torch.compile(wrapped.model).named_parameters())
    assert all(name.startswith("_orig_mod.") for name in wrapped.params)
    first, second = save(plain, tmp_path / "a", 1), save(wrapped, tmp_path / "b", 1)
    for file in ("params.safetensors", "optimizer.safetensors"):
        assert saved_names(first / file) == saved_names(second / file)
    assert saved_names(second / "params.safetensors") == ["0.weight", "2.weight"]
    load(wrapped, first)
    load(plain, second)


def saved_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.weight": None}, "parameter 2.weight is in the checkpoint but not trained now"),
        ({"new": torch.zeros(2)}, "new is trained now but not in the checkpoint"),
        ({"2.weight": torch.zeros(32)}, r"2.weight is \(64,\).*\(32,\)"),
        ({"2.weight": torch.zeros(64).half()}, "2.weight is .*float32.*float16"),
    ],
)
def test_parameters_must_fit(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    """PITFALLS K4. And a refused load changes nothing."""
    path = save(TinyRun().train(0, 2), tmp_path, 2)
    run = TinyRun(seed=5).train(0, 1)
    before = run.snapshot()
    other = {name: param for name, param in run.params.items() if name not in change}
    other |= {name: nn.Parameter(tensor) for name, tensor in change.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        load_checkpoint(path, params=other, optimizer=run.optimizer, unchanged={})
    assert_same(run.snapshot(), before)


@needs_compiler
def test_the_optimizer_must_be_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optimizer AdamW: optim.name must stay"):
        load(TinyRun("adamw_8bit"), save(TinyRun().train(0, 1), tmp_path, 1))


def test_auto_takes_the_newest_that_verifies_and_says_what_it_skipped(tmp_path: Path) -> None:
    """PITFALLS K1."""
    said: list[str] = []
    run = TinyRun().train(0, 1)
    paths = {step: save(run, tmp_path, step) for step in (9, 100, 1_000_000)}
    assert paths[9].name == "step_000009" and paths[1_000_000].name == "step_1000000"
    (tmp_path / "step_2000000.tmp").mkdir()
    assert find_checkpoint(tmp_path, "auto", CONFIG, said.append) == paths[1_000_000]
    assert said == [
        f"resume: ignored {tmp_path}/step_2000000.tmp, which a crash cut short",
        f"resume: continuing {paths[1_000_000]} after step 1000000",
    ]
    flip_byte(paths[1_000_000] / "optimizer.safetensors", 500)
    (paths[100] / "rng.safetensors").unlink()
    said.clear()
    assert find_checkpoint(tmp_path, "auto", CONFIG, said.append) == paths[9]
    assert "step_1000000/optimizer.safetensors is damaged" in said[1] and "skipped" in said[1]
    assert "step_000100/rng.safetensors is missing" in said[2] and "skipped" in said[2]


def test_only_auto_starts_fresh_and_says_so(tmp_path: Path) -> None:
    """PITFALLS K13."""
    said: list[str] = []
    assert find_checkpoint(tmp_path / "out", "auto", CONFIG, said.append) is None
    assert said == [f"resume: no usable checkpoint in {tmp_path}/out, starting from the beginning"]
    assert find_checkpoint(tmp_path, "never", CONFIG, said.append) is None
    with pytest.raises(UserError, match="there is no checkpoint .*step_000007"):
        find_checkpoint(tmp_path, str(tmp_path / "step_000007"), CONFIG)


def test_an_explicit_checkpoint_must_verify(tmp_path: Path) -> None:
    path = save(TinyRun().train(0, 1), tmp_path / "old", 1)
    assert find_checkpoint(tmp_path / "new", str(path), CONFIG) == path
    with pytest.raises(UserError, match="is a run's directory: use run.out=.*old run.resume=auto"):
        find_checkpoint(tmp_path / "new", str(tmp_path / "old"), CONFIG)
    save(TinyRun().train(0, 1), tmp_path / "new", 1)
    with pytest.raises(UserError, match="new has checkpoints of its own"):
        find_checkpoint(tmp_path / "new", str(path), CONFIG)
    flip_byte(path / "params.safetensors", 300)
    with pytest.raises(UserError, match="params.safetensors is damaged"):
        find_checkpoint(tmp_path / "old", str(path), CONFIG)


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("run.max_steps", True),
        ("run.save_every", True),
        ("run.out", True),
        ("run.micro_batch_size", True),
        ("optim.lr", True),
        ("model.activation_checkpointing", True),
        ("run.seed", False),
        ("run.global_batch_size", False),
        ("optim.name", False),
        ("model.path", False),
        ("model.quantize", False),
        ("data.max_seq_len", False),
        ("data.train", False),
        ("lora.rank", False),
        ("dpo.beta", False),
    ],
)
def test_an_edited_config_is_listed_or_refused(key: str, allowed: bool, tmp_path: Path) -> None:
    """PITFALLS 2b: never silent."""
    group, name = key.split(".")
    config = {**CONFIG, group: {**CONFIG.get(group, {}), name: [1, 2]}}
    edited = {**config, group: {**config[group], name: [1, 3]}}
    save(TinyRun().train(0, 1), tmp_path, 1, config=config)
    said: list[str] = []
    if allowed:
        find_checkpoint(tmp_path, "auto", edited, said.append)
        assert said[1:] == [f"resume: changed {key}: [1, 2] -> [1, 3]"]
    else:
        with pytest.raises(UserError, match=rf"another value of\n  {key}: \[1, 2\] then, \[1, 3\] now"):
            find_checkpoint(tmp_path, "auto", edited, said.append)
    find_checkpoint(tmp_path, "auto", {**config, "run": {**config["run"], "resume": "auto"}}, said.append)


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["params.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_bomb_is_never_executed(name: str, legacy: bool, tmp_path: Path) -> None:
    """PITFALLS S3: not even where its manifest fits, as an attacker's would."""
    good = save(TinyRun().train(0, 1), tmp_path, 1)
    with atomic_directory(tmp_path / "step_000002", {"format": FORMAT, "step": 2, "valid_loss": None}, 0) as folder:
        for path in good.iterdir():
            if path.name not in (name, "manifest.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        torch.save(Bomb(tmp_path / "canary"), folder / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load(TinyRun(), tmp_path / "step_000002")
    assert not (tmp_path / "canary").exists()


def test_stop_signal_is_a_flag(capfd: pytest.CaptureFixture[str]) -> None:
    """PITFALLS K8. A launcher may send SIGTERM twice; the user's second Ctrl-C must work."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopSignal()
    assert stop.exit_code == 0
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        pytest.fail("a SIGTERM interrupted the step")
    assert stop.exit_code == 143
    assert capfd.readouterr().err == "\nSIGTERM: saving after this step; Ctrl-C to quit at once\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    stop.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130
    stop.close()


@pytest.mark.parametrize(
    "number, rank, failed, said",
    [
        (signal.SIGINT, 0, False, "\nSIGINT: saving after this step\n"),
        (signal.SIGTERM, 0, False, "\nSIGTERM: saving after this step, unless a process has failed\n"),
        (signal.SIGTERM, 0, True, ""),
        (signal.SIGTERM, 1, False, ""),
    ],
)
def test_of_several_processes_the_first_speaks_and_not_where_another_failed(
    number, rank, failed, said, tmp_path, monkeypatch, capfd
):
    """The launcher sends SIGTERM to the others when one has failed: nothing is saved then."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("TORCHELASTIC_ERROR_FILE", tmp_path / "0" / "error.json")):
        monkeypatch.setenv(name, str(value))
    if failed:
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "error.json").touch()
    stop = StopSignal()
    os.kill(os.getpid(), number)
    stop.close()
    assert (stop.exit_code, capfd.readouterr().err) == (128 + number, said)


def test_a_checkpoint_from_before_an_option_became_a_list_goes_on(tmp_path: Path) -> None:
    """model.offload: [activations] was model.offload_activations: true."""
    save(TinyRun().train(0, 1), tmp_path, 1, config={**CONFIG, "model": {**CONFIG.get("model", {}), "offload_activations": True}})
    now = {**CONFIG, "model": {**CONFIG.get("model", {}), "offload": ["activations"]}}
    assert find_checkpoint(tmp_path, "auto", now, lambda text: None) is not None


@pytest.mark.parametrize("tokens", [[], ["<|a|>"]])
def test_a_checkpoint_from_before_an_option_moved_goes_on(tokens: list[str], tmp_path: Path) -> None:
    """data.new_tokens was lora.new_tokens, and in full fine-tuning it did not exist."""
    old, new = {**CONFIG, "lora": {"new_tokens": tokens}}, {**CONFIG, "data": {"new_tokens": tokens}}
    save(TinyRun().train(0, 1), tmp_path, 1, config=old if tokens else CONFIG)
    assert find_checkpoint(tmp_path, "auto", new, lambda text: None) is not None
    with pytest.raises(UserError, match=r"data.new_tokens: .* then, \['<\|b\|>'\] now"):
        find_checkpoint(tmp_path, "auto", {**CONFIG, "data": {"new_tokens": ["<|b|>"]}}, lambda text: None)
