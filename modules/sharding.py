"""Parameters divided over processes by FSDP2 (`fully_shard`): which ones, how they are filled, how they are read back.

A divided parameter is a DTensor: each process holds some rows of it, and a block's rows are gathered for as long as the
block computes. The functions here treat an ordinary tensor as the case of one holder, so that callers need no branch. With
`in_cpu_memory` the rows lie in the host's memory, though their mesh is one of GPUs: what is gathered of them outside of a
forward travels by gloo.

Order: model on meta -> adapters -> NF4 -> checkpointing -> compile -> `shard_model` -> fill every parameter.
Left out: dividing anything but rows (tensor parallelism); frozen weights of fused blocks (torchft/divided_blocks.py), for which the
functions below hold as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from torchft.modules import nf4
from torchft.modules.host_embedding import host_tables
from torchft.modules.int8_head import is_int8
from torchft.modules.transformer import CausalLM


@dataclass(frozen=True)
class ShardReport:
    """What `shard_model` did, for one printed line."""

    num_parts: int  # processes over which a weight is divided
    num_copies: int  # of the whole model, on groups of that many processes
    num_divided: int  # parameters (tensors)
    kept_whole: tuple[str, ...]  # names of frozen ones that every process holds, because they cannot be divided
    ends_whole: tuple[str, ...] = ()  # and embed_tokens in CPU memory, lm_head in 8 bits
    in_cpu_memory: bool = False  # each block's weights travel to the device when it computes, their gradients back
    fetched: str = ""  # how the rows of other processes come, where frozen weights of fused blocks alone are divided

    def __str__(self) -> str:
        processes = self.num_parts * self.num_copies
        if self.in_cpu_memory:
            return f"{self._divided()}, in CPU memory: weights travel block by block, gradients back"
        if self.num_divided == 0:
            each = f"each of {processes} processes holds the whole model; gradients are averaged once a step"
            return each if processes > 1 else "1 process: nothing is divided"
        line = self._divided()
        if self.fetched:
            line += f", {self.fetched} while the block before computes; all else is whole on each"
        if self.kept_whole:
            line += (
                f"; {len(self.kept_whole)} NF4 tensors whole on each (first: {self.kept_whole[0]}, which cannot be cut into "
                f"equal parts of a multiple of {nf4.DIVISOR:,} weights)"
            )
        return line + (f"; whole on each: {', '.join(self.ends_whole)}" if self.ends_whole else "")

    def _divided(self) -> str:
        if self.num_parts == 1 < self.num_copies:
            return f"{self.num_divided} tensors whole on each of {self.num_copies} processes"
        copies = f", {self.num_copies} copies" if self.num_copies > 1 else ""
        return f"{self.num_divided} tensors divided over {self.num_parts} process{'es' * (self.num_parts > 1)}{copies}"


def shard_model(
    model: CausalLM,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    in_cpu_memory: bool = False,
) -> ShardReport:
    """Divide a model on meta over `mesh`, block by block; `model` itself holds embedding, last norm and head.

    Args:
        mesh: one dimension of processes that share the rows of a weight, or two, (copies, parts).
        compute_dtype: of gathered weights, for a model that keeps its own in fp32; gradients are summed in fp32 over the
            processes. None: everything is computed in the weights' own dtypes.
        in_cpu_memory: weights, gradients and so the optimizer's moments stay on the host, in memory that a GPU can copy from
            beside its work; every parameter must be filled there.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # here: it takes half a second

    parts = mesh.size(mesh.ndim - 1)
    frozen = {name: param for name, param in model.named_parameters() if not param.requires_grad}
    on_host = {id(table) for table in host_tables(model)}
    ends = {name: p for name, p in frozen.items() if id(p) in on_host or is_int8(p)}
    kept = {name: p for name, p in frozen.items() if _cannot_divide(p, parts)}
    options = {"mesh": mesh, "ignored_params": {*kept.values(), *ends.values()}}
    if compute_dtype is not None:
        # RoPE's tables, which come as inputs, must stay in fp32: see modules/rope.py
        mixed = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
        options["mp_policy"] = MixedPrecisionPolicy(**mixed)
    if in_cpu_memory:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in model.model.layers:
        block.base_stays = False
        fully_shard(block, **options)
    # Tables, last norm and head stay gathered from forward to backward, which would gather them again at once.
    fully_shard(model, **options | {"reshard_after_forward": False})
    divided = sum(isinstance(param, DTensor) for param in model.parameters())
    return ShardReport(parts, mesh.size() // parts, divided, tuple(kept), tuple(ends), in_cpu_memory)


def _cannot_divide(param: Tensor, parts: int) -> bool:
    """Whether equal parts of an NF4 tensor's rows would cut through its groups of scales."""
    return isinstance(param, nf4.NF4Tensor) and (param.shape[0] % parts != 0 or param.numel() // parts % nf4.DIVISOR != 0)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compute_device(tensor: Tensor) -> torch.device:
    """Where a parameter is computed with: on its mesh's devices, though it may lie in CPU memory."""
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is divided: every process must call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, for the first process to write down, on its CPU; the others, which must all call it, get an empty one."""
    if not isinstance(tensor, DTensor):
        return tensor
    everything = tensor.full_tensor()
    return everything.cpu() if tensor.device_mesh.get_rank() == 0 else torch.empty(0)


def num_parts(tensor: Tensor) -> int:
    """Into how many parts a tensor is divided."""
    return tensor.device_mesh.size(tensor.device_mesh.ndim - 1) if isinstance(tensor, DTensor) else 1


def rows_held(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this process holds, as FSDP2 deals them: like torch.chunk."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    mesh, num_rows = tensor.device_mesh, tensor.shape[0]
    step = -(-num_rows // num_parts(tensor))
    start = min(num_rows, mesh.get_local_rank(mesh.ndim - 1) * step)
    return slice(start, min(num_rows, start + step))


def divided_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor with as many rows as `like`, dealt out as and where they are, of which `part` is what this process holds.

    `like` on meta has no place yet: the part stays where it is.
    """
    if not isinstance(like, DTensor):
        return part
    part = part if like.is_meta or part.device == like.device else part.to(like.device)
    shape = torch.Size((like.shape[0], *part.shape[1:]))
    return on_mesh(part, like.device_mesh, like.placements, shape=shape, stride=torch.empty(shape, device="meta").stride())


def on_mesh(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], **whole_layout: Sequence[int]) -> DTensor:
    """`DTensor.from_local` for a part that stays where it is: that would move one in CPU memory to the mesh's GPU."""
    options = {"run_check": False, **whole_layout}
    if part.device.type == mesh.device_type:
        return DTensor.from_local(part, mesh, placements, **options)
    like = DTensor.from_local(part.to("meta"), mesh, placements, **options)
    return DTensor(part, like._spec, requires_grad=False)  # as FSDP2 makes its own


def cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, in the layout of `like`; a copy where that is divided."""
    if not isinstance(like, DTensor):
        return value
    if isinstance(value, nf4.NF4Tensor):  # which can be cut into equal parts only
        mesh = like.device_mesh
        return divided_like(nf4.part(value, mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)), like)
    return divided_like(value[rows_held(like)].clone(), like)


@torch.no_grad()
def place(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Make the whole tensor `value` the parameter `leaf` of `module`, in the layout of the one that is there."""
    before = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(cut(value, before), requires_grad=before.requires_grad))
