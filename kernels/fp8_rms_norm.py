"""Residual addition and RMS norm as in rms_norm.py, its result in h's dtype and in FP8 rows (fp8_quantize.py).

The FP8 product reads the codes, the adapters' first product the 16-bit rows: 2 + 1 bytes written per number. The row is
rounded to 16 bits first and quantised from there, in the program that wrote it and finds it in its cache: a kernel of its own
would read it from memory once more (16 us of an H200 for 8,192 x 4,096).

Legend: T rows (tokens), D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels.fp8_quantize import new_codes, quantize_row, quantize_rows_eager
from torchft.kernels.launch import can_run, check_rows
from torchft.kernels.rms_norm import MAX_WIDTH, _forward_kernel, add_rms_norm


@triton.jit
def _kernel(p_h, p_delta, p_weight, p_h2, p_out, p_rstd, p_codes, p_scale, D, eps, BLOCK_D: tl.constexpr):
    """One row: as _forward_kernel, then codes and scale of out."""
    _forward_kernel(p_h, p_delta, p_weight, p_h2, p_out, p_rstd, D, D, eps, BLOCK_D)
    tl.debug_barrier()  # all of the row is written
    quantize_row(p_out, None, p_codes, p_scale, tl.program_id(0).to(tl.int64), D, D, BLOCK_D, 1)


def fp8_add_rms_norm(
    h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, eager: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `add_rms_norm`; returns h2, 1/rms (T,) fp32, x (T, D) in h's dtype, its codes (T, D) e4m3 and scales (T,) fp32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    rows, width = h.shape
    out = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    if eager:
        h2, rstd = add_rms_norm(h, delta, weight, eps, out, eager=True)
        return h2, rstd, out, *quantize_rows_eager(out)
    check_rows("weight", weight, (width,))
    for name, tensor in (("h", h), ("delta", h if delta is None else delta)):
        check_rows(name, tensor, (rows, width), h.dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: a kernel needs a contiguous tensor; got strides {tensor.stride()}")
    if not can_run(h) or width > MAX_WIDTH:
        raise ValueError(f"fp8_add_rms_norm: needs Triton and rows of at most {MAX_WIDTH}; got {width} on {h.device}")
    h2 = h if delta is None else torch.empty(rows, width, dtype=h.dtype, device=h.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=h.device)
    codes, scale = new_codes(rows, width, h.device)
    block = triton.next_power_of_2(width)
    options = {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 32)}
    if rows > 0:
        _kernel[(rows,)](h, delta, weight, h2, out, rstd, codes, scale, width, eps, **options)
    return h2, rstd, out, codes, scale
