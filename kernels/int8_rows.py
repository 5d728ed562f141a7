"""Products with a frozen matrix of int8 codes and a scale per row (modules/int8_head.py), decoded a slice of rows at a time.

    w = round(code * scale)         the kernel: 1 byte read, 2 written per weight in bf16

In PyTorch's ops it is one pass too, but one that computes an index for each element, because scale is broadcast and the dtypes
differ. The head of a model is decoded twice for each chunk of tokens of its loss.

Legend: C tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE_BYTES = 64 * 2**20  # of decoded rows: of 128k x 4096 in bf16 a sixteenth, 8,016 rows
ROWS_MULTIPLE = 16  # of a slice, so that its columns of the logits begin where a vector load may
MAX_BLOCK, NUM_WARPS = 4096, 4  # 32 codes a thread: two loads of 16 bytes, four stores


@triton.jit
def _decode_kernel(p_codes, p_scale, p_out, D: tl.constexpr, BLOCK: tl.constexpr):
    """One row, whose codes lie side by side, as in the output."""
    i_row = tl.program_id(0).to(tl.int64)
    scale = tl.load(p_scale + i_row)
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        b_code = tl.load(p_codes + i_row * D + o_d, mask=o_d < D, other=0).to(tl.float32)
        tl.store(p_out + i_row * D + o_d, (b_code * scale).to(p_out.dtype.element_ty), mask=o_d < D)


def decode_rows(codes: Tensor, scale: Tensor, out: Tensor, *, eager: bool = False) -> None:
    """codes (R, D) int8 and scale (R,) fp32, both contiguous, into out (R, D) contiguous: code * scale, rounded once."""
    (rows, width), eager = codes.shape, eager or codes.numel() == 0
    if out.shape != codes.shape or scale.shape != codes.shape[:1] or codes.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"need (R, D) int8, (R,) fp32 and out (R, D); got {codes.shape} {codes.dtype}, {scale.shape}, {out.shape}")
    if not (codes.is_contiguous() and scale.is_contiguous() and out.is_contiguous()):
        raise ValueError("codes, scale and out: must be contiguous")
    if eager:
        torch.mul(codes, scale[:, None], out=out)
    else:
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        _decode_kernel[(rows,)](codes, scale, out, D=width, BLOCK=block, num_warps=NUM_WARPS)


def row_slices(num_rows: int, width: int, itemsize: int) -> list[slice]:
    """All rows in slices of about equal size, each of at most SLICE_BYTES where that holds 16 rows."""
    count = -(-num_rows * width * itemsize // SLICE_BYTES)
    step = max(1, -(-num_rows // (max(1, count) * ROWS_MULTIPLE))) * ROWS_MULTIPLE
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype, eager: bool) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their dense weights), slice by slice; the next slice takes the memory of the one before."""
    slices = row_slices(*codes.shape, dtype.itemsize)
    buffer = torch.empty(slices[0].stop, codes.shape[1], dtype=dtype, device=codes.device)
    for rows in slices:
        part = buffer[: rows.stop - rows.start]
        decode_rows(codes[rows], scale[rows], part, eager=eager)
        yield rows, part


def product_into(x: Tensor, codes: Tensor, scale: Tensor | None, out: Tensor, eager: bool) -> Tensor:
    """x (C, D) times the transposed rows, in out (C, V), which is returned. Without a scale the rows are dense: one product."""
    if scale is None:
        return torch.mm(x, codes.T, out=out)
    for rows, weight in _decoded(codes, scale, x.dtype, eager):
        torch.mm(x, weight.T, out=out[:, rows])
    return out


def input_gradient_into(dlogits: Tensor, codes: Tensor, scale: Tensor | None, out: Tensor, eager: bool) -> None:
    """dlogits (C, V) times the rows, in out (C, D); the sum over slices is taken in fp32. Without a scale as in product_into."""
    if scale is None:
        torch.mm(dlogits, codes, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for rows, weight in _decoded(codes, scale, dlogits.dtype, eager):
        part = dlogits[:, rows]
        if part.is_cuda and part.dtype != torch.float32:
            torch.addmm(total, part, weight, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(part.float(), weight.float())
    out.copy_(total)
