"""A matrix of bytes transposed into given memory: what FP8 products need of a weight for dX = dY W.

Hopper multiplies 8-bit numbers along the dimension that lies in memory (K-major operands only). W (O, D) serves x W^T as it is;
for dY W the sum runs over O, so that W^T (D, O) is wanted. Moved are 2 bytes per weight: an 8B model's 218 million weights of a
block take some 0.12 ms of an H200, 1.3% of a step of 8,192 tokens, against 6.5 GiB for keeping all of them.

Legend: O rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels.launch import can_run

TILE = 128  # bytes: whole sectors on both sides
NUM_WARPS = 8


@triton.jit
def _transpose_kernel(p_x, p_out, O, D, tiles, TILE: tl.constexpr):
    """out[d, o] = x[o, d], a tile per program; `tiles` of them along a row of x."""
    i_program = tl.program_id(0).to(tl.int64)
    o_o = (i_program // tiles) * TILE + tl.arange(0, TILE)
    o_d = (i_program % tiles) * TILE + tl.arange(0, TILE)
    m_x = (o_o < O)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_o[:, None] * D + o_d[None, :], mask=m_x, other=0)
    tl.store(p_out + o_d[:, None] * O + o_o[None, :], tl.trans(b_x), mask=tl.trans(m_x))


def transpose(x: Tensor, *, eager: bool = False) -> Tensor:
    """x (O, D), contiguous, of a 1-byte dtype -> a new (D, O) of it. No autograd.

    Raises:
        ValueError: another dtype or layout, or Triton cannot run here (without `eager`).
    """
    if x.dim() != 2 or x.itemsize != 1 or not x.is_contiguous():
        raise ValueError(f"transpose: x must be a contiguous matrix of bytes; got {tuple(x.shape)}, {x.dtype}, {x.stride()}")
    if eager:
        return x.view(torch.uint8).T.contiguous().view(x.dtype)
    if not can_run(x):
        raise ValueError(f"transpose: Triton does not run on {x.device}; pass eager=True")
    (rows, columns), out = x.shape, torch.empty(x.shape[1], x.shape[0], dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(columns, TILE)
    if x.numel() > 0:
        grid = (tiles * triton.cdiv(rows, TILE),)
        _transpose_kernel[grid](
            x.view(torch.uint8), out.view(torch.uint8), rows, columns, tiles, TILE=TILE, num_warps=NUM_WARPS
        )
    return out
