"""Linears with LoRA adapters as single matrix products: the adapter's rank is folded into the base weight's own dimensions.

    y = x W^T + (x (sA)^T) B^T = [x, x (sA)^T] [W, B]^T            one product, its sum taken in fp32 before it is rounded
    dx = [dy, dy B] [W; sA]                                        again one

W (O, D) is frozen, A (R, D) and B (O, R) are trained; several linears of the same input (q, k and v; gate and up) are one,
their weights above each other, their A too, and their B on a diagonal of blocks. All of it stands in one matrix E:

    E (O + P, D + P) = [ W   B ]       P: the ranks' sum R, rounded up to 64; what is beyond R is zero
                       [ sA  0 ]

so that both products read slices of it. Added in two steps, as it is usual, the adapter's small term would meet a base output
that bf16 has rounded already, and its first updates would be lost; and each linear's skinny products and sums, which
are bound by memory, would read and write the activations six times more (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A packed E is kept, and the frozen weights are views of it; one whose rows are on several processes is fetched
(torchft/divided_blocks.py); for NF4 weights, and for those that FSDP2 gathers, E is made for each product and dropped. Its lower
right corner is never read. Three functions share this file: `lora_linear` here, `lora_norm_linear` and `lora_swiglu_linear`. They are
autograd Functions and no library ops, which would cost the CPU some 0.5 ms each: more than the GPU needs for one at 2,048 tokens.
Blocks made of them are not compiled, there is nothing left between them to fuse.

Legend: T tokens, D input width, O output width (all linears together), P padded rank, s alpha / rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.nf4 import dequantize_into

RANK_MULTIPLE = 64  # a matrix product's step along its inner dimension: less is padded there anyway
STRIP_ROWS = 64  # of E's right strip per program: 8 KiB in bf16
ROW_BLOCK = 1024  # columns of sA per program, for all of its rows
NF4_PARTS = 5  # storage tensors of an NF4 weight, see kernels/nf4.py


class Group(NamedTuple):
    """Linears of one input. `base`: [E] if packed, else per linear its dense weight or its NF4 storage, as `kinds` says; or
    neither, and `fetch` brings E when a product is due."""

    base: list[Tensor]
    kinds: str  # "p": packed; else one letter per linear: d dense, n NF4
    a: list[Tensor]  # (r, D) each
    b: list[Tensor]  # (o, r) each
    scale: float
    fetch: Callable[[], Tensor] | None = None


def padded_rank(b: list[Tensor]) -> int:
    """P for these B."""
    rank = sum(part.shape[1] for part in b)
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


@triton.jit
def _adapter_kernel(
    p_a, p_b, p_below, p_beside, O, D, P, stride_a, stride_b, stride_e, scale, offset, strips,
    RANK: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One linear's adapter into E. The first `strips` programs: rows of [0 .. 0, B, 0 .. 0], B from column offset on, whole rows so
    that whole sectors are written. The others: BLOCK columns of each row of sA."""
    i_program = tl.program_id(0).to(tl.int64)
    if i_program < strips:
        o_row = i_program * ROWS + tl.arange(0, ROWS)[:, None]
        o_column = tl.arange(0, PAD)[None, :]
        m_b = (o_row < O) & (o_column >= offset) & (o_column < offset + RANK)
        b_b = tl.load(p_b + o_row * stride_b + (o_column - offset), mask=m_b, other=0.0)
        m_out = (o_row < O) & (o_column < P)  # PAD is the next power of two
        tl.store(p_beside + o_row * stride_e + o_column, b_b.to(p_beside.dtype.element_ty), mask=m_out)
    else:
        o_d = (i_program - strips) * BLOCK + tl.arange(0, BLOCK)
        for i in range(0, RANK):
            i_rank = tl.cast(i, tl.int64)
            b_a = tl.load(p_a + i_rank * stride_a + o_d, mask=o_d < D, other=0.0) * scale
            tl.store(p_below + i_rank * stride_e + o_d, b_a.to(p_below.dtype.element_ty), mask=o_d < D)


