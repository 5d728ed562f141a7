"""RMS norm and the FP8 linears with adapters that read it (q, k and v) as one function.

    x = norm(h)        y = bias + W x + s B A x  as in fp8_linear.py

x is not kept: backward makes it again from h and one number per token in its pass over them. h comes back as a result, for
the residual sum, so that its gradient on that way is added in the same pass, and not by autograd in one of its own (32 us of
an H200 for 8,192 x 4,096).

Legend as in fp8_linear.py: T tokens, D hidden, O output width.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.fp8_linear import (
    Fp8Group,
    adapter_gradients,
    adapters_down,
    add_adapters,
    base_product,
    input_gradient,
)
from torchft.kernels.fp8_rms_norm import fp8_add_rms_norm
from torchft.kernels.rms_norm import rms_norm_backward


class _Fp8NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        norm: Tensor,
        eps: float,
        group: Fp8Group,
        bias: Tensor | None,
        eager: str,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        plain = "rms_norm" in eager or "fp8" in eager
        _, rstd, x, codes, scale = fp8_add_rms_norm(h, None, norm, eps, eager=plain)
        y = base_product(codes, scale, group, bias, h.dtype)
        xa = adapters_down(x, group)
        add_adapters(y, xa, group)
        ctx.save_for_backward(h, norm, rstd, xa)
        ctx.group, ctx.eager = group, eager
        return h.view_as(h), y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dh: Tensor, dy: Tensor) -> tuple:
        (h, norm, rstd, xa), group, dy = ctx.saved_tensors, ctx.group, dy.contiguous()
        dx, dyb = input_gradient(dy, group, ctx.eager)
        x = torch.empty_like(h)
        dh = rms_norm_backward(dx, h, rstd, norm, dh.contiguous(), x, eager="rms_norm" in ctx.eager)
        return dh, *[None] * 5, *adapter_gradients(dyb, x, dy, xa, group)


def fp8_norm_linear(
    h: Tensor, norm: Tensor, eps: float, group: Fp8Group, bias: Tensor | None = None, eager: str = ""
) -> tuple[Tensor, Tensor]:
    """h (T, D) contiguous, norm (D,) frozen -> h, for its other uses, and y (T, O); gradients for h, A and B.

    `eager`: kernels that plain PyTorch shall do instead (rms_norm, fp8).
    """
    return _Fp8NormLinear.apply(h, norm, eps, group, bias, eager, *group.a, *group.b)
