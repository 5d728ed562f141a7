"""Residual addition and root-mean-square layer norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    h2 = h + delta                      rounded to h's dtype, as the residual stream holds it
    r = 1 / sqrt(mean(h2^2) + eps)      fp32, one per row
    y = h2 r w                          fp32 inside, rounded once

Backward, with the normalised row n = h2 r and g = dy w:

    d h2 = r (g - n mean(g n))          plus dh, a gradient that reaches h2 on another way
    d w  = sum over rows of dy n

`add_rms_norm` and `rms_norm_backward` are building blocks without autograd; `rms_norm` is an op for plain modules.
Left out: biases, the "1 + w" weights of Gemma, rows wider than 16,384.

Legend: T rows (tokens), D width, P programs that sum the weight's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torchft.kernels.launch import can_run, check_rows

MAX_WIDTH = 16384  # a program holds a whole row in registers: 16 elements a thread at 32 warps, the most there are


@triton.jit
def _forward_kernel(p_h, p_delta, p_weight, p_h2, p_out, p_rstd, out_stride, D, eps, BLOCK_D: tl.constexpr):
    """One row: h2 = h + delta, r = 1 / sqrt(mean(h2^2) + eps), out = h2 r w. Without delta h2 is h and not written."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_h = tl.load(p_h + i_t * D + o_d, mask=m_d, other=0.0)
    if p_delta is not None:
        b_delta = tl.load(p_delta + i_t * D + o_d, mask=m_d, other=0.0)
        b_h = (b_h.to(tl.float32) + b_delta.to(tl.float32)).to(p_h2.dtype.element_ty)
        tl.store(p_h2 + i_t * D + o_d, b_h, mask=m_d)
    b_x = b_h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    tl.store(p_rstd + i_t, rstd)
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * out_stride + o_d, (b_x * rstd * b_w).to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def _row_gradient(b_dy, b_n, b_w, rstd, D):
    """r (g - n mean(g n)) with g = dy w: blocks of one row in fp32, zero beyond its end."""
    b_g = b_dy * b_w
    return rstd * (b_g - b_n * (tl.sum(b_g * b_n, axis=0) / D))


