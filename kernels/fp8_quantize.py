"""Rows to e4m3 (3 bits of mantissa), each with its own scale (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).

    v = x factor          factor: one per column, or none
    scale = max |v| / 448            448: the largest e4m3, which has no infinity
    code = round(v 448 / max |v|)    to the nearest, ties to even

so that code * scale is within 1/16 of v, or for the smallest within scale / 1024. All arithmetic is fp32. Backward's products
use the factor: the scales of W's output rows, on which dy W sums, go into dy. A row of zeros, or of numbers below 1e-30,
becomes zeros; a row with an infinity or a NaN holds a NaN, so that the step is found not to be finite.

`quantize_row` is also the end of kernels that write a row: it finds the row in a cache.

Legend: T rows (tokens), D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels.launch import can_run, check_rows

DTYPE = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
SMALLEST_ROW = tl.constexpr(1e-30)  # the inverse of a smaller one would leave fp32
PER_THREAD = 32  # numbers of a row that a thread holds: with 16 a row of 4,096 takes 1.5 times as long, of 28,672 1.25 times
MAX_HELD, PART = 2**15, 4096  # a row is read once if it is no wider; else in parts and twice, the second time from a cache


@triton.jit
def _values(p_x, p_factor, o_d, D):
    """v of a row that begins at p_x."""
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    if p_factor is not None:
        b_x *= tl.load(p_factor + o_d, mask=o_d < D, other=0.0)
    return b_x


@triton.jit
def quantize_row(p_x, p_factor, p_codes, p_scale, i_row, x_stride, D, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """One row of x (.., D) to one of codes, contiguous, and its scale, by a whole program. BLOCKS: of a row."""
    b_largest, b_x = tl.full((BLOCK,), SMALLEST_ROW, dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, BLOCKS):
        b_x = _values(p_x + i_row * x_stride, p_factor, i * BLOCK + tl.arange(0, BLOCK), D)
        b_largest = tl.maximum(b_largest, tl.abs(b_x))
    largest = tl.max(b_largest, axis=0)
    b_inverse = tl.div_rn(tl.full((BLOCK,), LARGEST, dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32) + largest)
    for i in range(0, BLOCKS):
        o_d = i * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            b_x = _values(p_x + i_row * x_stride, p_factor, o_d, D)
        # saturating, and it keeps NaN: the largest number may come out one fp32 step above 448
        tl.store(p_codes + i_row * D + o_d, (b_x * b_inverse).to(p_codes.dtype.element_ty), mask=o_d < D)
    tl.store(p_scale + i_row, tl.div_rn(largest, 448.0))


@triton.jit
def _quantize_kernel(p_x, p_factor, p_codes, p_scale, x_stride, D, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """A row per program."""
    quantize_row(p_x, p_factor, p_codes, p_scale, tl.program_id(0).to(tl.int64), x_stride, D, BLOCK, BLOCKS)


def new_codes(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (rows, width) e4m3 and scales (rows,) fp32 to be written."""
    return torch.empty(rows, width, dtype=DTYPE, device=device), torch.empty(rows, dtype=torch.float32, device=device)


def quantize_rows(x: Tensor, factor: Tensor | None = None, *, eager: bool = False) -> tuple[Tensor, Tensor]:
    """codes (T, D) e4m3, contiguous, and scales (T,) fp32 of x * factor. No autograd.

    Args:
        x: (T, D) of any float dtype; its rows may be strided.
        factor: (D,) fp32, or None.
        eager: compute with PyTorch ops.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    rows, width = x.shape
    check_rows("x", x, (rows, width))
    if factor is not None:
        check_rows("factor", factor, (width,), torch.float32)
    if eager:
        return quantize_rows_eager(x, factor)
    if not can_run(x):
        raise ValueError(f"quantize_rows: Triton does not run on {x.device}; pass eager=True")
    codes, scale = new_codes(rows, width, x.device)
    block = triton.next_power_of_2(width) if width <= MAX_HELD else PART
    sizes = {"BLOCK": block, "BLOCKS": triton.cdiv(width, block), "num_warps": max(block // (32 * PER_THREAD), 1)}
    if rows > 0:
        _quantize_kernel[(rows,)](x, factor, codes, scale, x.stride(0), width, **sizes)
    return codes, scale


def quantize_rows_eager(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's ops."""
    x = x.float() if factor is None else x.float() * factor
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_ROW.value)
    # A tensor: a number divided by a tensor is rounded twice, and on a GPU a tensor divided by a number too.
    top = torch.full_like(largest, LARGEST.value)
    return (x * (top / largest)).to(DTYPE), (largest / top).squeeze(1)
