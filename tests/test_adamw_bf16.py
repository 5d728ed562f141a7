"""AdamW in bf16: it moves weights as fp32's does (PITFALLS L9), it is AdamW but for noise, any division gives the same bits."""

import copy
import math
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from tiny_training import hide_cuda
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft.adamw_bf16 import AdamWBf16
from torchft.config import OptimConfig
from torchft.errors import ConfigError, UserError
from torchft.optim import build_optimizer, clip_and_check, norm_and_check, set_lr, step_optimizer
from torchft.optimizer_state import flatten_optimizer, unflatten_optimizer

GO = torch.zeros(())


def bf16(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.bfloat16())


def gradients(step: int, count: int) -> Tensor:
    """A direction that stays, and noise three times as large, in bf16."""
    steady = torch.randn(count, generator=torch.Generator().manual_seed(1000))
    noise = torch.randn(count, generator=torch.Generator().manual_seed(step))
    return (1e-3 * (steady + 3 * noise)).bfloat16()


def test_it_moves_weights_as_fp32_does(capsys: pytest.CaptureFixture) -> None:
    """PITFALLS L9: lr 2e-5, |w| about 0.02, 100 steps on the same gradients: the total update's norm and direction.

    Stochastic rounding is a random walk on top of the update. Of its norm, n steps leave sqrt(n) * 0.4 units of 2^-14 or so
    beside n lr: what is required is that the share along fp32's update is whole, and that its noise is what rounding makes.
    """
    count = 2**16
    start = (0.02 * torch.randn(count, generator=torch.Generator().manual_seed(7))).bfloat16()
    runs = {"fp32": nn.Parameter(start.float()), "stochastic": bf16(start), "nearest": bf16(start)}
    options = {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizers = {
        "fp32": torch.optim.AdamW([runs["fp32"]], **options),
        "stochastic": AdamWBf16([runs["stochastic"]], **options),
        "nearest": torch.optim.AdamW([runs["nearest"]], **options),
    }
    for step in range(100):
        grad = gradients(step, count)
        for name, param in runs.items():
            param.grad = grad.to(param.dtype)
            optimizers[name].step()
    updates = {name: param.detach().double() - start.double() for name, param in runs.items()}
    target = updates["fp32"]
    ratio = {name: (update.norm() / target.norm()).item() for name, update in updates.items()}
    cosine = {name: (update @ target / update.norm() / target.norm()).item() for name, update in updates.items()}
    along = {name: (update @ target / target.norm() ** 2).item() for name, update in updates.items()}
    with capsys.disabled():
        print(f"\nnorm {ratio}\ncosine {cosine}\nalong {along}")
    assert ratio["stochastic"] >= 0.98 and 0.98 <= along["stochastic"] <= 1.02
    assert ratio["nearest"] < 0.5
    assert cosine["stochastic"] > cosine["nearest"]
