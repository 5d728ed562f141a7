"""An optimizer that someone has put into a recipe: steps, learning rates, checkpoints of any number of processes."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_run import DividedRun, on_processes
from processes import problems
from tiny_training import CONFIG, TinyRun, assert_same, hide_cuda
from torch import Tensor

from torchft.checkpoint import load_checkpoint, save_checkpoint
from torchft.errors import UserError
from torchft.modules.sharding import whole
from torchft.optim import clip_and_check, set_lr, step_optimizer
from torchft.parts import PartsWriter

Build = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (https://arxiv.org/abs/2302.06675), as people write it: with a Python number in its state, and more."""

    def __init__(self, params: Iterable[Tensor], lr: float, more: Callable[[Tensor], dict[str, Any]] = lambda param: {}) -> None:
        super().__init__(params, {"lr": lr})
        self.more = more

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    state |= {"t": 0, "mean": torch.zeros_like(param), "first": None, **self.more(param)}
                state["t"] += 1
                state["first"] = state["first"] or state["t"] / 3  # a number that fp32 could not hold
                param -= group["lr"] * state["first"] / state["t"] * (0.9 * state["mean"] + 0.1 * param.grad).sign()
                state["mean"].lerp_(param.grad, 0.01)


OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "AdamW, amsgrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True, momentum=0.5),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "Lion": lambda params: Lion(params, lr=0.1),
    "Lion, more": lambda params: Lion(params, lr=0.1, more=lambda param: {"signs": torch.full_like(param, 2**24 + 1, dtype=torch.int64)}),
}


def run_with(build: Build, seed: int = 0) -> TinyRun:
    run = TinyRun(seed=seed)
    run.optimizer = build(run.params.values())
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continuing_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    expected = run_with(OPTIMIZERS[name]).train(0, 6)
    first = run_with(OPTIMIZERS[name]).train(0, 3)
    arguments = {"params": first.params, "optimizer": first.optimizer}
    path = save_checkpoint(tmp_path, 3, state={}, config=CONFIG, keep_last=1, **arguments)
    resumed = run_with(OPTIMIZERS[name], seed=99)
    load_checkpoint(path, params=resumed.params, optimizer=resumed.optimizer, unchanged={})
    assert_same(resumed.train(3, 6).snapshot(), expected.snapshot())
    for param, other in zip(resumed.params.values(), expected.params.values(), strict=True):
        state, wanted = resumed.optimizer.state[param], expected.optimizer.state[other]
        assert {key: (type(value), getattr(value, "dtype", None)) for key, value in state.items()} == {
            key: (type(value), getattr(value, "dtype", None)) for key, value in wanted.items()
        }


def divided_run_with(build: Build) -> DividedRun:
    run = DividedRun()
    run.optimizer = build(run.params.values())
    return run


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW, amsgrad", "Lion", "Lion, more"])
def test_divided_over_processes_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)

    def work() -> None:
        run, writer = divided_run_with(OPTIMIZERS[name]).step().step(), PartsWriter(tmp_path / "out")
        run.save(writer, 2)
        writer.wait()
        resumed = divided_run_with(OPTIMIZERS[name])
        resumed.load(tmp_path / "out/step_000002")
        for side in (run, resumed):
            side.step().step().step()
        weights = [[whole(param.detach()) for param in side.params.values()] for side in (resumed, run)]
        assert all(map(torch.equal, *weights))

    assert on_processes(2, tmp_path, work) == [0, 0], problems(tmp_path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_skipped(name: str) -> None:
    run = run_with(OPTIMIZERS[name]).train(0, 2)
    for param in run.params.values():
        param.grad = torch.full_like(param, math.nan)
    before = run.snapshot()
    step_optimizer(run.optimizer, clip_and_check(run.params, 1.0, torch.zeros(()))[1])
    assert_same(run.snapshot(), before)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (lambda param: {"past": [param.clone()]}, "'past', a list,"),
        (lambda param: {"mean/2": 0.0}, "'mean/2', a float,"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_the_first_step(more: Callable, what: str) -> None:
    with pytest.raises(UserError, match=f"the state of Lion holds {what} beside a parameter of shape \\(64, 64\\)"):
        run_with(lambda params: Lion(params, lr=0.1, more=more)).train(0, 1)


def test_nor_a_part_that_no_other_process_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)

    def work() -> None:
        with pytest.raises(UserError, match="'rows', a Tensor of shape .*divided alike"):
            divided_run_with(lambda params: Lion(params, lr=0.1, more=lambda param: {"rows": torch.zeros(3)})).step()

    assert on_processes(2, tmp_path, work) == [0, 0], problems(tmp_path)


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    """LoRA+ (https://arxiv.org/abs/2402.12354) is two groups."""
    run = TinyRun()
    matrix, gain = run.params.values()
    optimizer = torch.optim.AdamW([{"params": [matrix], "lr_scale": 16.0}, {"params": [gain]}], lr=0.01)
    for lr in (0.02, 0.0, 0.01):
        set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [16 * lr, lr]
    optimizer = torch.optim.AdamW([{"params": [matrix], "lr": 0.16}, {"params": [gain]}], lr=0.01)
    with pytest.raises(UserError, match=r'learning rates \[0.16, 0.01\].*give a group "lr_scale"'):
        set_lr(optimizer, 0.02)
