"""The most GPU memory that a step of fused QLoRA takes, counted on meta tensors: nothing is computed, and no GPU is needed.

Every storage that an op makes is counted from then until it is gone, as PyTorch's allocator would, in blocks of 512 bytes;
kernels do nothing, so that what they are given has been counted already. Left out: the 32 MiB or so that cuBLAS keeps for
itself, fragments, the compiled parts. For Llama-3.1-8B at 2048 x 1, NF4, recomputed, it says 6.72 GiB; an H200 took 6.80 before
blocks freed some of it earlier (then it said 6.76).
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from torchft import fused_block
from torchft.fuse import swap
from torchft.kernels import int8_rows, launch, lora_linear, rms_norm, rope
from torchft.kernels import linear_cross_entropy as loss_kernel
from torchft.models import build_model
from torchft.modules import nf4, offload
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.host_embedding import HostEmbedding
from torchft.modules.lora import LoraSpec, add_lora, trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.storage import store_frozen


class Live(TorchDispatchMode):
    """Bytes of all meta storages there are, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[weakref.ref, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # an NF4Tensor's own storage is imaginary
            if isinstance(tensor, Tensor) and tensor.is_meta and not isinstance(tensor, nf4.NF4Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.sizes:
            self.sizes[key] = weakref.ref(storage, lambda _: self.forget(key)), size
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)[1]


class _Attention(torch.autograd.Function):
    """What a flash attention keeps: its inputs, its output as (B, T, H, E) and a number per head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Loss(torch.autograd.Function):
    """The loss op, whose inside a dispatch mode would not see."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(loss_kernel._walk((hidden, weight, scale, labels), None, 0, [True, False], eager=False)[1])
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * upstream, None, None, None


def _input_gradient(dlogits: Tensor, codes: Tensor, scale: Tensor | None, out: Tensor, eager: bool) -> None:
    """What int8_rows.input_gradient_into makes on CUDA."""
    if scale is not None:
        total = torch.zeros(out.shape, device="meta")
        assert sum(len(weight) for _, weight in int8_rows._decoded(codes, scale, dlogits.dtype, eager)) == len(codes)
        out.copy_(total)


def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: lambda *args, **options: None)
    for module in (launch, rms_norm, rope):
        monkeypatch.setattr(module, "can_run", lambda tensor: True)
    # As on CUDA, where products of bf16 are summed into fp32 without a copy in between.
    monkeypatch.setattr(lora_linear, "_mm_fp32", lambda x, y: torch.empty(len(x), y.shape[1], device="meta"))
    monkeypatch.setattr(lora_linear, "_write_adapter", lambda *args: None)
    monkeypatch.setattr(loss_kernel, "input_gradient_into", _input_gradient)
    monkeypatch.setattr(fused_block, "attend", lambda q, k, v, mask: _Attention.apply(q, k, v))
    # The host's memory is left out; a meta tensor's has no address.
    monkeypatch.setattr(offload.HostMemory, "take", lambda self, num_bytes: torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(offload.Link, "send", lambda self, copies: None)
    monkeypatch.setattr(offload, "address", lambda x: x.untyped_storage()._cdata)
    rows = lambda self, ids: torch.empty(*ids.shape, self.embedding_dim, dtype=self.weight.dtype, device="meta")  # noqa: E731
    monkeypatch.setattr(HostEmbedding, "forward", rows)


def _fill(model: CausalLM) -> None:
    """Parameters of which the mode sees the memory; a table in CPU memory has none."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, param in list(module.named_parameters(recurse=False)):
            if isinstance(param, nf4.NF4Tensor):
                names, context = param.__tensor_flatten__()
                inner = {name: torch.empty_like(getattr(param, name)) for name in names}
                value = nf4.NF4Tensor.__tensor_unflatten__(inner, context, param.shape, param.stride())
            else:
                value = torch.empty_like(param[:0] if isinstance(module, HostEmbedding) else param)
            made.setdefault(id(param), nn.Parameter(value, requires_grad=param.requires_grad))
            setattr(module, leaf, made[id(param)])


def step_peak(
    config: dict[str, Any], quantize: str, offloaded: list[str], *, tokens: int, state_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Bytes, for adapters of rank 16 on all linears, everything recomputed; state_bytes: the optimizer's per trained parameter."""
    with torch.device("meta"):
        model = build_model(config).to(torch.bfloat16)
    add_lora(model, LoraSpec(16, 32.0))
    store_frozen(model, quantize, offloaded)
    swap(model, ())
    apply_activation_checkpointing(model, "full", bool({"activations", "block_inputs"} & {*offloaded}), "activations" in offloaded)
    model.head_loss = lambda hidden, weight, labels, scale: _Loss.apply(hidden, weight, labels, scale)
    with monkeypatch.context() as patch, Live() as live:
        _no_kernels(patch)
        _fill(model)
        trained = trainable_parameters(model).values()
        states = [torch.empty(int(param.numel() * state_bytes), dtype=torch.uint8, device="meta") for param in trained]
        ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
        model(ids, labels=ids).backward()
        assert len(states) == sum(param.grad is not None for param in trained)
    return live.peak
