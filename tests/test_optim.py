"""AdamW against its formula, the schedule against hand-made numbers, clipping, skipped steps, compilers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from tiny_training import hide_cuda
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft.config import OptimConfig
from torchft.errors import ConfigError, UserError
from torchft.modules.compiler import missing_compiler
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer

ZERO = torch.zeros(())


def make_params(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "b.weight": (3, 5), "b.magnitude": (3,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_grads(params: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = scale * torch.randn(param.shape, generator=generator)


def test_adamw_follows_its_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in fp64; decay on matrices only. fp32 rounds to about 1e-7 a step."""
    cfg = OptimConfig(lr=0.01, weight_decay=0.1, betas=[0.8, 0.95], eps=1e-3)
    params = make_params()
    expected = {name: param.detach().double() for name, param in params.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    optimizer = build_optimizer(params, cfg)
    for step in range(1, 6):
        set_grads(params, step)
        lr = cfg.lr / step
        set_lr(optimizer, lr)
        step_optimizer(optimizer, ZERO)
        for name, param in params.items():
            grad = param.grad.double()
            decay = 0.1 if param.ndim > 1 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            direction = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-3)
            expected[name] = expected[name] * (1 - lr * decay) - lr * direction
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), expected[name], rtol=1e-6, atol=1e-6)


def test_the_optimizer_is_fused_and_keeps_no_bf16() -> None:
    assert build_optimizer(make_params(), OptimConfig()).defaults["fused"]
    in_bf16 = {"a": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    for name in ("adamw", "adamw_8bit"):
        with pytest.raises(ConfigError, match=f"optim.name={name} .*float32, and a is in torch.bfloat16: use adamw_bf16"):
            build_optimizer(in_bf16, OptimConfig(name=name))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="optim.name is 'sgd': choose adamw, adamw_8bit or adamw_bf16"):
        build_optimizer(make_params(), OptimConfig(name="sgd"))
    with pytest.raises(UserError, match="optim.schedule is 'step'"):
        lr_at(0, 10, OptimConfig(schedule="step"))


@pytest.mark.parametrize(
    ("schedule", "expected"),  # of steps 0 1 2 3 | 4 | 9 | 13, 4 of warm-up and 14 in all, so that 9 is half-way down
    [
        ("constant", [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [0.5, 1.0, 1.5, 2.0, 2.0, 1.1, 0.38]),  # 0.2 + 1.8 * (1, 0.5, 0.1)
        ("cosine", [0.5, 1.0, 1.5, 2.0, 2.0, 1.1, 0.2 + 0.9 * (1 + math.cos(0.9 * math.pi))]),
    ],
)
def test_schedule(schedule: str, expected: list[float]) -> None:
    cfg = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1)
    assert [lr_at(step, 14, cfg) for step in (0, 1, 2, 3, 4, 9, 13)] == pytest.approx(expected, rel=1e-12)


def test_schedule_of_short_runs() -> None:
    """Without warm-up the first step has the full rate; a run shorter than its warm-up only rises."""
    assert lr_at(0, 5, OptimConfig(lr=1.0, warmup_steps=0)) == 1.0
    rates = [lr_at(step, 3, OptimConfig(lr=1.0, warmup_steps=10)) for step in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert lr_at(10, 10, OptimConfig(lr=1.0, warmup_steps=10)) == 1.0  # no division by zero where they are equal


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_set_lr_reaches_every_group(name: str) -> None:
    optimizer = build_optimizer(make_params(), OptimConfig(name=name, weight_decay=0.1))
    kinds = [type(group["lr"]) for group in optimizer.param_groups]
    set_lr(optimizer, 0.125)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.125]
    assert [type(group["lr"]) for group in optimizer.param_groups] == kinds


def test_clipping_is_by_the_global_norm() -> None:
    params = make_params()
    set_grads(params, 1)
    before = {name: param.grad.clone() for name, param in params.items()}
    norm = torch.cat([grad.flatten() for grad in before.values()]).double().norm()
    grad_norm, found_inf = clip_and_check(params, 0.5, torch.tensor(1.0))
    assert grad_norm.item() == pytest.approx(norm.item(), rel=1e-6) and found_inf.item() == 0
    for name, param in params.items():
        # clip_grads_with_norm_ divides by norm + 1e-6
        torch.testing.assert_close(param.grad, before[name] * 0.5 / float(norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1e9])
