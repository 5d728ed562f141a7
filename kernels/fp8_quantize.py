"""Rows to e4m3 (3 bits of mantissa), each with its own scale (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).

    v = x factor          factor: one per column, or none
    scale = max |v| / 448            448: the largest e4m3, which has no infinity
    code = round(v 448 / max |v|)    to the nearest, ties to even

so that code * scale is within 1/16 of v, or for the smallest within scale / 1024. All arithmetic is fp32. Backward's products
use the factor: the scales of W's output rows, on which dy W sums, go into dy. A row of zeros, or of numbers below 1e-30,
becomes zeros; a row with an infinity or a NaN holds a NaN, so that the step is found not to be finite.

`quantize_row` is also the end of kernels that write a row: it finds the row in a cache. Kernels whose programs write parts of
rows leave the largest |v| of each behind instead (`Largest`): then a row's codes need no more than one look at each number, by
as many programs as there are parts.

Legend: T rows (tokens), D width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels.launch import can_run, check_rows

DTYPE = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
SMALLEST_ROW = tl.constexpr(1e-30)  # the inverse of a smaller one would leave fp32
MAX_BLOCK = 4096  # elements that a program holds, 16 a thread; a wider row is read twice, the second time from a cache
MAX_PART = 2048  # of a row whose largest number is known: there is nothing to wait for


class Largest(NamedTuple):
    """What a kernel that writes rows x in parts finds out for `quantize_rows`."""

    rows: Tensor  # (T,) fp32: the largest |x factor| of each so far
    factor: Tensor | None  # (D,) fp32


@triton.jit
def sizes(b_x, p_factor, o_d, D):
    """|b_x factor| in fp32 of columns o_d of some rows, as they are stored."""
    b_x = tl.abs(b_x.to(tl.float32))
    if p_factor is not None:
        b_x *= tl.load(p_factor + o_d, mask=o_d < D, other=0.0)[None, :]
    return b_x


@triton.jit
def raise_largest(p_largest, b_sizes, o_t, T):
    """Those of rows o_t become at least what columns of them have, which are 0 beyond the rows' ends."""
    b_bits = tl.max(b_sizes, axis=1).to(tl.int32, bitcast=True)  # of numbers from 0 on these are in the same order
    tl.atomic_max(p_largest.to(tl.pointer_type(tl.int32)) + o_t, b_bits, mask=o_t < T, sem="relaxed")


@triton.jit
def _values(p_x, p_factor, o_d, D):
    """v of a row that begins at p_x."""
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    if p_factor is not None:
        b_x *= tl.load(p_factor + o_d, mask=o_d < D, other=0.0)
    return b_x


@triton.jit
def _codes(b_x, largest, p_codes):
    """Saturating, and it keeps NaN: the largest number may come out one fp32 step above 448."""
    b_largest = tl.zeros(b_x.shape, dtype=tl.float32) + largest
    return (b_x * tl.div_rn(tl.full(b_x.shape, LARGEST, dtype=tl.float32), b_largest)).to(p_codes.dtype.element_ty)


@triton.jit
def quantize_row(p_x, p_factor, p_codes, p_scale, i_row, x_stride, D, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """One row of x (.., D) to one of codes, contiguous, and its scale, by a whole program. BLOCKS: of a row."""
    b_largest, b_x = tl.full((BLOCK,), SMALLEST_ROW, dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, BLOCKS):
        b_x = _values(p_x + i_row * x_stride, p_factor, i * BLOCK + tl.arange(0, BLOCK), D)
        b_largest = tl.maximum(b_largest, tl.abs(b_x))
    largest = tl.max(b_largest, axis=0)
    for i in range(0, BLOCKS):
        o_d = i * BLOCK + tl.arange(0, BLOCK)
        if BLOCKS > 1:
            b_x = _values(p_x + i_row * x_stride, p_factor, o_d, D)
        tl.store(p_codes + i_row * D + o_d, _codes(b_x, largest, p_codes), mask=o_d < D)
    tl.store(p_scale + i_row, tl.div_rn(largest, 448.0))


@triton.jit
def _quantize_kernel(p_x, p_factor, p_codes, p_scale, x_stride, D, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """A row per program."""
    quantize_row(p_x, p_factor, p_codes, p_scale, tl.program_id(0).to(tl.int64), x_stride, D, BLOCK, BLOCKS)


@triton.jit
def _quantize_known_kernel(p_x, p_factor, p_largest, p_codes, p_scale, x_stride, D, parts, BLOCK: tl.constexpr):
    """A part of a row per program."""
    i_row = tl.program_id(0).to(tl.int64) // parts
    i_part = tl.program_id(0) % parts
    o_d = i_part * BLOCK + tl.arange(0, BLOCK)
    largest = tl.load(p_largest + i_row)
    b_x = _values(p_x + i_row * x_stride, p_factor, o_d, D)
    tl.store(p_codes + i_row * D + o_d, _codes(b_x, largest, p_codes), mask=o_d < D)
    if i_part == 0:
        tl.store(p_scale + i_row, tl.div_rn(largest, 448.0))


def new_largest(rows: int, device: torch.device, factor: Tensor | None = None) -> Largest:
    """Of rows that nobody has written yet."""
    return Largest(torch.full((rows,), SMALLEST_ROW.value, dtype=torch.float32, device=device), factor)


def new_codes(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (rows, width) e4m3 and scales (rows,) fp32 to be written."""
    return torch.empty(rows, width, dtype=DTYPE, device=device), torch.empty(rows, dtype=torch.float32, device=device)


def quantize_rows(
    x: Tensor, factor: Tensor | None = None, *, largest: Tensor | None = None, eager: bool = False
) -> tuple[Tensor, Tensor]:
    """codes (T, D) e4m3, contiguous, and scales (T,) fp32 of x * factor. No autograd.

    Args:
        x: (T, D) of any float dtype; its rows may be strided.
        factor: (D,) fp32, or None.
        largest: (T,) fp32: each row's max |x * factor|, at least SMALLEST_ROW, if it is known.
        eager: compute with PyTorch ops.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    rows, width = x.shape
    check_rows("x", x, (rows, width))
    if factor is not None:
        check_rows("factor", factor, (width,), torch.float32)
    if largest is not None:
        check_rows("largest", largest, (rows,), torch.float32)
    if eager:
        return quantize_rows_eager(x, factor, largest)
    if not can_run(x):
        raise ValueError(f"quantize_rows: Triton does not run on {x.device}; pass eager=True")
    codes, scale = new_codes(rows, width, x.device)
    block = min(MAX_BLOCK if largest is None else MAX_PART, triton.next_power_of_2(width))
    parts, warps = triton.cdiv(width, block), min(max(block // 512, 1), 32)
    if rows > 0 and largest is None:
        _quantize_kernel[(rows,)](x, factor, codes, scale, x.stride(0), width, BLOCK=block, BLOCKS=parts, num_warps=warps)
    elif rows > 0:
        grid = (rows * parts,)
        _quantize_known_kernel[grid](x, factor, largest, codes, scale, x.stride(0), width, parts, BLOCK=block, num_warps=warps)
    return codes, scale


def quantize_rows_eager(x: Tensor, factor: Tensor | None = None, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's ops."""
    x = x.float() if factor is None else x.float() * factor
    if largest is None:
        largest = x.abs().amax(dim=1).clamp_min(SMALLEST_ROW.value)
    largest = largest.unsqueeze(1)
    # A tensor: a number divided by a tensor is rounded twice, and on a GPU a tensor divided by a number too.
    top = torch.full_like(largest, LARGEST.value)
    return (x * (top / largest)).to(DTYPE), (largest / top).squeeze(1)
