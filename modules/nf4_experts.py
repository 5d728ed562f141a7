"""The grouped product of rows with their experts' matrices, dense or NF4.

The matrices lie one below the other, (E * out, in), and are one NF4 tensor: one mean of its scales for all experts, so that its
codes are cut into parts like any other's and are bitwise the same on any number of processes. They are decoded for each product
and again in backward, as in nf4.py, so that no dense copy is kept between the passes. Left out: decoding only those in use.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torchft.modules import nf4
from torchft.modules.routing import grouped_mm


def grouped_linear(x: Tensor, weight: Tensor, num_experts: int, offsets: Tensor) -> Tensor:
    """W_e x for each row's expert e: x (M, in) sorted by expert, weight (E * out, in) dense or NF4 -> (M, out) as x's dtype."""
    if not isinstance(weight, nf4.NF4Tensor):
        return grouped_mm(x, weight.unflatten(0, (num_experts, -1)).to(x.dtype).transpose(1, 2), offsets)
    return torch.ops.torchft.nf4_grouped_mm(x, offsets, *nf4.storage(weight), True)


@torch.library.custom_op("torchft::nf4_grouped_mm", mutates_args=())
def _grouped_mm(
    x: Tensor, offsets: Tensor, codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, transposed: bool
) -> Tensor:
    """Each row times its expert's W^T if transposed, else W, for the weights of the five storage tensors."""
    num_experts, width = len(offsets), x.shape[1]
    rows = 2 * codes.numel() // width if transposed else num_experts * width
    weights = torch.ops.torchft.nf4_dequantize(codes, scalers, factor, mean, table, rows)
    weights = weights.unflatten(0, (num_experts, -1)).to(x.dtype)
    return grouped_mm(x, weights.transpose(1, 2) if transposed else weights, offsets).contiguous()


@_grouped_mm.register_fake
def _(
    x: Tensor, offsets: Tensor, codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], 2 * codes.numel() // (x.shape[1] * len(offsets)))


def _save_storage(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, *tensors, transposed = inputs
    assert transposed, "only the forward product is differentiable"
    ctx.save_for_backward(*tensors)


def _grad_x(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.torchft.nf4_grouped_mm(grad.contiguous(), *ctx.saved_tensors, False), *[None] * 7


_grouped_mm.register_autograd(_grad_x, setup_context=_save_storage)
