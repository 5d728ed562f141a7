"""Residual sum, RMS norm, gate and up, their activation, and down, FP8 linears with adapters, as one function.

    h' = h + delta    x = norm(h')    [gate, up] = W x    act = silu(gate + its adapter) (up + its adapter)    y = down(act)

One function, because FP8 rows of d[gate, up] and of act belong to the products on both sides. Kept are h', one number per
token, [gate, up] without the adapters' terms, and the adapters' x A^T; x and act are made again by backward's passes.

Legend as in fp8_linear.py: T tokens, D hidden, F intermediate.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.fp8_linear import (
    Fp8Group,
    adapter_gradients,
    adapters_down,
    add_adapters,
    base_gradient,
    base_product,
    columns,
    input_gradient,
    through_b,
)
from torchft.kernels.fp8_quantize import quantize_rows
from torchft.kernels.fp8_rms_norm import fp8_add_rms_norm
from torchft.kernels.lora_gate import Term, lora_gate, lora_gate_backward
from torchft.kernels.rms_norm import rms_norm_backward


class Mlp(NamedTuple):
    """What does not change while a step is computed. Biases are None or as wide as their group."""

    norm: Tensor  # (D,)
    eps: float
    gate_up: Fp8Group
    gate_up_bias: Tensor | None
    down: Fp8Group
    down_bias: Tensor | None
    eager: str  # kernels that plain PyTorch shall do instead (rms_norm, swiglu, fp8), separated by blanks
    replayed: bool = False  # only what backward needs is computed, y is memory that nobody has written


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, delta: Tensor, mlp: Mlp, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        plain, group, down = "fp8" in mlp.eager, mlp.gate_up, mlp.down
        total, rstd, x, codes, scale = fp8_add_rms_norm(
            h, delta, mlp.norm, mlp.eps, eager=plain or "rms_norm" in mlp.eager
        )
        gate_up = base_product(codes, scale, group, mlp.gate_up_bias, h.dtype)
        xa = adapters_down(x, group)
        act = lora_gate(gate_up, *_terms(xa, group), group.scale, eager="swiglu" in mlp.eager)
        act_a, y = adapters_down(act, down), torch.empty_like(h)
        if not mlp.replayed:
            codes, scale = quantize_rows(act, eager=plain)
            y = base_product(codes, scale, down, mlp.down_bias, h.dtype)
            add_adapters(y, act_a, down)
        ctx.save_for_backward(total, rstd, gate_up, xa, act_a)
        ctx.mlp = mlp
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dh: Tensor, dy: Tensor) -> tuple:
        (total, rstd, gate_up, xa, act_a), mlp = ctx.saved_tensors, ctx.mlp
        group, down, dy = mlp.gate_up, mlp.down, dy.contiguous()
        dyb = through_b(dy, down)
        dact = base_gradient(dy, down, mlp.eager)
        d_gate_up, act = lora_gate_backward(
            dact, Term(dyb, down.a_rows), gate_up, *_terms(xa, group), group.scale, eager="swiglu" in mlp.eager
        )
        gradients_down = adapter_gradients(dyb, act, dy, act_a, down)
        del act, dact
        dx, dyb = input_gradient(d_gate_up, group, mlp.eager)
        x = torch.empty_like(total)
        dh = rms_norm_backward(dx, total, rstd, mlp.norm, dh.contiguous(), x, eager="rms_norm" in mlp.eager)
        return dh, dh, None, *adapter_gradients(dyb, x, d_gate_up, xa, group), *gradients_down


def _terms(xa: Tensor, group: Fp8Group) -> tuple[Term, Term]:
    """What the adapters of gate and up add to them."""
    return tuple(Term(x, b) for x, b in zip(columns(xa, group, True), group.b_parts, strict=True))


def fp8_mlp(h: Tensor, delta: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor]:
    """h and delta (T, D) contiguous -> h + delta and y, both (T, D); gradients for h, delta and all A and B."""
    return _Fp8Mlp.apply(h, delta, mlp, *mlp.gate_up.a, *mlp.gate_up.b, *mlp.down.a, *mlp.down.b)
