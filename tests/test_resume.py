"""Log, checkpoints and signals together in a recipe's loop: killed anywhere, continued, the same bits as if never."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import fork
from safetensors.torch import load_file, save_file
from tiny_training import TinyRun, assert_same, hide_cuda

from torchft.checkpoint import StopSignal, find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import RunConfig
from torchft.metrics import DETERMINISTIC_FIELDS, RunLogger
from torchft.optim import clip_and_check, lr_at, set_lr, step_optimizer
from torchft.run_dir import best_checkpoint

STEPS, ACCUMULATED = 7, 2
PHASES = ("data", "backward", "update", "log", "validate", "save")


def recipe(out: Path, disturb: Callable[[int, str], None]) -> int:
    """A recipe's loop over the tiny run; `disturb` is told each step and phase. Returns the exit code."""
    run = RunConfig(out=str(out), log_every=2, eval_every=3, save_every=2, keep_last=1, keep_best=True, resume="auto")
    config = {"run": vars(run)}
    log = RunLogger(run, config, torch.device("cpu"))
    checkpoint = find_checkpoint(run.out, run.resume, config, log.print)
    tiny = TinyRun()
    start, log_state = 0, None
    if checkpoint:
        state = load_checkpoint(checkpoint, params=tiny.params, optimizer=tiny.optimizer, unchanged={"data": "d"})
        start, log_state = state["step"], state["log"]
    log.begin(total_steps=STEPS, steps_per_epoch=STEPS, start_step=start, state=log_state)
    stop = StopSignal()
    for step in range(start, STEPS):
        loss = torch.zeros(())
        for _ in range(ACCUMULATED):
            disturb(step, "data")
            micro_loss = tiny.model(torch.randn(4, 64)).square().sum()
            (micro_loss / 8).backward()
            disturb(step, "backward")
            loss += micro_loss.detach()
        norm, found_inf = clip_and_check(tiny.params, 1.0, loss)
        lr = lr_at(step, STEPS, tiny.cfg)
        set_lr(tiny.optimizer, lr)
        step_optimizer(tiny.optimizer, found_inf)
        tiny.optimizer.zero_grad()
        disturb(step, "update")
        log.step(step + 1, loss=loss, supervised=8, tokens=8, lr=lr, grad_norm=norm, found_inf=found_inf)
        disturb(step, "log")

        done, improved = step + 1, False
        with log.paused():
            if done % run.eval_every == 0:
                valid_loss = tiny.params["0.weight"].detach().square().mean().item()
                log.validation(done, valid_loss=valid_loss)
                improved = valid_loss < best_checkpoint(Path(run.out))[0]
                disturb(step, "validate")
            if done % run.save_every == 0 or done == STEPS or improved or stop.exit_code:
                save_checkpoint(
                    run.out,
                    done,
                    params=tiny.params,
                    optimizer=tiny.optimizer,
                    state={"data": "d", "log": log.state()},
                    config=config,
                    keep_last=run.keep_last,
                    valid_loss=valid_loss if done % run.eval_every == 0 else None,
                )
                disturb(step, "save")
        if stop.exit_code:
            break
    log.close()
    stop.close()
    save_file(tiny.snapshot(), out / "final.safetensors")
    return stop.exit_code


def run_in_child(out: Path, disturb: Callable[[int, str], None]) -> int:
    def quietly() -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        return recipe(out, disturb)

    return fork(quietly)


def at(wanted: tuple[int, str], number: signal.Signals) -> Callable[[int, str], None]:
    return lambda step, phase: os.kill(os.getpid(), number) if (step, phase) == wanted else None


def result(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The log's deterministic fields, and weights, moments and generators after the last step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name in DETERMINISTIC_FIELDS} for line in lines]
    return log, load_file(out / "final.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        hide_cuda(patch)
        assert recipe(out, lambda step, phase: None) == 0
    log, tensors = result(out)
    assert [line["step"] for line in log] == [2, 3, 4, 6, 6, 7]
    return log, tensors


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_any_step(phase: str, expected: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in each phase of each step, mid-accumulation too; `auto` continues without help."""
    hide_cuda(monkeypatch)
    killed = 0
    for step in range(STEPS):
        out = tmp_path / str(step)
        killed += run_in_child(out, at((step, phase), signal.SIGKILL)) == -signal.SIGKILL
        assert run_in_child(out, lambda step, phase: None) == 0
        check(out, expected)
    assert killed >= (2 if phase == "validate" else 4)


def test_killed_at_every_step_of_one_run(expected: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)
    for step in range(STEPS):
        assert run_in_child(tmp_path, at((step, "log"), signal.SIGKILL)) in (0, -signal.SIGKILL)
    run_in_child(tmp_path, lambda step, phase: None)
    check(tmp_path, expected)


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_saves_at_the_end_of_the_step(
    phase: str, expected: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PITFALLS K8: not one step is lost, the exit code says why, and the continuation is exact."""
    hide_cuda(monkeypatch)
    step = 5 if phase in ("validate", "save") else 2
    assert run_in_child(tmp_path, at((step, phase), signal.SIGTERM)) == 128 + signal.SIGTERM
    checkpoint = find_checkpoint(tmp_path, "auto", {"run": vars(RunConfig(out=str(tmp_path)))}, lambda text: None)
    assert checkpoint and checkpoint.name == f"step_{step + 1:06d}"
    assert run_in_child(tmp_path, lambda step, phase: None) == 0
    check(tmp_path, expected)


def check(out: Path, expected: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    log, tensors = result(out)
    assert log == expected[0]
    assert_same(tensors, expected[1])