@triton.jit
def _backward_kernel(
    p_dy, p_h2, p_rstd, p_weight, p_dh, p_x, p_grad, dy_stride, x_stride, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row: grad = dh + r (g - n mean(g n)), and x = n w where p_x is given."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    rstd = tl.load(p_rstd + i_t)
    b_n = tl.load(p_h2 + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32) * rstd
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + i_t * dy_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad = _row_gradient(b_dy, b_n, b_w, rstd, D)
    if p_dh is not None:
        b_grad += tl.load(p_dh + i_t * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_grad + i_t * D + o_d, b_grad.to(p_grad.dtype.element_ty), mask=m_d)
    if p_x is not None:
        tl.store(p_x + i_t * x_stride + o_d, (b_n * b_w).to(p_x.dtype.element_ty), mask=m_d)


@triton.jit
def _weight_backward_kernel(
    p_dy, p_h2, p_rstd, p_weight, p_grad, p_partial, dy_stride, T, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """ROWS rows one after the other: grad = r (g - n mean(g n)) of each, and partial = their sum of dy n in fp32."""
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_partial = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i in range(0, ROWS):
        i_t = i_p * ROWS + i
        # The last programs may have fewer rows, or none. Not `m_d & (i_t < T)`: of a block and a number, Triton 3.9's interpreter
        # makes something that is no mask.
        m_row = o_d < tl.where(i_t < T, D, 0)
        rstd = tl.load(p_rstd + i_t, mask=i_t < T, other=0.0)
        b_n = tl.load(p_h2 + i_t * D + o_d, mask=m_row, other=0.0).to(tl.float32) * rstd
        b_dy = tl.load(p_dy + i_t * dy_stride + o_d, mask=m_row, other=0.0).to(tl.float32)
        b_partial += b_dy * b_n
        b_grad = _row_gradient(b_dy, b_n, b_w, rstd, D)
        tl.store(p_grad + i_t * D + o_d, b_grad.to(p_grad.dtype.element_ty), mask=m_row)
    tl.store(p_partial + i_p * D + o_d, b_partial, mask=m_d)


def _block(tensor: Tensor, D: int) -> dict[str, int]:
    """Launch options: a row per program, 16 elements a thread, so that each tensor is two 16-byte loads in bf16."""
    if not can_run(tensor):
        raise ValueError(f"Triton cannot run on {tensor.device} outside its interpreter; pass eager=True")
    if D > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {D} elements; the kernel takes at most {MAX_WIDTH}, pass eager=True")
    block = triton.next_power_of_2(D)
    return {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 32)}


def _check_contiguous(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_rows(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: a kernel needs a contiguous tensor; got {shape} with strides {tensor.stride()}")


def _check_written(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rows(name, tensor, shape, dtype)
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError(f"{name}: its rows overlap, so they cannot be written; got {shape}, strides {tensor.stride()}")


def add_rms_norm(
    h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor, *, eager: bool = False
) -> tuple[Tensor, Tensor]:
    """Residual addition and norm: h2 = h + delta, out[:] = h2 / sqrt(mean(h2^2) + eps) * weight. No autograd.

    Args:
        h: (T, D) contiguous.
        delta: (T, D) contiguous in h's dtype, or None.
        weight: (D,) of any float dtype.
        eps: added to the mean square.
        out: (T, D) in h's dtype, written; its rows may be further apart than D.
        eager: compute with PyTorch ops.

    Returns:
        h2 (T, D) in h's dtype, which is h itself where delta is None; 1/rms of each row, (T,) fp32.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    T, D = h.shape
    _check_contiguous("h", h, (T, D), h.dtype)
    if delta is not None:
        _check_contiguous("delta", delta, (T, D), h.dtype)
    check_rows("weight", weight, (D,))
    _check_written("out", out, (T, D), h.dtype)
    if eager:
        return _add_rms_norm_eager(h, delta, weight, eps, out)
    options = _block(h, D)
    h2 = h if delta is None else torch.empty_like(h)
    rstd = torch.empty(T, dtype=torch.float32, device=h.device)
    _forward_kernel[(T,)](h, delta, weight, h2, out, rstd, out.stride(0), D, eps, **options)
    return h2, rstd


def rms_norm_backward(
    dx: Tensor, h2: Tensor, rstd: Tensor, weight: Tensor, dh: Tensor | None, x_out: Tensor | None, *, eager: bool = False
) -> Tensor:
    """Gradient of h2 under `add_rms_norm`, and its normalised rows once more. No autograd.

    Args:
        dx: (T, D) gradient of `out` in h2's dtype; its rows may be strided.
        h2: (T, D) contiguous, and rstd (T,) fp32: what `add_rms_norm` returned.
        weight: (D,) of any float dtype.
        dh: (T, D) contiguous in h2's dtype, added to the gradient, or None.
        x_out: (T, D) in h2's dtype, h2 * rstd * weight is written into it, rows may be strided; or None.
        eager: compute with PyTorch ops.

    Returns:
        (T, D) in h2's dtype.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    T, D = h2.shape
    _check_contiguous("h2", h2, (T, D), h2.dtype)
    check_rows("dx", dx, (T, D), h2.dtype)
    _check_contiguous("rstd", rstd, (T,), torch.float32)
    check_rows("weight", weight, (D,))
    if dh is not None:
        _check_contiguous("dh", dh, (T, D), h2.dtype)
    if x_out is not None:
        _check_written("x_out", x_out, (T, D), h2.dtype)
    if eager:
        return _rms_norm_backward_eager(dx, h2, rstd, weight, dh, x_out)
    options = _block(h2, D)
    grad = torch.empty_like(h2)
    x_stride = 0 if x_out is None else x_out.stride(0)
    _backward_kernel[(T,)](dx, h2, rstd, weight, dh, x_out, grad, dx.stride(0), x_stride, D, **options)
    return grad


def _backward_with_weight(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (T, D) and of the weight (D,); each program's part of the latter is summed afterwards, in order."""
    T, D = x.shape
    options = _block(x, D)
    programs = 4  # enough to cover the loop in the interpreter
    if x.is_cuda:  # two for each multiprocessor: the parts are then 4 MiB on an H200 at D = 4096
        programs = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    rows = triton.next_power_of_2(max(triton.cdiv(T, programs), 1))  # a constant of the kernel: few values, few compilations
    grad = torch.empty_like(x)
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _weight_backward_kernel[(programs,)](
        dy, x, rstd, weight, grad, partial, dy.stride(0), T, D, ROWS=rows, **options
    )  # fmt: skip
    return grad, partial.sum(0).to(weight.dtype)


def _add_rms_norm_eager(
    h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    h2 = h if delta is None else h + delta
    rstd = torch.rsqrt(h2.float().square().mean(-1) + eps)
    out.copy_(h2.float() * rstd[:, None] * weight.float())
    return h2, rstd


def _rms_norm_backward_eager(
    dx: Tensor, h2: Tensor, rstd: Tensor, weight: Tensor, dh: Tensor | None, x_out: Tensor | None
) -> Tensor:
    normed = h2.float() * rstd[:, None]
    scaled = dx.float() * weight.float()
    grad = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if dh is not None:
        grad += dh.float()
    if x_out is not None:
        x_out.copy_(normed * weight.float())
    return grad.to(h2.dtype)


@torch.library.custom_op("torchft::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x, and 1/rms of its rows (T,), which backward needs."""
    D = weight.shape[0]
    _check_contiguous("x", x, (*x.shape[:-1], D), x.dtype)
    out = torch.empty_like(x)
    return out, add_rms_norm(x.view(-1, D), None, weight, eps, out.view(-1, D))[1]


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // weight.shape[0], dtype=torch.float32)


# An op of its own, so that torch.compile, which traces the formulas of backward, meets one node and no kernel.
@torch.library.custom_op("torchft::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, with_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradient of x, and of the weight: (D,), or (0,) where it is not wanted."""
    D = weight.shape[0]
    rows = dy.reshape(-1, D)
    if rows.stride(-1) != 1:  # the gradient of a sum is one number, expanded; its strides are nobody's choice
        rows = rows.clone(memory_format=torch.contiguous_format)
    if with_weight:
        grad, grad_weight = _backward_with_weight(rows, x.view(-1, D), rstd, weight)
    else:
        grad, grad_weight = rms_norm_backward(rows, x.view(-1, D), rstd, weight, None, None), weight.new_empty(0)
    return grad.view(x.shape), grad_weight


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, with_weight: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape[0] if with_weight else 0)


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in place of the gradient that 1/rms never gets


def _gradients(ctx: FunctionCtx, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    with_weight = ctx.needs_input_grad[1]
    grad, grad_weight = torch.ops.torchft.rms_norm_backward(dy, *ctx.saved_tensors, with_weight)
    return grad, grad_weight if with_weight else None, None


_rms_norm.register_autograd(_gradients, setup_context=_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, eager: bool = False) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside; differentiable once.

    Args:
        x: (..., D) contiguous.
        weight: (D,) of any float dtype; its gradient is summed in fp32, and only where it is wanted.
        eps: added to the mean square.
        eager: compute with PyTorch ops, under their own autograd.

    Returns:
        (..., D) in x's dtype.

    Raises:
        ValueError: a shape or stride that the kernel does not take, or Triton cannot run here.
    """
    if eager:
        x32 = x.float()
        rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (x32 * rstd * weight.float()).to(x.dtype)
    return torch.ops.torchft.rms_norm(x, weight, eps)[0]
