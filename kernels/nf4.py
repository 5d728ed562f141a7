"""Decode an NF4 weight into given memory, in one pass (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    scale = round(round(scaler / factor) + mean),    weight = round(table[code] * scale)

where round is to the weight's dtype: torchao computes the scales op by op, and the result is bitwise its own
(`NF4Tensor.get_original_weight`) and that of torchft/modules/nf4.py, which explains the storage. What must be moved is
0.52 B read and, in bf16, 2 B written per weight.

Legend: N weights of a tensor, a multiple of 16,384; blocks of 64 weights share a scaler, 256 scalers share a factor.
Blocks run along the flattened row-major weight, whatever its row length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels import launch

BLOCK_SIZE = 64  # weights per scaler
SCALER_BLOCK_SIZE = 256  # scalers per factor
DIVISOR = BLOCK_SIZE * SCALER_BLOCK_SIZE
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the weight; wider ones would need wider arithmetic

# 4,096 weights a program: 16 code bytes a thread, which is one vector load, and four vector stores of 8 bf16 weights.
# It divides 16,384, so a program lies within one scaler block and no program is partly filled: no masks are needed.
BLOCKS = 64
NUM_WARPS = 4


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """x, fp32, rounded to DTYPE and kept in fp32, where a sum or product of two such numbers is rounded only once more
    on its way to DTYPE: fp32 has more than twice the digits of fp16 and bf16, so that this is the op in DTYPE itself."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _decode_kernel(
    codes,
    scalers,
    factor,
    mean,
    table,
    out,
    columns,
    stride_row,
    FLAT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALER_BLOCK_SIZE: tl.constexpr,
):
    """out[w] = table[code[w]] * scale[w / 64], scale[b] = scaler[b] / factor[b / 256] + mean, for BLOCKS whole blocks.

    Two codes to a byte, the first in the high half. FLAT: out's rows lie side by side, w is the offset. Otherwise the
    weights are taken in runs of SPAN, a power of two that divides `columns`, so that no run crosses the end of a row.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64) * BLOCKS  # the program's first block
    o_block = tl.arange(0, BLOCKS)
    b_scaler = tl.load(scalers + i_block + o_block).to(tl.float32)  # (BLOCKS,)
    b_factor = tl.load(factor + i_block // SCALER_BLOCK_SIZE).to(tl.float32)  # one number
    b_mean = tl.load(mean).to(tl.float32)
    # div_rn and not `/`, which is an approximation on a GPU
    b_scale = _rounded(tl.div_rn(b_scaler, tl.broadcast_to(b_factor, (BLOCKS,))), DTYPE)
    b_scale = _rounded(b_scale + b_mean, DTYPE)[:, None]  # (BLOCKS, 1)

    o_byte = o_block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    b_code = tl.load(codes + i_block * (BLOCK_SIZE // 2) + o_byte).to(tl.int32)  # (BLOCKS, 32), values 0..255
    b_first = tl.load(table + (b_code >> 4)).to(tl.float32) * b_scale
    b_second = tl.load(table + (b_code & 15)).to(tl.float32) * b_scale
    b_out = tl.join(b_first.to(DTYPE), b_second.to(DTYPE))  # (BLOCKS, 32, 2): neighbours in out
    b_out = tl.reshape(b_out, (BLOCKS * BLOCK_SIZE // SPAN, SPAN))

    o_run = tl.arange(0, BLOCKS * BLOCK_SIZE // SPAN) * SPAN  # of each run's first weight
    o_span = tl.arange(0, SPAN)[None, :]
    i_weight = i_block * BLOCK_SIZE
    if FLAT:
        p_out = out + i_weight + (o_run[:, None] + o_span)
    else:
        i_row = i_weight // columns
        o_column = (i_weight - i_row * columns).to(tl.int32) + o_run  # counted from the start of row i_row, in int32
        o_row = o_column // columns
        o_column = o_column - o_row * columns
        p_out = out + ((i_row + o_row) * stride_row + o_column)[:, None] + o_span
    tl.store(p_out, b_out)


def dequantize_into(
    codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, out: Tensor, *, eager: bool = False
) -> None:
    """Write the dense weight of the five storage tensors into `out`, bitwise as torchao decodes it. No gradients.

    Args:
        codes: (N/2,) uint8, two weights to a byte, the first in the high half.
        scalers: (N/64,) int8.
        factor: (N/16384,) in the weight's dtype, as mean and table.
        mean: ().
        table: (16,).
        out: (rows, columns) of N weights in the table's dtype: fp32, bf16 or fp16. Its rows may lie further apart than
            `columns`; what is between them is not touched.
        eager: decode with PyTorch's ops, which make an index of the whole weight.

    Raises:
        ValueError: a shape, dtype or stride is not as above, or Triton cannot run on this device.
    """
    _check_out(out, table.dtype)
    _check_storage(codes, scalers, factor, mean, table, out)
    if eager:
        return _eager_into(codes, scalers, factor, mean, table, out)
    if not launch.can_run(out):
        raise ValueError(f"dequantize_into: Triton does not run on {out.device.type}; pass eager=True")
    _launch(codes, scalers, factor, mean, table, out)


def _check_out(out: Tensor, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"table: NF4 weights are decoded to {DTYPES}, not to {dtype}")
    if out.ndim != 2 or out.numel() % DIVISOR or not out.numel() or (out.shape[0] > 1 and out.stride(0) < out.shape[1]):
        raise ValueError(
            f"out: an NF4 weight is a matrix of a multiple of {DIVISOR:,} weights, its rows apart from each other; got "
            f"{tuple(out.shape)}, strides {out.stride()}"
        )
    launch.check_rows("out", out, tuple(out.shape), dtype)


def _check_storage(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, out: Tensor) -> None:
    size, dtype = out.numel(), table.dtype
    storage = {
        "codes": (codes, (size // 2,), torch.uint8),
        "scalers": (scalers, (size // BLOCK_SIZE,), torch.int8),
        "factor": (factor, (size // DIVISOR,), dtype),
        "mean": (mean, (), dtype),
        "table": (table, (16,), dtype),
    }
    for name, (tensor, shape, kind) in storage.items():
        # Not check_rows: torchao's factor of a tensor of 16,384 weights has one element and a stride of 256.
        if tuple(tensor.shape) != shape or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: of an NF4 weight {tuple(out.shape)} it is {shape}, {kind} and contiguous; got "
                f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
            )
        if tensor.device != out.device:
            raise ValueError(f"{name} lies on {tensor.device}, but out on {out.device}")


def _launch(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, out: Tensor) -> None:
    columns, stride_row = out.shape[1], out.stride(0)
    flat = out.is_contiguous()
    # A run never crosses a row's end; in runs of 8 and more, bf16 stores are still full vectors.
    span = BLOCK_SIZE if flat else min(BLOCK_SIZE, columns & -columns)
    grid = (out.numel() // (BLOCKS * BLOCK_SIZE),)
    _decode_kernel[grid](
        codes,
        scalers,
        factor,
        mean,
        table,
        out,
        columns,
        stride_row,
        FLAT=flat,
        SPAN=span,
        BLOCKS=BLOCKS,
        BLOCK_SIZE=BLOCK_SIZE,
        SCALER_BLOCK_SIZE=SCALER_BLOCK_SIZE,
        num_warps=NUM_WARPS,
    )


def _eager_into(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, out: Tensor) -> None:
    """The same with PyTorch's ops."""
    scales = (scalers.view(-1, SCALER_BLOCK_SIZE) / factor[:, None]).flatten() + mean  # (N/64,)
    index = torch.stack((codes >> 4, codes & 15), dim=-1).view(-1, BLOCK_SIZE)  # (N/64, 64)
    out.copy_((table[index.int()] * scales[:, None]).view(out.shape))
