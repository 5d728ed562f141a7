"""The gated activation of the feed forward (Shazeer 2020, https://arxiv.org/abs/2002.05202), forward and backward.

    SwiGLU (equation 6):  act = g sigmoid(g) u                          k(g) = g
    GeGLU  (equation 6):  act = g sigmoid(k(g)) u                       k(g) = 2 sqrt(2 / pi) (g + 0.044715 g^3)

The second is GELU's tanh form (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2), since
(1 + tanh(z)) / 2 = sigmoid(2 z). With s = sigmoid(k(g)) both have

    du = dact g s
    dg = dact u (s + g s (1 - s) k'(g))

All arithmetic is fp32, and each result is rounded once, when it is stored.

Legend: T rows (tokens), F intermediate; g gate, u up.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torchft.kernels import launch

ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GELU_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
GELU_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)

# 8 elements a thread with 4 warps: loads of 16 bytes in bf16. Widths of models are multiples of 512, so that little of the last
# block is masked.
MAX_BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _sigmoid(b_gate, GELU: tl.constexpr):
    """s = 1 / (1 + e^-k): e^-k overflows to infinity and s to 0, which is right."""
    if GELU:
        b_k = b_gate * (GELU_LINEAR + GELU_CUBIC * b_gate * b_gate)
    else:
        b_k = b_gate
    return 1.0 / (1.0 + tl.exp(-b_k))


@triton.jit
def _offsets(F, BLOCK: tl.constexpr):
    """Of this program: the row, its columns (BLOCK,), and which of them there are. Programs go along a row first."""
    i_program = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(F, BLOCK)
    i_row = i_program // num_blocks
    o_column = (i_program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    return i_row, o_column, o_column < F


@triton.jit
def _gated_kernel(
    p_gate, p_up, p_out, stride_gate, stride_up, stride_out, F, BLOCK: tl.constexpr, GELU: tl.constexpr
):
    """out = g s u."""
    i_row, o_column, m_column = _offsets(F, BLOCK)
    b_gate = tl.load(p_gate + i_row * stride_gate + o_column, mask=m_column, other=0.0).to(tl.float32)  # (BLOCK,)
    b_up = tl.load(p_up + i_row * stride_up + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_out = b_gate * _sigmoid(b_gate, GELU) * b_up
    tl.store(p_out + i_row * stride_out + o_column, b_out.to(p_out.dtype.element_ty), mask=m_column)


@triton.jit
def _gated_backward_kernel(
    p_dact,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    p_act,
    stride_dact,
    stride_gate,
    stride_up,
    stride_grad,
    stride_act,
    F,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    """du = dact g s, dg = dact u (s + g s (1 - s) k'(g)), and act = g s u again unless p_act is None."""
    i_row, o_column, m_column = _offsets(F, BLOCK)
    b_dact = tl.load(p_dact + i_row * stride_dact + o_column, mask=m_column, other=0.0).to(tl.float32)  # (BLOCK,)
    b_gate = tl.load(p_gate + i_row * stride_gate + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * stride_up + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_sigmoid = _sigmoid(b_gate, GELU)
    b_act = b_gate * b_sigmoid  # act / u
    b_slope = b_act * (1.0 - b_sigmoid)
    if GELU:
        b_slope *= GELU_LINEAR + 3.0 * GELU_CUBIC * b_gate * b_gate
    b_dgate = b_dact * b_up * (b_sigmoid + b_slope)
    tl.store(p_dgate + i_row * stride_grad + o_column, b_dgate.to(p_dgate.dtype.element_ty), mask=m_column)
    tl.store(p_dup + i_row * stride_grad + o_column, (b_dact * b_act).to(p_dup.dtype.element_ty), mask=m_column)
    if p_act is not None:
        tl.store(p_act + i_row * stride_act + o_column, (b_act * b_up).to(p_act.dtype.element_ty), mask=m_column)


def _grid(gate: Tensor) -> tuple[tuple[int], int]:
    """Programs and BLOCK for (T, F)."""
    rows, width = gate.shape
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(width)))
    return (rows * triton.cdiv(width, block),), block


def _forward(gate: Tensor, up: Tensor, out: Tensor, activation: str, eager: bool) -> None:
    """All (T, F) with a last stride of 1."""
    if eager:
        out.copy_(_eager_act(gate.float(), activation)[0] * up.float())
    elif gate.numel() > 0:
        grid, block = _grid(gate)
        strides = (gate.stride(0), up.stride(0), out.stride(0))
        _gated_kernel[grid](
            gate, up, out, *strides, gate.shape[1], BLOCK=block, GELU=activation == "gelu_tanh", num_warps=NUM_WARPS
        )


def _backward(
    dact: Tensor, inputs: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], act: Tensor | None, how: tuple[str, bool]
) -> None:
    """Writes `grads`, (d gate, d up) at `inputs`, (gate, up), and `act`.

    All (T, F), both of `grads` with one row stride; `how` is (activation, eager).
    """
    activation, eager = how
    if eager:
        _eager_backward(dact, inputs, grads, act, activation)
    elif dact.numel() > 0:
        grid, block = _grid(dact)
        strides = [x.stride(0) for x in (dact, *inputs, grads[0])] + [0 if act is None else act.stride(0)]
        _gated_backward_kernel[grid](
            *(dact, *inputs, *grads, act),
            *strides,
            dact.shape[1],
            BLOCK=block,
            GELU=activation == "gelu_tanh",
            num_warps=NUM_WARPS,
        )


