"""Residual sum, RMS norm and the LoRA linears that read it (q, k and v; gate and up) as one function.

    h' = h + delta        x = norm(h')        y = x W^T + s x A^T B^T

The norm writes x straight into the wide buffer of the product (lora_linear.py), and x is not kept: backward makes it again
from h' and one number per token while it goes over the same memory anyway.

Legend as in lora_linear.py: T tokens, D hidden, O output width, P padded rank.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.lora_linear import Group, adapter_gradients, extended_weight, padded_rank, project
from torchft.kernels.rms_norm import add_rms_norm, rms_norm_backward


class _LoraNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        eps: float,
        group: Group,
        bias: Tensor | None,
        eager: str,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        extended, pad = extended_weight(group, h.dtype, "nf4" in eager), padded_rank(group.b)
        wide = h.new_empty(h.shape[0], h.shape[1] + pad)
        total, rstd = add_rms_norm(h, delta, norm, eps, wide[:, : h.shape[1]], eager="rms_norm" in eager)
        y, xa = project(wide, extended, pad, bias)
        ctx.save_for_backward(total, norm, rstd, xa)
        ctx.group, ctx.eager, ctx.added = group, eager, delta is not None
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dh: Tensor, dy: Tensor) -> tuple:
        (h, norm, rstd, xa), group, dy = ctx.saved_tensors, ctx.group, dy.contiguous()
        pad, width = padded_rank(group.b), h.shape[1]
        extended = extended_weight(group, h.dtype, "nf4" in ctx.eager)
        out_width = extended.shape[0] - pad
        wide = dy @ extended[:out_width]  # (T, D + P): dy W and dy B in one product
        dx, dyb = wide[:, :width], wide[:, width:].clone()
        dx.addmm_(dyb, extended[out_width:, :width])
        del extended  # the largest of all
        x = torch.empty_like(h)
        dh = dh.contiguous() if ctx.added else None  # without a delta h' is h, whose other uses are the caller's
        total = rms_norm_backward(dx, h, rstd, norm, dh, x, eager="rms_norm" in ctx.eager)
        return total, total if ctx.added else None, *[None] * 5, *adapter_gradients(dyb, x, dy, xa, group)


def lora_norm_linear(
    h: Tensor,
    delta: Tensor | None,
    norm: Tensor,
    eps: float,
    group: Group,
    bias: Tensor | None = None,
    eager: str = "",
) -> tuple[Tensor, Tensor]:
    """h and delta (T, D) contiguous (delta may be None), norm (D,) frozen -> h' = h + delta (T, D) and y (T, O).

    Gradients for h, delta, A and B. `eager`: kernels that plain PyTorch shall do instead (rms_norm, nf4).
    """
    total, y = _LoraNormLinear.apply(h, delta, norm, eps, group, bias, eager, *group.a, *group.b)
    return h if delta is None else total, y