def new_extended(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> Tensor:
    """E with nothing in it yet."""
    out_width, width, pad = sum(part.shape[0] for part in b), a[0].shape[1], padded_rank(b)
    return torch.empty(out_width + pad, width + pad, dtype=dtype, device=a[0].device)


@torch.no_grad()
def write_adapters(extended: Tensor, a: list[Tensor], b: list[Tensor], scale: float, *, eager: bool = False) -> None:
    """Put sA and B into E, in its dtype, and zeros around them."""
    out_width, width = sum(part.shape[0] for part in b), a[0].shape[1]
    row, rank = 0, 0
    for part_a, part_b in zip(a, b, strict=True):
        (rows, ranks) = part_b.shape
        below, beside = extended[out_width + rank :, :width], extended[row : row + rows, width:]
        _write_adapter(below, beside, part_a, part_b, scale, rank, eager)
        row, rank = row + rows, rank + ranks
    extended[out_width + rank :, :width].zero_()


def _write_adapter(
    below: Tensor, beside: Tensor, a: Tensor, b: Tensor, scale: float, offset: int, eager: bool
) -> None:
    """sA into the first rows of `below` (.., D); B into columns offset .. offset + r of `beside` (O, P), zeros in the others."""
    (rows, rank), (width, pad) = b.shape, (a.shape[1], beside.shape[1])
    if eager:
        torch.mul(a, scale, out=below[:rank])
        beside.zero_()
        beside[:, offset : offset + rank].copy_(b)
    elif pad > 0 and rows + rank > 0:
        strips = triton.cdiv(rows, STRIP_ROWS)
        grid = (strips + triton.cdiv(width, ROW_BLOCK) * (rank > 0),)
        strides = a.stride(0), b.stride(0), below.stride(0)
        sizes = {"RANK": rank, "PAD": triton.next_power_of_2(pad), "ROWS": STRIP_ROWS, "BLOCK": ROW_BLOCK}
        _adapter_kernel[grid](a, b, below, beside, rows, width, pad, *strides, scale, offset, strips, **sizes)


def extended_weight(group: Group, dtype: torch.dtype, eager: bool, adapters_only: bool = False) -> Tensor:
    """E of a group: the packed or fetched one, or a new one; with adapters_only that need not have more than its last P rows, [sA 0]."""
    if group.fetch is not None:
        return group.fetch()
    if group.kinds == "p":
        return group.base[0]
    if adapters_only:
        rest = [part[:0] for part in group.b]
        extended = new_extended(group.a, rest, dtype)
        write_adapters(extended, group.a, rest, group.scale, eager=not extended.is_cuda)
        return extended
    extended = new_extended(group.a, group.b, dtype)
    parts, row, width = iter(group.base), 0, group.a[0].shape[1]
    for kind, part_b in zip(group.kinds, group.b, strict=True):
        place = extended[row : row + part_b.shape[0], :width]
        if kind == "n":
            dequantize_into(*(next(parts) for _ in range(NF4_PARTS)), place, eager=eager)
        else:
            place.copy_(next(parts))
        row += part_b.shape[0]
    write_adapters(extended, group.a, group.b, group.scale, eager=not extended.is_cuda)
    return extended


def project(wide: Tensor, extended: Tensor, pad: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """wide (T, D + P) with x in its first D columns, the others are filled here -> y (T, O), x (sA)^T (T, P)."""
    width, out_width = wide.shape[1] - pad, extended.shape[0] - pad
    torch.mm(wide[:, :width], extended[out_width:, :width].T, out=wide[:, width:])
    return _folded(wide, extended[:out_width], bias), wide[:, width:].clone()  # so that the rest of `wide` can go


def _folded(wide: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """wide weight^T, rounded once, with the bias in it."""
    return wide @ weight.T if bias is None else torch.addmm(bias, wide, weight.T)


def input_gradient(dy: Tensor, extended: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """dy (T, O) -> dx (T, D), dy B (T, P): by [dy, dy B] [W; sA], for which dy is copied: where O is small."""
    width, out_width = extended.shape[1] - pad, extended.shape[0] - pad
    dyb = dy @ extended[:out_width, width:]
    return torch.cat((dy, dyb), 1) @ extended[:, :width], dyb


def adapter_gradients(dyb: Tensor, x: Tensor, dy: Tensor, xa: Tensor, group: Group) -> list[Tensor]:
    """Gradients of all A, then of all B, in fp32: dA = s (dy B)^T x, dB = dy^T (x (sA)^T)."""
    da, db = _mm_fp32(dyb.T, x), _mm_fp32(dy.T, xa)  # (P, D), (O, P); of the latter the blocks on the diagonal
    ranks = [part.shape[1] for part in group.b]
    rows = [part.shape[0] for part in group.b]
    grads = [part * group.scale for part in da.split([*ranks, da.shape[0] - sum(ranks)])[:-1]]
    first = 0
    for part, rank in zip(db.split(rows), ranks, strict=True):
        grads.append(part[:, first : first + rank])
        first += rank
    return grads


def _mm_fp32(x: Tensor, y: Tensor) -> Tensor:
    """A product over many tokens, not rounded to bf16 before it becomes a gradient."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda and x.dtype != torch.float32 else (x @ y).float()


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group, bias: Tensor | None, eager: str, *adapters: Tensor) -> Tensor:
        extended, pad = extended_weight(group, x.dtype, "nf4" in eager), padded_rank(group.b)
        width, out_width = x.shape[1], extended.shape[0] - pad
        xa = x @ extended[out_width:, :width].T
        # cat: 38 us for 8,192 x 4,096 in bf16, where a copy into the columns of a wider tensor takes 81 (H200)
        y = _folded(torch.cat((x, xa), 1), extended[:out_width], bias)
        ctx.save_for_backward(x, xa)
        # Not as saved tensors: a packed E is written again by a second forward, with the same values.
        ctx.group, ctx.eager = group, eager
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x, xa), group, dy = ctx.saved_tensors, ctx.group, dy.contiguous()
        extended = extended_weight(group, x.dtype, "nf4" in ctx.eager)
        dx, dyb = input_gradient(dy, extended, padded_rank(group.b))
        return dx, None, None, None, *adapter_gradients(dyb, x, dy, xa, group)


def lora_linear(x: Tensor, group: Group, bias: Tensor | None = None, eager: str = "") -> Tensor:
    """x W^T + s x A^T B^T + bias: x (T, D) contiguous -> (T, O), with gradients for x, A and B.

    `eager`: names of kernels, separated by blanks, that plain PyTorch shall do instead (here: nf4).
    """
    return _LoraLinear.apply(x, group, bias, eager, *group.a, *group.b)