def _eager_act(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """fp32 (T, F) -> g s, and its derivative s + g s (1 - s) k'(g)."""
    k, slope = gate, torch.ones_like(gate)
    if activation == "gelu_tanh":
        k = gate * (GELU_LINEAR.value + GELU_CUBIC.value * gate.square())
        slope = GELU_LINEAR.value + 3.0 * GELU_CUBIC.value * gate.square()
    sigmoid = torch.sigmoid(k)
    return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid) * slope


def _eager_backward(
    dact: Tensor, inputs: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], act: Tensor | None, activation: str
) -> None:
    gate, up, dact = inputs[0].float(), inputs[1].float(), dact.float()
    value, slope = _eager_act(gate, activation)
    results = dact * up * slope, dact * value, value * up  # all of them before any is written: inputs may lie there
    grads[0].copy_(results[0])
    grads[1].copy_(results[1])
    if act is not None:
        act.copy_(results[2])


def _check(name: str, tensor: Tensor, activation: str, eager: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: its arithmetic is fp32, so that it takes fp32, fp16 and bf16, and not {tensor.dtype}")
    if not eager and not launch.can_run(tensor):
        raise ValueError(f"{name} is on {tensor.device}, where Triton does not run: pass eager=True")


def _check_output(name: str, tensor: Tensor, like: Tensor) -> None:
    """A (T, F) output beside (T, 2F) `like`: rows that lie over each other would be written twice."""
    rows, width = like.shape[0], like.shape[1] // 2
    launch.check_rows(name, tensor, (rows, width), like.dtype)
    if rows > 1 and tensor.stride(0) < width:
        raise ValueError(f"{name}: rows overlap, the row stride {tensor.stride(0)} is less than the width {width}")


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 2F) -> its gate and its up, both (T, F)."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up: needs a contiguous (T, 2F), got {tuple(gate_up.shape)} with strides {gate_up.stride()}"
        )
    width = gate_up.shape[1] // 2
    return gate_up[:, :width], gate_up[:, width:]


def swiglu(gate_up: Tensor, out: Tensor, *, activation: str = "silu", eager: bool = False) -> None:
    """out = act(gate) up, without autograd.

    gate_up (T, 2F), contiguous, gate in the first F columns; out (T, F) of the same dtype (fp32, fp16 or bf16), any
    row stride from F on. `activation` is "silu" or "gelu_tanh". Raises ValueError on anything else.
    """
    _check("gate_up", gate_up, activation, eager)
    gate, up = _halves(gate_up)
    _check_output("out", out, gate_up)
    _forward(gate, up, out, activation, eager)


def swiglu_backward(
    dact: Tensor,
    gate_up: Tensor,
    act_out: Tensor | None,
    *,
    inplace: bool = False,
    activation: str = "silu",
    eager: bool = False,
) -> Tensor:
    """d gate_up, (T, 2F) contiguous, of `swiglu` at the gradient dact (T, F) of its result, any row stride.

    act_out, (T, F) with any row stride from F on, may be dact: where it is given, act(gate) up is written into it again.
    inplace: the result takes the place of gate_up. gate_up, dtypes, `activation` and errors as in `swiglu`.
    """
    _check("gate_up", gate_up, activation, eager)
    gate, up = _halves(gate_up)
    launch.check_rows("dact", dact, tuple(gate.shape), gate.dtype)
    if act_out is not None:
        _check_output("act_out", act_out, gate_up)
    grad = gate_up if inplace else torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _backward(dact, (gate, up), _halves(grad), act_out, (activation, eager))
    return grad


def _rows(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """(..., F) -> a view (T, F)."""
    launch.check_rows(name, tensor, tuple(like.shape), like.dtype)
    try:
        return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{name}: a kernel needs rows at equal distances; got {tuple(tensor.shape)} with strides {tensor.stride()}"
        ) from None


@torch.library.custom_op("torchft::gated", mutates_args=())
def _gated_op(gate: Tensor, up: Tensor, activation: str, eager: bool) -> Tensor:
    _check("gate", gate, activation, eager)
    gate_rows, up_rows = _rows("gate", gate, gate), _rows("up", up, gate)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _forward(gate_rows, up_rows, out.view(gate_rows.shape), activation, eager)
    return out


@_gated_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str, eager: bool) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("torchft::gated_backward", mutates_args=())
def _gated_backward_op(
    dact: Tensor, gate: Tensor, up: Tensor, activation: str, eager: bool
) -> tuple[Tensor, Tensor]:
    inputs = (_rows("gate", gate, gate), _rows("up", up, gate))
    grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    # Autograd chooses the layout of its gradient, for instance strides of 0 behind a sum, so that it may be copied here.
    rows = dact.contiguous().view(inputs[0].shape)
    _backward(rows, inputs, (grads[0].view(rows.shape), grads[1].view(rows.shape)), None, (activation, eager))
    return grads[0], grads[1]


@_gated_backward_op.register_fake
def _(dact: Tensor, gate: Tensor, up: Tensor, activation: str, eager: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), torch.empty(
        gate.shape, dtype=gate.dtype, device=gate.device
    )


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.activation, ctx.eager = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_backward_op(upstream, *ctx.saved_tensors, ctx.activation, ctx.eager), None, None


_gated_op.register_autograd(_gated_backward, setup_context=_setup_context)


def gated(gate: Tensor, up: Tensor, *, activation: str = "silu", eager: bool = False) -> Tensor:
    """act(gate) up as one node with a backward: saves gate and up, and computes act again.

    gate, up (..., F) of one dtype (fp32, fp16 or bf16), contiguous or slices with any row stride and a last stride of
    1 -> (..., F) contiguous. `activation` is "silu" or "gelu_tanh". Raises ValueError on anything else.
    """
    return _gated_op(gate, up, activation, eager)
