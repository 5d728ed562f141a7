"""A divided training run of milliseconds, and the processes that it takes: for tests of checkpoints in parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import run_processes
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.distributed import join_processes, leave_processes
from torchft.modules.sharding import whole
from torchft.optim import build_optimizer, clip_and_check, step_optimizer
from torchft.parts import PartsWriter, load_parts
from torchft.ranks import world_size

CONFIG = {"run": {"out": "out"}, "optim": {"name": "adamw"}}


class DividedRun:
    """A model of a few odd shapes divided over the processes, its optimizer, and steps that depend on nothing else."""

    def __init__(self, width: int = 7) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 1, bias=False))  # fewer rows than processes, too
        fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size(),)))
        self.params = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.params, OptimConfig(lr=0.1))

    def step(self) -> "DividedRun":
        loss = self.model(torch.ones(3, 5)).square().mean()
        loss.backward()
        step_optimizer(self.optimizer, clip_and_check(self.params, 0.0, loss)[1])
        self.optimizer.zero_grad()
        return self

    def save(self, writer: PartsWriter, step: int, **more: Any) -> None:
        writer.save(
            step, params=self.params, optimizer=self.optimizer, state={"data": "d"}, config=CONFIG, keep_last=2, **more
        )

    def load(self, path: Path) -> dict[str, Any]:
        return load_parts(path, params=self.params, optimizer=self.optimizer, unchanged={"data": "d"})

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {name: whole(param.detach()).clone() for name, param in self.params.items()}
        for name, param in self.params.items():
            found |= {f"{name}/{key}": whole(value).clone() for key, value in self.optimizer.state[param].items()}
        return found


def on_processes(count: int, folder: Path, work: Callable[[], None]) -> list[int]:
    """`work` on gloo processes that have met; exit codes."""

    def run(_: int) -> None:
        join_processes(ModelConfig(), OptimConfig(), RunConfig(global_batch_size=12))
        work()
        leave_processes()

    return run_processes(count, run, folder)
