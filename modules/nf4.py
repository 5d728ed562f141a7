"""NF4 storage for frozen linear weights (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A weight becomes 4-bit codes into a table of 16 values (the quantiles of a normal distribution), 64 weights to a block.
Each block is scaled by its largest magnitude, and those scales are themselves stored in 8 bits, 256 to a scaler block,
around one mean per tensor ("double quantisation"): 4.13 bits per weight.

The tensor type and the encoder are torchao's `NF4Tensor`; beside torchft/optim.py and optimizer_state.py, which take its
8-bit AdamW, this is the only file that imports torchao. Decoding is ours, bitwise equal to torchao's `get_original_weight`
but without its int64 index of the whole tensor: the only dense temporary is the decoded weight itself. Left out: training an NF4 weight, other block sizes.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from torchft.modules.compiler import missing_compiler
from torchft.modules.routing import ROUTERS


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import torchao without its log lines: on CPU it warns about kernels that are made for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():  # about its own source text, where it was installed without compiling it
            warnings.simplefilter("ignore", SyntaxWarning)
            yield
    finally:
        logging.disable(before)


with quiet_import():
    from torchao.quantization import NF4Tensor
    from torchao.quantization import to_nf4 as torchao_to_nf4

BLOCK_SIZE = 64  # weights per scale
SCALER_BLOCK_SIZE = 256  # scales per scale of scales
BYTES = 0.5 + 1 / BLOCK_SIZE + 4 / (BLOCK_SIZE * SCALER_BLOCK_SIZE)  # per weight
DIVISOR = BLOCK_SIZE * SCALER_BLOCK_SIZE  # 16,384: a tensor holds whole scaler blocks, or it cannot be NF4
DENSE = ("lm_head", *ROUTERS)  # linears that stay as they are
CHUNK_BYTES = 2**20  # codes decoded at once without a compiler: bounds the int32 index to 4 MiB


def to_nf4(weight: Tensor) -> NF4Tensor:
    """Quantise a floating tensor of a multiple of 16,384 weights, in its own dtype; it may lie on meta."""
    if weight.numel() % DIVISOR:
        raise ValueError(
            f"NF4 stores whole groups of {DIVISOR:,} weights, and a tensor of shape {tuple(weight.shape)} has "
            f"{weight.numel():,}; keep it dense (quantize_nf4 does that by itself and reports it)"
        )
    return torchao_to_nf4(weight.detach().contiguous(), BLOCK_SIZE, SCALER_BLOCK_SIZE)


def dequantize(weight: NF4Tensor) -> Tensor:
    """The dense weight in its own dtype, bitwise torchao's. The caller owns the result; gradients do not flow."""
    assert weight.is_contiguous(), "decoding a transposed view would return the untransposed weight"
    return torch.ops.torchft.nf4_dequantize(*_storage(weight), weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for a dense or an NF4 weight, in x's dtype.

    Args:
        x: (..., in).
        weight: (out, in). An NF4 weight gets no gradient and is decoded again in backward, so that no dense copy of it
            is kept between the passes.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if not isinstance(weight, NF4Tensor):
        return F.linear(x, weight, bias)
    y = torch.ops.torchft.nf4_matmul(x, *_storage(weight), weight.shape[0], True)
    return y if bias is None else y + bias


class NF4Linear(nn.Linear):
    """A frozen nn.Linear whose `weight` is an NF4Tensor. Made by `quantize_nf4`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class NF4Report:
    """What `quantize_nf4` did, for one printed line. `skipped`: (name, why) of frozen linears that stay dense."""

    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        line = f"NF4: {len(self.quantized)} frozen linears in 4 bits, {len(self.skipped)} left dense"
        if self.skipped:
            name, why = self.skipped[0]
            line += f" (first: {name}, {why})"
        return line


def quantize_nf4(model: nn.Module) -> NF4Report:
    """Give every frozen linear but lm_head and routers an NF4 weight. Embeddings and trained modules stay dense too.

    Meant for a model on meta, after `add_lora` and before the weights are streamed in: loading then quantises tensor by
    tensor and the dense model never exists. Works on real weights too. Plain linears are replaced by `NF4Linear`, which
    shares their bias.

    Raises:
        ValueError: no linear is frozen, so there is nothing that may be quantised.
    """
    linears = frozen_linears(model, "NF4")
    quantized, skipped = [], []
    on_meta: dict[tuple[torch.Size, torch.dtype], NF4Tensor] = {}  # the first of each shape
    for name, module in linears:
        if module.weight.numel() % DIVISOR:
            skipped.append((name, f"{tuple(module.weight.shape)} is not a multiple of {DIVISOR:,} weights"))
            continue
        weight = nn.Parameter(_to_nf4_once(module.weight, on_meta), requires_grad=False)
        if type(module) is nn.Linear:  # its forward would reach torchao's own decoder
            plain, module = module, NF4Linear(module.in_features, module.out_features, bias=False, device="meta")
            module.bias = plain.bias
            model.set_submodule(name, module)
        module.weight = weight
        quantized.append(name)
    return NF4Report(tuple(quantized), tuple(skipped))


def frozen_linears(model: nn.Module, storage: str) -> list[tuple[str, nn.Linear]]:
    """What another storage type may hold: every frozen linear but lm_head and routers, by name. Raises ValueError if there is none."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in DENSE and not module.weight.requires_grad
    ]
    if not linears:
        raise ValueError(
            f"{storage} is storage for frozen weights, but every linear of the model is trained; call add_lora (or "
            f"requires_grad_(False), if nothing is to be trained) before quantize_{storage.lower()}"
        )
    return linears


