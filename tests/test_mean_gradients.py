"""torchft.distributed.mean_gradients: of parameters that every process holds whole."""

from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchft import distributed
from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.distributed import join_processes, leave_processes, mean_gradients
from torchft.ranks import rank

SHAPES = [(3, 5), (7,), (), (2, 2, 2), (11, 3)]


@pytest.mark.parametrize("bucket", [1, 20, 1000])
def test_gradients_are_the_mean_in_as_many_buckets_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    """One has no gradient on one process, one on none; what FSDP2 divides is left alone."""
    monkeypatch.setattr(distributed, "BUCKET", bucket)

    def work(number: int) -> None:
        join_processes(ModelConfig(), OptimConfig(), RunConfig(global_batch_size=2, micro_batch_size=1))
        params = {str(index): nn.Parameter(torch.zeros(shape)) for index, shape in enumerate(SHAPES)}
        for index, param in enumerate(params.values()):
            param.grad = torch.arange(param.numel()).view(param.shape).float() + 100 * index + 1000 * rank()
        params["1"].grad = params["1"].grad if rank() else None
        params["4"].grad = None
        mesh = init_device_mesh("cpu", (2,))
        divided = params["divided"] = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
        divided.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
        mean_gradients(params)
        for index, shape in enumerate(SHAPES):
            own = torch.arange(params[str(index)].numel()).view(shape).float() + 100 * index
            expected = {1: (own + 1000) / 2, 4: own * 0}.get(index, own + 500)
            assert torch.equal(params[str(index)].grad, expected), index
        assert torch.equal(divided.grad.full_tensor(), torch.ones(4, 2))
        leave_processes()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)


def test_one_process_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = own = torch.ones(3)
    mean_gradients({"a": param, "b": nn.Parameter(torch.zeros(2))})
    assert param.grad is own
