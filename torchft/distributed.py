"""What the processes of a run do together: join, divide the model, and tell each other a few things.

On one process without `join_processes` the questions at the end answer for that process alone. Under torchrun (`tune run --nproc_per_node 4`)
`join_processes` opens two groups: the default one, for tensors on the devices, and one over gloo for what is on the hosts,
whose patience is long, because tokenising or downloading on one process may take hours.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.crash import leave_when_another_fails
from torchft.data.loader import resolve_micro_batch_size
from torchft.errors import ConfigError, UserError
from torchft.modules import fp8, int8_head, nf4
from torchft.modules.host_embedding import frozen_on_device
from torchft.modules.lora import trained_beside_adapters
from torchft.modules.sharding import ShardReport, shard_model
from torchft.modules.transformer import CausalLM
from torchft.ranks import local_rank, local_world_size, rank, world_size

T = TypeVar("T")
HOST_TIMEOUT = timedelta(hours=24)  # a failed process ends the others at once, see crash.leave_when_another_fails
STALLED = timedelta(minutes=10)  # for which the devices wait for one of them, before all fail
FITS = 0.4  # share of a GPU's memory that a model held whole may take
ADAPTERS_FIT = 0.1  # and adapters with their gradients and moments, where only the base is divided
BUCKET = 2**26  # elements of gradients that are whole travel together: 256 MiB


def require_single_process(recipe: str, cfg: ModelConfig) -> None:
    """Raises UserError on several processes, of which each would train alone, and for an option that needs them."""
    twin = recipe.replace("single_device", "distributed")
    if world_size() > 1:
        raise UserError(
            f"{recipe} runs on one process, not on {world_size()}: leave out --nproc_per_node, or run {twin}"
        )
    if cfg.shard != "auto":
        raise ConfigError(
            f"model.shard={cfg.shard} divides weights over processes, and {recipe} is one: remove it, or run {twin}"
        )
    if cfg.kernels.get("peers") == "eager":
        raise ConfigError(f"model.kernels={{peers: eager}} is of weights on several processes, and {recipe} is one: remove it, or run {twin}")


def join_processes(model: ModelConfig, optim: OptimConfig, run: RunConfig) -> None:
    """Open the process groups, and take this process's GPU; before that, refuse options that cannot work on so many.

    Raises ConfigError for those options, UserError where there are more processes than GPUs.
    """
    world = world_size()
    if model.shard.isdecimal() and world % int(model.shard):
        many = f"does not divide {world} processes: use a divisor of it, all or auto"
        one = "needs more processes than this one: start them with --nproc_per_node, or use all or auto"
        raise ConfigError(f"model.shard={model.shard} {many if world > 1 else one}")
    if optim.in_backward and world > 1:
        raise ConfigError(
            f"optim.in_backward=true works on one process, and --nproc_per_node (and --nnodes) make {world}: a sum over "
            "processes has to be whole before an update; set optim.in_backward=false"
        )
    resolve_micro_batch_size(run.global_batch_size, run.micro_batch_size, world)
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node starts more processes than this machine has GPUs ({torch.cuda.device_count()})"
            )
        torch.cuda.set_device(local_rank())
    store = {} if world_size() > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    hook = sys.excepthook
    dist.init_process_group(_backend(model), timeout=STALLED, **store)
    leave_when_another_fails()
    sys.excepthook = hook  # torch.distributed's own would keep to itself what torchft/crash.py prints before it leaves
    _host_group.append(dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))


def _backend(model: ModelConfig) -> str:
    """Of the default group, and so of the mesh: weights in CPU memory are summed and gathered there outside of a forward."""
    if not torch.cuda.is_available():
        return "gloo"
    return "cpu:gloo,cuda:nccl" if "weights" in model.offload else "nccl"


def leave_processes() -> None:
    """Meet all others, then close the groups: leaving while another still talks can abort it."""
    dist.barrier(_host_group[0])
    _host_group.clear()
    dist.destroy_process_group()


_host_group: list[dist.ProcessGroup] = []  # one, between join_processes and leave_processes


def divide(
    model: CausalLM, cfg: ModelConfig, device: torch.device, kept: torch.dtype | None = None, computed: torch.dtype | None = None
) -> ShardReport:
    """Divide a model on meta as `model.shard` says: over all processes, over groups of n of them, or by what fits.

    auto: a frozen base and its adapters that take at most 40% of the GPU, gradients and moments included, stay whole on each
    process, else (and on CPUs, which share one memory, and where all is trained) they are divided over all. Nothing travels
    of what is whole but the adapters' gradients: `mean_gradients`. Of fused blocks the frozen weights alone are divided
    (divided_blocks.py), of all else every parameter, by FSDP2. `kept`, `computed`: dtypes of a model trained whole, as it lies and
    as it is gathered to compute with.
    """
    world = world_size()
    in_cpu_memory = "weights" in cfg.offload
    if world == 1 and kept == computed and not in_cpu_memory:
        return ShardReport(1, 1, 0, ())  # FSDP2 would copy every weight for nothing
    parts = int(cfg.shard) if cfg.shard.isdecimal() else world
    if not all(param.requires_grad for param in model.parameters()):
        whole = parts == 1 or (cfg.shard == "auto" and device.type == "cuda" and _fits(model, cfg, device))
        if not highest(int(not whole)):  # GPUs of two sizes: one answer
            return ShardReport(1, world, 0, ())
    shape, names = ((world,), ("shard",)) if parts == world else ((world // parts, parts), ("copies", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    if not in_cpu_memory and _base_alone(model, parts, device):
        from torchft.divided_blocks import divide_blocks  # here: Triton is not everywhere

        reason = _why_gathered(cfg, parts, device)
        copies = not highest(int(reason != ""))
        fetched = "copied from the other GPUs" if copies else f"gathered ({reason or 'as another process must'})"
        return ShardReport(parts, world // parts, divide_blocks(model, mesh, copies=copies), (), fetched=fetched)
    return shard_model(model, mesh, compute_dtype=computed, in_cpu_memory=in_cpu_memory)


def _base_alone(model: CausalLM, parts: int, device: torch.device) -> bool:
    """Whether to divide the frozen weights of fused blocks alone: what is trained must be small enough to be whole on each."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    possible = not trained_beside_adapters(model) and all(block.can_be_divided(parts) for block in model.model.layers)
    return not highest(int(not possible or _trained_bytes(model) > ADAPTERS_FIT * total))


