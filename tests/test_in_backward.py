"""The update in backward gives the bits of the ordinary step, one gradient at a time, and leaves alone what is not finite."""

import math
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from tiny_training import hide_cuda
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft.config import OptimConfig
from torchft.in_backward import StepInBackward
from torchft.modules.sharding import local
from torchft.optim import build_optimizer, norm_and_check, set_lr, step_optimizer

OPTIMIZERS = {"adamw": torch.float32, "adamw_bf16": torch.bfloat16}


class Tied(nn.Module):
    """An embedding that is its own head, a layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.layer, self.norm = nn.Embedding(19, 24), nn.Linear(24, 24), nn.RMSNorm(24)
        self.lm_head = nn.Linear(24, 19, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        return self.lm_head(self.norm(h + self.layer(h).tanh()))


class Run:
    """A model with its optimizer; `params` holds the tied weight under both its names."""

    def __init__(self, name: str, in_backward: bool, sharded: bool = False) -> None:
        self.model = Tied().to(OPTIMIZERS[name])
        if sharded:
            fully_shard(self.model.layer, mesh=init_device_mesh("cpu", (1,)))
            fully_shard(self.model, mesh=init_device_mesh("cpu", (1,)))
        self.params = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.params, OptimConfig(name=name, weight_decay=0.1))
        both_names = dict(self.model.named_parameters(remove_duplicate=False))
        self.updates = StepInBackward(both_names, self.optimizer) if in_backward else None

    def loss(self, step: int) -> Tensor:
        ids = torch.randint(19, (4, 6), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    def step(self, step: int, factor: float = 1.0, summand: float = 0.0) -> tuple[float, float]:
        set_lr(self.optimizer, 0.01 / (step + 1))
        loss = self.loss(step) * factor + summand
        if self.updates:
            norm, found_inf = self.updates.backward(loss)
        else:
            loss.backward()
            norm, found_inf, _ = norm_and_check(self.params, 0.0, loss.detach())
            step_optimizer(self.optimizer, found_inf)
            self.optimizer.zero_grad()
        assert all(param.grad is None for param in self.params.values())
        return norm.item(), found_inf.item()

    def snapshot(self) -> dict[str, Tensor]:
        tensors = {name: local(param.detach()).clone() for name, param in self.params.items()}
        for name, param in self.params.items():
            tensors |= {f"{name}/{key}": local(value).clone() for key, value in self.optimizer.state[param].items()}
        return tensors


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    assert left.keys() == right.keys()
    return {name.split("/")[0] for name in left if not torch.equal(left[name], right[name])}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_the_ordinary_step(name: str) -> None:
    ordinary, ours = Run(name, in_backward=False), Run(name, in_backward=True)
    for step in range(6):
        norm, found_inf = ordinary.step(step)
        assert ours.step(step) == (pytest.approx(norm, rel=1e-6), found_inf)
        assert not differing(ours.snapshot(), ordinary.snapshot())
    assert ours.optimizer.state[ours.params["embed_tokens.weight"]]["step"].item() == 6  # once a step, for both its uses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_has_no_gradient_in_a_step_is_not_in_its_norm(name: str) -> None:
    ordinary, ours = Run(name, in_backward=False), Run(name, in_backward=True)
    for step in range(3):
        for run in (ordinary, ours):
            run.model.layer.requires_grad_(step != 1)
        norm, found_inf = ordinary.step(step)
        assert ours.step(step) == (pytest.approx(norm, rel=1e-6), found_inf)
        assert not differing(ours.snapshot(), ordinary.snapshot())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_divided_on_one_process_it_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the distributed recipes have it on one GPU: FSDP2 calls the hooks, not autograd."""
    hide_cuda(monkeypatch)
    ordinary = Run(name, in_backward=False)
    expected = [ordinary.step(step) for step in range(3)]

    def work(number: int) -> None:
        distributed.init_process_group("gloo")
        ours = Run(name, in_backward=True, sharded=True)
        got = [ours.step(step) for step in range(3)]
        assert [norm for norm, _ in got] == pytest.approx([norm for norm, _ in expected], rel=1e-6)
        assert not differing(ours.snapshot(), ordinary.snapshot())
        distributed.destroy_process_group()

    assert run_processes(1, work, tmp_path) == [0], problems(tmp_path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_never_exist_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Run(name, in_backward=True), []
    original = run.optimizer.step

    def spy() -> None:
        seen.append([key for key, param in run.params.items() if param.grad is not None])
        original()

    monkeypatch.setattr(run.optimizer, "step", spy)
    run.step(0)
    assert sorted(seen) == sorted([key] for key in run.params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("into", ["factor", "summand"])
def test_a_loss_that_is_not_finite_changes_nothing(name: str, poison: float, into: str) -> None:
    """Its gradients may be finite: those of a loss times NaN are not, of a loss plus NaN they are."""
    run = Run(name, in_backward=True)
    run.step(0)
    before = run.snapshot()
    norm, found_inf = run.step(1, **{into: poison})
    assert math.isfinite(norm) == (into == "summand")
    assert found_inf == 1 and not differing(run.snapshot(), before)
    assert run.step(2)[1] == 0 and run.optimizer.state[run.params["norm.weight"]]["step"].item() == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_not_written(name: str, poison: float) -> None:
    run, control = Run(name, in_backward=True), Run(name, in_backward=False)
    before = (run.step(0), run.snapshot())[1]
    control.step(0)
    run.params["layer.bias"].register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), poison))
    norm, found_inf = run.step(1)
    control.step(1)
    assert found_inf == 1 and not math.isfinite(norm)
    after = run.snapshot()
    assert differing(after, before) == set(run.params) - {"layer.bias"}
    assert differing(after, control.snapshot()) == {"layer.bias"}


def test_a_plain_backward_is_told_apart() -> None:
    run = Run("adamw", in_backward=True)
    with pytest.raises(AssertionError, match="call StepInBackward.backward"):
        run.loss(0).backward()


def test_so_is_one_behind_a_backward_that_failed() -> None:
    run = Run("adamw", in_backward=True)
    loss = run.loss(0)
    loss.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.updates.backward(loss)
    with pytest.raises(AssertionError, match="call StepInBackward.backward"):
        run.loss(0).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_update_waits_for_the_gpu(name: str) -> None:
    model = Tied().to(OPTIMIZERS[name]).cuda()
    params = dict(model.named_parameters())
    updates = StepInBackward(params, build_optimizer(params, OptimConfig(name=name)))
    ids = torch.randint(19, (4, 6), device="cuda")
    for step in range(2):
        loss = model(ids).float().square().mean()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            norm, found_inf = updates.backward(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert norm > 0 and found_inf == 0