def _to_nf4_once(weight: Tensor, on_meta: dict[tuple[torch.Size, torch.dtype], NF4Tensor]) -> NF4Tensor:
    """to_nf4, but on meta only for the first of a shape: torchao quantises op by op there too, 30 ms a weight."""
    kind = (weight.shape, weight.dtype)
    if not weight.is_meta or kind not in on_meta:
        quantized = to_nf4(weight)
        if weight.is_meta:
            on_meta[kind] = quantized
        return quantized
    first = on_meta[kind]
    names, context = first.__tensor_flatten__()
    storage = {name: torch.empty_like(getattr(first, name)) for name in names}
    return NF4Tensor.__tensor_unflatten__(storage, context, first.shape, first.stride())


# Library ops instead of an autograd.Function around `_decode`: torch.compile traces a Function's two decodes into one
# graph, merges them as a common subexpression and keeps the dense weight from forward to backward (seen with torch
# 2.13). Two opaque nodes cannot be merged.
@torch.library.custom_op("torchft::nf4_dequantize", mutates_args=())
def _dequantize(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, rows: int) -> Tensor:
    """The dense weight (rows, columns) of the five storage tensors."""
    return _decode(codes, scalers, factor, mean, table).view(rows, -1)


@_dequantize.register_fake
def _(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, rows: int) -> Tensor:
    return table.new_empty(rows, codes.numel() * 2 // rows)


@torch.library.custom_op("torchft::nf4_matmul", mutates_args=())
def _matmul(
    x: Tensor, codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, rows: int, transposed: bool
) -> Tensor:
    """x W^T if transposed, else x W, for the weight (rows, columns) of the five storage tensors."""
    weight = _decode(codes, scalers, factor, mean, table).view(rows, -1).to(x.dtype)
    return x @ (weight.T if transposed else weight)


@_matmul.register_fake
def _(
    x: Tensor, codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, rows: int, transposed: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows if transposed else codes.numel() * 2 // rows)


def _save_storage(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, *storage, rows, transposed = inputs
    assert transposed, "only the forward product is differentiable"
    ctx.save_for_backward(*storage)  # parameters of the model: nothing new is kept
    ctx.rows = rows


def _grad_x(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.torchft.nf4_matmul(grad, *ctx.saved_tensors, ctx.rows, False), *[None] * 7


_matmul.register_autograd(_grad_x, setup_context=_save_storage)


def part(weight: NF4Tensor, parts: int, index: int) -> NF4Tensor:
    """One of `parts` equal parts of the rows, with memory of its own; its codes and scales are those of the whole."""
    chunk = weight.chunk(parts)[index]  # views, which would keep all of the weight alive
    names, context = chunk.__tensor_flatten__()  # chunk.clone() decodes and encodes again, around another mean
    inner = {name: getattr(chunk, name).clone() for name in names}
    return NF4Tensor.__tensor_unflatten__(inner, context, chunk.shape, chunk.stride())


def storage(weight: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that hold a weight: itself, or for NF4 those of `_storage`."""
    return _storage(weight) if isinstance(weight, NF4Tensor) else (weight,)


def _storage(weight: NF4Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of N weights: codes uint8 (N/2,), scalers int8 (N/64,), their factors (N/16384,) and mean (), the table (16,)."""
    return weight.quantized_data, weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean, weight.nf4


@torch.no_grad()  # also in forward, so that the kernel is compiled for one grad mode, not for two
def _decode(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor) -> Tensor:
    """All weights in storage order, (N/64, 32, 2), in the table's dtype.

    The scales are computed op by op, because torchao rounds them to the weight's dtype after each one and a fused
    kernel would not. What remains is one rounded product per weight, the same in every implementation.
    """
    scales = (scalers.view(-1, SCALER_BLOCK_SIZE) / factor.unsqueeze(-1)).flatten().to(table.dtype) + mean  # (N/64,)
    blocks = codes.view(-1, BLOCK_SIZE // 2)  # two weights per byte, the first in the high bits
    if codes.is_cuda and _can_compile():
        return _compiled_lookup()(blocks, scales, table)
    return _chunked_lookup(blocks, scales, table)


def _lookup(blocks: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """table[code] * scale: blocks uint8 (N/64, 32), scales (N/64,), table (16,) -> (N/64, 32, 2).

    Compiled, it is one pointwise kernel with no index in memory. The same lines run eagerly would make several tensors
    of all codes, so a stance that switches compilation off (generation, checks) takes the chunks.
    """
    if not torch.compiler.is_compiling():
        return _chunked_lookup(blocks, scales, table)
    shift = 4 - 4 * torch.arange(2, device=blocks.device, dtype=torch.uint8)  # (4, 0): high half first
    codes = (blocks.unsqueeze(-1) >> shift) & 15
    return table[codes.to(torch.int32)] * scales.view(-1, 1, 1)


def _chunked_lookup(blocks: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The same without a compiler: both weights of a byte are looked up at once, a chunk of bytes at a time."""
    byte = torch.arange(256, device=table.device)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=-1)  # (256, 2)
    out = table.new_empty(*blocks.shape, 2)
    step = CHUNK_BYTES // blocks.shape[1]
    for start in range(0, blocks.shape[0], step):
        chunk = out[start : start + step]
        index = blocks[start : start + step].flatten().to(torch.int32)
        torch.index_select(pairs, 0, index, out=chunk.view(-1, 2))
        chunk.mul_(scales[start : start + step].view(-1, 1, 1))
    return out


@functools.cache
def _compiled_lookup() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_lookup, dynamic=True)  # one compilation for all weight sizes


@functools.cache
def _can_compile() -> bool:
    """Whether torch.compile can build a CUDA kernel here; says so once where it cannot."""
    missing = missing_compiler(torch.device("cuda"))
    if missing:
        warnings.warn(f"NF4 weights are decoded several times slower, since this machine lacks {missing}", stacklevel=2)
    return not missing