def _why_gathered(cfg: ModelConfig, parts: int, device: torch.device) -> str:
    """Why this process cannot copy rows out of the others' memory, or ""."""
    if cfg.kernels.get("peers") == "eager":
        return "model.kernels says so"
    if not _sees_peers(parts, device):
        return "this process cannot read the others' memory"
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    if torch.cuda.get_allocator_backend() != "native" or settings.get("expandable_segments"):
        return "PYTORCH_CUDA_ALLOC_CONF: expandable_segments and other backends have no memory that others can read"
    return ""


def _sees_peers(parts: int, device: torch.device) -> bool:
    """Whether this GPU can read the memory of those of the processes that share a model with it."""
    if device.type != "cuda":
        return False
    first = rank() - rank() % parts  # of them; those on this host are numbered there as they are among all
    others = [local_rank() + other - rank() for other in range(first, first + parts) if other != rank()]
    on_host = range(local_world_size())
    return all(other in on_host and torch.cuda.can_device_access_peer(local_rank(), other) for other in others)


def _trained_bytes(model: CausalLM) -> int:
    return sum(16 * param.numel() for param in model.parameters() if param.requires_grad)  # fp32, gradient, two moments


def _fits(model: CausalLM, cfg: ModelConfig, device: torch.device) -> bool:
    dense_bytes = getattr(torch, cfg.dtype).itemsize

    def each(param: torch.Tensor) -> float:
        if int8_head.is_int8(param):
            return 1
        if fp8.is_fp8(param):
            return 2  # fused blocks may keep a transpose: torchft/fused_fp8.py
        return nf4.BYTES if isinstance(param, nf4.NF4Tensor) else dense_bytes

    frozen_bytes = sum(param.numel() * each(param) for param in frozen_on_device(model))
    return frozen_bytes + _trained_bytes(model) <= FITS * torch.cuda.get_device_properties(device).total_memory


