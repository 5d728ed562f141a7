"""The gate and the LoRA linear behind it (down) as one function: y = x W^T + s x A^T B^T with x = act(gate) * up.

x, as wide as the model's widest layer, is written straight into the buffer of the product (lora_linear.py) and not kept:
backward makes it again in the pass that takes the gate's gradient.

Legend as in lora_linear.py, with D the intermediate width: T tokens, O output width, P padded rank.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels.lora_linear import (
    Group,
    adapter_gradients,
    extended_weight,
    input_gradient,
    padded_rank,
    project,
)
from torchft.kernels.swiglu import swiglu, swiglu_backward


class _LoraSwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        gate_up: Tensor,
        activation: str,
        group: Group,
        bias: Tensor | None,
        eager: str,
        time: str,
        *adapters: Tensor,
    ) -> Tensor:
        ctx.activation, ctx.group, ctx.eager = activation, group, eager
        if time == "again":
            ctx.save_for_backward(gate_up)
            return gate_up.new_empty(gate_up.shape[0], sum(part.shape[0] for part in group.b))
        extended = extended_weight(group, gate_up.dtype, "nf4" in eager)
        pad, width = padded_rank(group.b), gate_up.shape[1] // 2
        wide = gate_up.new_empty(gate_up.shape[0], width + pad)
        swiglu(gate_up, wide[:, :width], activation=activation, eager="swiglu" in eager)
        y, xa = project(wide, extended, pad, bias)
        ctx.save_for_backward(gate_up, *([xa] if time == "only" else []))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (gate_up, *kept), group, dy = ctx.saved_tensors, ctx.group, dy.contiguous()
        extended, pad = extended_weight(group, dy.dtype, "nf4" in ctx.eager), padded_rank(group.b)
        dx, dyb = input_gradient(dy, extended, pad)
        del extended  # before d_gate_up, as large as it, is made
        # x takes the place of dx, element by element, as that is read
        how = {"inplace": not kept, "activation": ctx.activation, "eager": "swiglu" in ctx.eager}
        d_gate_up = swiglu_backward(dx, gate_up, dx, **how)
        if not kept:
            below = extended_weight(group, dy.dtype, "nf4" in ctx.eager, adapters_only=True)
            kept = [dx @ below[below.shape[0] - pad :, : dx.shape[1]].T]
        return d_gate_up, *[None] * 5, *adapter_gradients(dyb, dx, dy, kept[0], group)


def lora_swiglu_linear(
    gate_up: Tensor,
    group: Group,
    bias: Tensor | None = None,
    activation: str = "silu",
    eager: str = "",
    time: str = "only",
) -> Tensor:
    """gate_up (T, 2D) contiguous, gate first -> (T, O), with gradients for gate_up, A and B.

    activation: as in swiglu.py. `eager`: kernels that plain PyTorch shall do instead (swiglu, nf4). `time`: the "only" one, or
    of activation checkpointing's two: after the "first", backward is given a gate_up of its own, which its gradient replaces
    (448 MiB for 8B at 8,192 tokens); "again", nothing is computed: backward makes all it needs of gate_up, the result is empty.
    """
    return _LoraSwigluLinear.apply(gate_up, activation, group, bias, eager, time, *group.a, *group.b)
