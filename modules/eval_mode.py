"""A model as it is asked, not trained: the context of every evaluation, generation and comparison."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's own train or eval mode is restored after, also when something is raised.

    A forward without gradients may leave FSDP2's parameters gathered: they are divided again, or whoever reads or loads the
    divided ones next would not be talking of what the model computes with.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if dist.is_available() and dist.is_initialized():
            _divide_again(model)


def _divide_again(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule  # here: its import takes half a second

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