def sync_gradients(model: CausalLM, now: bool) -> None:
    """Of a divided model: whether the next backward averages gradients over the processes, or each adds to those that it has."""
    if isinstance(next(param for param in model.parameters() if param.requires_grad), DTensor):  # all that are trained, or none
        model.set_requires_gradient_sync(now)


@torch.no_grad()
def mean_gradients(params: dict[str, nn.Parameter]) -> None:
    """Average the gradients of parameters that every process holds whole; FSDP2 does so with divided ones in backward.

    Once a step, behind the last backward. All processes must call it with the same parameters. They get the same bits, and an
    update of the same moments keeps it so: nothing else ever makes the processes' parameters equal again.
    """
    held = [param for param in params.values() if not isinstance(param, DTensor)]
    for bucket in _buckets(held) if world_size() > 1 else ():
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in bucket]
        flat = sum_over_processes(torch.cat([grad.flatten() for grad in grads])).div_(world_size())
        for param, mean in zip(bucket, flat.split([grad.numel() for grad in grads]), strict=True):
            param.grad = mean.view_as(param)


def _buckets(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In their order, each but the last of at least BUCKET elements together."""
    bucket: list[nn.Parameter] = []
    for param in params:
        bucket.append(param)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The sum of a device tensor over all processes, in place."""
    if _host_group:
        dist.all_reduce(value)
    return value


def highest(number: int) -> int:
    """The largest of all processes' numbers, which all must give. Waits for the hosts, not for the devices."""
    return int(highest_each(torch.tensor([number])).item())


def highest_each(values: torch.Tensor) -> torch.Tensor:
    """Of each element the largest of all processes' ones, in place, for a tensor on the CPU. Waits for the hosts as `highest`."""
    if _host_group:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=_host_group[0])
    return values


def from_main(make: Callable[[], T]) -> T:
    """`make()` of process 0 on all processes; a UserError that it raises there is raised on all."""
    if not _host_group:
        return make()
    result: list = [None, None]
    if rank() == 0:
        try:
            result[0] = make()
        except UserError as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0, group=_host_group[0])
    if result[1] is not None:
        raise result[1]
    return result[0]


def tensors_from_main(read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Like `from_main` for tensors on the CPU, which travel one by one and not as a pickle of all of them."""
    if not _host_group:
        return read()
    held: dict[str, torch.Tensor] = {}

    def shapes() -> list[tuple[str, torch.Size, torch.dtype]]:
        held.update(read())
        return [(name, tensor.shape, tensor.dtype) for name, tensor in held.items()]

    for name, shape, dtype in from_main(shapes):
        tensor = held.setdefault(name, torch.empty(0)) if rank() == 0 else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor, src=0, group=_host_group[0])
        held[name] = tensor
    return held


def check_agreement(values: dict[str, str | None]) -> None:
    """Raises UserError unless all processes have the same values, such as the fingerprint of the data each one reads."""
    for name, mine in values.items():
        others = from_all(mine)
        differing = [number for number, other in enumerate(others) if other != others[0]]
        if differing:
            raise UserError(
                f"process(es) {', '.join(map(str, differing))} read another {name} than process 0: give all nodes the same files"
            )


def main_tensor(value: torch.Tensor) -> torch.Tensor:
    """Process 0's values in the tensor of every process, in place; all have its shape."""
    if _host_group:
        dist.broadcast(value, src=0)
    return value


def from_all(value: T) -> list[T]:
    """Every process's value, by rank."""
    values = [value]
    if _host_group:
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=_host_group[0])
    return values


@contextmanager
def node_leader_first() -> Iterator[None]:
    """The block runs on the first process of each node, then on the others, which find in a cache what it made."""
    if local_rank() > 0 and _host_group:
        dist.barrier(_host_group[0])
    yield
    if local_rank() == 0 and _host_group:
        dist.barrier(_host_group[0])
