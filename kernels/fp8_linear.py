"""Linears with an FP8 base and LoRA adapters beside it: the products, and the linear alone (o_proj) as one function.

    y  = bias + sx sw (xq wq^T) + s (x A^T) B^T           x ~ sx xq, W ~ sw wq in e4m3, a scale per row (fp8_quantize.py)
    dx = sg (gq wq) + s (dy B) A                          dy sw ~ sg gq: W's scales stand on what is summed over
    dA = s (dy B)^T x        dB = s dy^T (x A^T)

Rounding to e4m3 counts as the identity in backward. W, frozen, is held in e4m3 once, and transposed for dx: kept (`flipped`)
or made for each use (fp8_transpose.py). The adapters' products are taken of 16-bit rows and in the 16-bit dtype: in FP8 a
rank-16 product would round what is trained to 4 bits. What that moves beside the FP8 product, in bytes per number of x: 2
written and 2 read (against 1 and 1), 6% of a product of 4,096 x 6,144 on an H200.

torch._scaled_mm gives bf16, to which y's adapter term is added: rounded twice, as in PEFT, but for gate and up, whose
consumer adds it in fp32 (lora_gate.py), and which are half of a block's weights. Folding the adapters into the product, as
lora_linear.py does, would need them in e4m3.

Three functions share this file: `fp8_linear` here, `fp8_norm_linear` and `fp8_mlp`. They are autograd Functions, as in
lora_linear.py.

Legend: T tokens, D input width, O output width (all linears of a group together), R their ranks' sum, s alpha / rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.fp8_quantize import quantize_rows
from torchft.kernels.fp8_transpose import transpose


class Fp8Group(NamedTuple):
    """Linears of one input, their weights above each other: as one tensor, or one each, to be put together for each use."""

    weights: list[Tensor]  # [(O, D)] e4m3, contiguous; or [(o, D), ...]
    row_scale: Tensor  # (O,) fp32
    flipped: Tensor | None  # (D, O) e4m3, contiguous: weight^T, where it is kept
    ones: Tensor  # (D,) fp32: the scales of flipped's rows
    a: list[Tensor]  # the adapters' parameters, (r, D) each, r may be 0
    b: list[Tensor]  # (o, r) each
    a_rows: Tensor  # (R, D): all A above each other in the activations' dtype, made once for forward and backward
    b_parts: list[Tensor]  # B in that dtype
    scale: float


@torch.no_grad()
def with_adapters(
    base: tuple[list[Tensor], Tensor, Tensor | None, Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    dtype: torch.dtype,
) -> Fp8Group:
    """A group of `base`, the first four fields, and adapters as they are now; `dtype`: of the activations."""
    a_rows = a[0] if len(a) == 1 else torch.cat(a)
    return Fp8Group(*base, a, b, a_rows.to(dtype), [part.to(dtype) for part in b], scale)


def scaled_product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x w^T with the scales of both, plus bias: e4m3 (T, K) and (N, K) contiguous -> (T, N), rounded once, to dtype.

    On Hopper and later in FP8, if dtype is bf16; else the same codes in wider types.
    """
    if dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        scales = {"scale_a": x_scale.unsqueeze(1), "scale_b": w_scale.unsqueeze(0)}
        return torch._scaled_mm(x, w.T, **scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    if x.is_cuda:  # bf16 holds e4m3 exactly
        sums = torch.mm(x.bfloat16(), w.bfloat16().T, out_dtype=torch.float32)
    else:
        sums = x.float() @ w.float().T
    y = sums * x_scale.unsqueeze(1) * w_scale
    return (y if bias is None else y + bias.float()).to(dtype)


def above_each_other(weights: list[Tensor]) -> Tensor:
    """(O, D) of the parts; as bytes, which every device can copy."""
    if len(weights) == 1:
        return weights[0]
    return torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)


