"""FP8 products with frozen linear weights: e4m3 numbers (4 exponent bits, 3 of mantissa), activations rounded on the way.

    y  = x W^T     y[t, o]  = sx[t] sw[o] sum_d  xq[t, d] wq[o, d]          x = sx xq, W = sw wq, one scale per row of each
    dx = dy W      dx[t, d] = sg[t]       sum_o  gq[t, o] wq[o, d]          dy[t, o] sw[o] = sg[t] gq[t, o]

The scale of a row is its largest magnitude / 448, the largest number of e4m3 (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433). The weight's scales stand on its output rows: on what backward sums over, where no product
can apply them. So they are multiplied into dy before that is rounded, which is exact, and one set of codes serves both passes.

Hopper's products read both operands along the summed dimension. For y that is W as it lies, for dx its transpose, which is
made anew for each backward (2 bytes moved per weight: at 8,192 tokens and full bandwidth 2% of its products' time); the fused
blocks of torchft/fused_fp8.py keep it where memory allows. Elsewhere (CPU, older GPUs) the same codes are multiplied in wider
types.

A weight is a plain Parameter of dtype float8_e4m3fn under its own name, 1 byte per weight; its fp32 scales are the buffer
`weight_scale` of its module, which is in no state dict. Left out: training such a weight, e5m2, static scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.modules.moe import ExpertLinear
from torchft.modules.nf4 import frozen_linears

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3, which has no infinity
SMALLEST_ROW = 1e-30  # rows of smaller numbers are rounded to zero: their scale's inverse would leave fp32
MULTIPLE = 16  # of both sides of a weight: what torch._scaled_mm takes


def is_fp8(weight: Tensor) -> bool:
    return weight.dtype == DTYPE


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) of any float dtype -> codes (T, K) e4m3 and scales (T,) fp32, with codes * scale within 1/16 of each number.

    (Or within 1/1024 of the scale, for the smallest.) A row of zeros gives zeros; a row with an infinity or NaN gives NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_ROW)  # (T, 1)
    # A tensor: a number divided by a tensor is rounded twice, and on a GPU a tensor divided by a number too.
    top = torch.full_like(largest, LARGEST)
    return (x * (top / largest)).to(DTYPE), (largest / top).squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 (T, K)."""
    return codes.float() * scale.unsqueeze(-1)


def has_fp8_products(device: torch.device) -> bool:
    """Whether this device multiplies e4m3 numbers with a scale per row: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x w^T with the scales of both, plus bias: e4m3 (T, K) and (N, K), both row-major -> (T, N), rounded once, to dtype."""
    if dtype == torch.bfloat16 and has_fp8_products(x.device):
        # fast: sums stay in the tensor cores, with some 14 bits (https://arxiv.org/abs/2412.19437, section 3.3.2)
        scales = {"scale_a": x_scale.unsqueeze(1), "scale_b": w_scale.unsqueeze(0)}
        return torch._scaled_mm(x, w.T, **scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    y = _sums(x, w) * x_scale.unsqueeze(1) * w_scale
    y = y if bias is None else y + bias.float()
    # Not `.to` of what is so already: compiled by torch 2.11, a Function that returns its result has gradients of zero.
    return y if y.dtype == dtype else y.to(dtype)


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of codes, in fp32: a product of two of them has 8 bits, so that only the sums are rounded."""
    if x.is_cuda:  # bf16 holds e4m3 exactly, and has fast products
        return torch.mm(x.bfloat16(), w.bfloat16().T, out_dtype=torch.float32)
    return x.float() @ w.float().T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return product(*quantize_rows(x), weight, scale, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        flipped = weight.view(torch.uint8).T.contiguous().view(DTYPE)  # (D, O)
        ones = torch.ones(len(flipped), dtype=torch.float32, device=dy.device)
        return product(*quantize_rows(dy.float() * scale), flipped, ones, None, dy.dtype), None, None, None


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (..., in), codes (out, in), their scales (out,), bias (out,) or None -> (..., out) in x's dtype.

    Only x gets a gradient, computed in FP8 too; the rounding of x and dy counts as the identity.
    """
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, scale, bias).view(*x.shape[:-1], -1)


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear whose `weight` is e4m3. Made by `quantize_fp8`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return linear(x, self.weight, self.weight_scale, self.bias)


@dataclass(frozen=True)
class Fp8Report:
    """What `quantize_fp8` did, for one printed line. `skipped`: (name, why) of frozen linears that stay dense."""

    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    num_bytes: int  # of codes and scales
    num_weights: int
    native: bool  # whether this machine multiplies them in FP8

    def __str__(self) -> str:
        each = self.num_bytes / max(1, self.num_weights)
        line = f"FP8: {len(self.quantized)} frozen linears, {self.num_bytes / 2**30:.2f} GiB ({each:.3f} bytes per weight)"
        if self.skipped:
            name, why = self.skipped[0]
            line += f", {len(self.skipped)} left dense (first: {name}, {why})"
        return line if self.native else line + "; this device has no FP8 products: they are done in wider types, slowly"


def quantize_fp8(model: nn.Module) -> Fp8Report:
    """Give every frozen linear but lm_head an FP8 weight. Embeddings, lm_head and trained modules stay dense.

    Meant, as `quantize_nf4`, for a model on meta, after `add_lora` and before the weights are streamed in; works on real
    weights too. Plain linears are replaced by `Fp8Linear`, which shares their bias.

    Raises:
        ValueError: no linear is frozen, so there is nothing that may be quantised.
    """
    quantized, skipped, num_bytes, num_weights = [], [], 0, 0
    for name, module in frozen_linears(model, "FP8"):
        if isinstance(module, ExpertLinear):
            skipped.append((name, "which is a stack of experts"))
            continue
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            skipped.append((name, f"whose sides {module.out_features} x {module.in_features} are no multiples of {MULTIPLE}"))
            continue
        if type(module) is nn.Linear:
            plain, module = module, Fp8Linear(module.in_features, module.out_features, bias=False, device="meta")
            module.weight, module.bias = plain.weight, plain.bias
            model.set_submodule(name, module)
        module.register_buffer("weight_scale", None, persistent=False)
        fill(module, module.weight.detach())
        quantized.append(name)
        num_weights += module.weight.numel()
        num_bytes += module.weight.nbytes + module.weight_scale.nbytes
    native = torch.cuda.is_available() and has_fp8_products(torch.device("cuda"))
    return Fp8Report(tuple(quantized), tuple(skipped), num_bytes, num_weights, native)


def fill(module: nn.Linear, weight: Tensor) -> None:
    """Make the dense `weight` (out, in) the module's, in FP8; it may lie on meta."""
    codes, module.weight_scale = quantize_rows(weight)
    module.weight = nn.Parameter(codes, requires_grad=False)
