"""A training run of milliseconds for the checkpoint tests: dropout, three random generators, both kinds of AdamW."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchft.config import OptimConfig
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer

CONFIG = {"run": {"out": "out", "seed": 1, "max_steps": 6}, "optim": {"name": "adamw"}, "model": {"path": "m"}}


class TinyRun:
    """Fresh weights and optimizer; the global generators decide both the weights and the batches."""

    def __init__(self, optimizer_name: str = "adamw", seed: int = 0) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.cfg = OptimConfig(name=optimizer_name, lr=0.01, warmup_steps=2)
        # 64 x 64: torchao keeps states of fewer than 4,096 values, such as the norm's, in fp32
        self.model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.3), nn.RMSNorm(64))
        self.params = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.params, self.cfg)

    def train(self, first: int, last: int) -> "TinyRun":
        """Optimizer steps first .. last - 1, counted from 0."""
        for step in range(first, last):
            loss = (self.model(torch.randn(4, 64)) - random.random()).square().mean() * np.random.uniform(0.5, 1.5)
            loss.backward()
            set_lr(self.optimizer, lr_at(step, 6, self.cfg))
            step_optimizer(self.optimizer, clip_and_check(self.params, 1.0, loss)[1])
            self.optimizer.zero_grad()
        return self

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that decides how the run goes on, copied."""
        tensors = {name: param.detach() for name, param in self.params.items()}
        for name, param in self.params.items():
            for key, value in self.optimizer.state.get(param, {}).items():
                if not isinstance(value, Tensor):
                    value = torch.tensor(float("inf") if value is None else value)
                inner = {"": value} if type(value) is Tensor else {"/codes": value.codes, "/scale": value.scale}
                tensors |= {f"{name}/{key}{part}": tensor for part, tensor in inner.items()}
        tensors["torch"] = torch.get_rng_state()
        tensors["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        tensors["numpy position"] = torch.tensor(np.random.get_state()[2])
        tensors["python"] = torch.tensor(random.getstate()[1])
        return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different, f"not the same bits: {different}"


def hide_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a fork: where there is a GPU, a child may not touch CUDA, which even AdamW's step on CPU does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