def base_product(codes: Tensor, scale: Tensor, group: Fp8Group, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The base's y (T, O) for rows that are quantised already."""
    return scaled_product(codes, scale, above_each_other(group.weights), group.row_scale, bias, dtype)


def adapters_down(x: Tensor, group: Fp8Group) -> Tensor:
    """x (T, D) -> x A^T of all linears beside each other, (T, R)."""
    return x @ group.a_rows.T


def columns(wide: Tensor, group: Fp8Group, ranks: bool) -> tuple[Tensor, ...]:
    """Each linear's columns of (T, R) if `ranks`, else of (T, O)."""
    return wide.split([part.shape[1 if ranks else 0] for part in group.b], dim=1)


def add_adapters(y: Tensor, xa: Tensor, group: Fp8Group) -> None:
    """y (T, O) += s (x A^T) B^T, each linear in its columns: nothing is spent on the zeros between them."""
    for part, x, b in zip(columns(y, group, False), columns(xa, group, True), group.b_parts, strict=True):
        if b.shape[1] > 0:
            part.addmm_(x, b.T, alpha=group.scale)


def base_gradient(dy: Tensor, group: Fp8Group, eager: str) -> Tensor:
    """dy (T, O) -> the base's part of dx, (T, D)."""
    plain = "fp8" in eager
    codes, scale = quantize_rows(dy, group.row_scale, eager=plain)
    flipped = group.flipped
    if flipped is None:
        flipped = transpose(above_each_other(group.weights), eager=plain)
    return scaled_product(codes, scale, flipped, group.ones, None, dy.dtype)


def through_b(dy: Tensor, group: Fp8Group) -> Tensor:
    """dy B of all linears beside each other, (T, R)."""
    parts = [part @ b for part, b in zip(columns(dy, group, False), group.b_parts, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def input_gradient(dy: Tensor, group: Fp8Group, eager: str) -> tuple[Tensor, Tensor]:
    """dy (T, O) -> dx (T, D), dy B (T, R)."""
    dx, dyb = base_gradient(dy, group, eager), through_b(dy, group)
    if dyb.shape[1] > 0:
        dx.addmm_(dyb, group.a_rows, alpha=group.scale)
    return dx, dyb


def adapter_gradients(dyb: Tensor, x: Tensor, dy: Tensor, xa: Tensor, group: Fp8Group) -> list[Tensor]:
    """Gradients of all A, then of all B, in fp32."""
    da = _mm_fp32(dyb.T, x).mul_(group.scale)  # (R, D)
    pairs = zip(columns(dy, group, False), columns(xa, group, True), strict=True)
    db = [_mm_fp32(part.T, x).mul_(group.scale) for part, x in pairs]
    return [*da.split([part.shape[0] for part in group.a]), *db]


def _mm_fp32(x: Tensor, y: Tensor) -> Tensor:
    """A product over many tokens, not rounded to bf16 before it becomes a gradient."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda and x.dtype != torch.float32 else (x @ y).float()


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Fp8Group, bias: Tensor | None, eager: str, *adapters: Tensor) -> Tensor:
        codes, scale = quantize_rows(x, eager="fp8" in eager)
        y = base_product(codes, scale, group, bias, x.dtype)
        xa = adapters_down(x, group)
        add_adapters(y, xa, group)
        ctx.save_for_backward(x, xa)
        ctx.group, ctx.eager = group, eager
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x, xa), group, dy = ctx.saved_tensors, ctx.group, dy.contiguous()
        dx, dyb = input_gradient(dy, group, ctx.eager)
        return dx, None, None, None, *adapter_gradients(dyb, x, dy, xa, group)


def fp8_linear(x: Tensor, group: Fp8Group, bias: Tensor | None = None, eager: str = "") -> Tensor:
    """x (T, D) -> y (T, O) as above, with gradients for x, A and B. `eager`: "fp8" for quantisation by plain PyTorch."""
    return _Fp8Linear.apply(x, group, bias, eager, *group.a, *group.b)