def test_no_clipping_leaves_gradients_alone(max_norm: float) -> None:
    params = make_params()
    set_grads(params, 1)
    before = {name: param.grad.clone() for name, param in params.items()}
    grad_norm, _ = clip_and_check(params, max_norm, ZERO)
    assert grad_norm > 0 and all(torch.equal(param.grad, before[name]) for name, param in params.items())


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_changes_nothing(where: str, poison: float) -> None:
    """PITFALLS L6. The step counter, too: the next good step is the second, not the third."""
    params = make_params()
    optimizer = build_optimizer(params, OptimConfig(weight_decay=0.1))
    set_grads(params, 1)
    step_optimizer(optimizer, clip_and_check(params, 1.0, torch.tensor(2.0))[1])
    before = snapshot(params, optimizer)

    set_grads(params, 2)
    loss = torch.tensor(2.0)
    if where == "gradient":
        params["b.weight"].grad[1, 2] = poison
    else:
        loss.fill_(poison)
    _, found_inf = clip_and_check(params, 1.0, loss)
    step_optimizer(optimizer, found_inf)
    assert found_inf.item() == 1
    after = snapshot(params, optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    set_grads(params, 3)
    step_optimizer(optimizer, clip_and_check(params, 1.0, torch.tensor(2.0))[1])
    after = snapshot(params, optimizer)
    assert not torch.equal(after["a.weight"], before["a.weight"]) and after["a.weight/step"].item() == 2


def test_8bit_skips_a_non_finite_step() -> None:
    params = make_params()
    optimizer = build_optimizer(params, OptimConfig(name="adamw_8bit"))
    set_grads(params, 1, scale=math.inf)
    before = snapshot(params, optimizer)
    step_optimizer(optimizer, clip_and_check(params, 1.0, ZERO)[1])
    assert all(torch.equal(before[name], param) for name, param in params.items()) and not optimizer.state


def snapshot(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: param.detach().clone() for name, param in params.items()}
    for name, param in params.items():
        tensors |= {f"{name}/{key}": value.clone() for key, value in optimizer.state.get(param, {}).items()}
    return tensors


def test_8bit_without_a_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"adamw_8bit.*apt install g\+\+.*optim.name=adamw"):
        build_optimizer(make_params(), OptimConfig(name="adamw_8bit"))


@pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="8-bit AdamW needs a C compiler")
def test_8bit_learns_without_noise_on_the_screen() -> None:
    """torchao's import messages and torch.compile's warnings stay off it; a parabola's loss falls."""
    program = (
        "import torch; from torch import nn; from torchft.config import OptimConfig; from torchft.optim import *\n"
        "torch.manual_seed(0); params = {'a': nn.Parameter(torch.randn(64, 64))}; zero = torch.zeros(())\n"
        "optimizer = build_optimizer(params, OptimConfig(name='adamw_8bit'))\n"
        "first = params['a'].square().sum().item()\n"
        "for step in range(20):\n"
        "    set_lr(optimizer, 0.05); params['a'].square().sum().backward(); step_optimizer(optimizer, zero)\n"
        "    optimizer.zero_grad()\n"
        "assert type(optimizer.state[params['a']]['exp_avg']).__name__ == 'OptimState8bit'\n"
        "assert params['a'].square().sum().item() < 0.2 * first\n"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sharded_parameters_are_clipped_and_skipped_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PITFALLS L6, L7. On 2 ranks (FSDP2, gloo) the norm is the global one; one bad shard skips the step on both."""
    hide_cuda(monkeypatch)
    expected = [norm for norm, _ in train_three_steps(make_model(), poison_rank=None)]
    assert run_processes(2, lambda _: run_rank(expected), tmp_path) == [0, 0], problems(tmp_path)


def run_rank(expected: list[float]) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(make_model(), mesh=mesh)
    clean = train_three_steps(model, poison_rank=None)
    model = fully_shard(make_model(), mesh=mesh)
    poisoned = train_three_steps(model, poison_rank=1)
    distributed.barrier()
    distributed.destroy_process_group()
    assert [norm for norm, _ in clean] == pytest.approx(expected, rel=1e-6)
    assert [flag for _, flag in poisoned] == [0, 1, 0]
    assert poisoned[2][0] == clean[1][0]  # the skipped step leaves the next one what it would have been


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))


def train_three_steps(model: nn.Module, poison_rank: int | None) -> list[tuple[float, float]]:
    """(norm, found_inf) of each step, the same batch on every rank; `poison_rank`'s shard is NaN in the second."""
    params = dict(model.named_parameters())
    optimizer = build_optimizer(params, OptimConfig(weight_decay=0.1))
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    seen = []
    for step in range(3):
        loss = model(batch).square().sum()
        loss.backward()
        if step == 1 and poison_rank is not None and distributed.get_rank() == poison_rank:
            params["0.weight"].grad.to_local()[0, 0] = math.nan
        norm, found_inf = clip_and_check(params, 0.5, loss)
        step_optimizer(optimizer, found_inf)
        optimizer.zero_grad()
        seen.append((norm.item(), found_inf.item()))
    return seen


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu() -> None:
    params = {name: nn.Parameter(param.detach().cuda()) for name, param in make_params().items()}
    optimizer = build_optimizer(params, OptimConfig(weight_decay=0.1))
    for seed, poison in ((1, 0.0), (2, math.nan), (3, 0.0)):
        for name, param in make_params(seed).items():
            params[name].grad = param.detach().cuda()
        loss = torch.full((), poison, device="cuda")
        before = params["a.weight"].detach().clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _, found_inf = clip_and_check(params, 0.5, loss)
            set_lr(optimizer, 0.01)
            step_optimizer(optimizer, found_inf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(params["a.weight"], before) == math.isnan(poison)
