"""embed_tokens in CPU memory: a frozen table of which a step reads some thousand rows need not lie on the GPU (1 GiB of 8B).

The numbers are the very same. The table is pinned where there is a GPU, and `torchft.fuse` puts in a kernel with which the GPU
reads the rows of its ids over the bus. Without that kernel the CPU looks them up, for which it must wait for the ids: the
GPU then idles between two forwards. Several processes each have a table of their own, which FSDP2 leaves alone.
Left out: training it.

Legend: D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.offload import CannotPin


class HostEmbedding(nn.Embedding):
    """An embedding with a frozen `weight` on the CPU, for ids on any device. Made by `offload_embeddings`."""

    gather: Callable[[Tensor, Tensor], Tensor] | None = None  # (table, ids on a GPU) -> rows, see torchft.fuse

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., D) on the ids' device
        if ids.device != self.weight.device and self.gather is not None:
            return self.gather(self.weight.detach(), ids.contiguous())
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


@dataclass(frozen=True)
class OffloadReport:
    """What `offload_embeddings` did, for one printed line."""

    num_weights: int

    def __str__(self) -> str:
        return f"embed_tokens: {self.num_weights:,} weights stay in CPU memory, and their rows are fetched as they are needed"


def offload_embeddings(model: nn.Module) -> OffloadReport:
    """Give `model` (a CausalLM on meta) a HostEmbedding in place of its frozen embed_tokens, for whoever fills it: see `placed`.

    Raises:
        ValueError: the embedding is trained, or it is the head too, which is needed on the GPU.
    """
    table = model.model.embed_tokens.weight
    if type(model.model.embed_tokens) is not nn.Embedding or table.requires_grad:
        raise ValueError("embed_tokens is trained here, and only a frozen one can stay in CPU memory")
    if model.lm_head.weight is table:
        raise ValueError("embed_tokens is the model's lm_head too, of which every step needs all rows on the GPU")
    host = HostEmbedding(*table.shape, device="meta")
    host.weight = table
    model.model.embed_tokens = host
    return OffloadReport(table.numel())


def host_tables(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that stay in CPU memory."""
    return [module.weight for module in model.modules() if isinstance(module, HostEmbedding)]


def frozen_on_device(model: nn.Module) -> list[nn.Parameter]:
    """All other parameters that are not trained."""
    on_host = {id(table) for table in host_tables(model)}
    return [param for param in model.parameters() if not param.requires_grad and id(param) not in on_host]


def placed(table: Tensor, device: torch.device | str) -> Tensor:
    """A table in CPU memory, for a model that computes on `device`. Raises CannotPin where that is not to be had."""
    table = table.cpu()
    if torch.device(device).type != "cuda":
        return table
    try:
        return table.pin_memory()
    except RuntimeError as error:
        raise CannotPin("embeddings", table.nbytes, "leave more of it free", error) from error
