"""The head and its loss as one op that never holds the logits: 4 GiB in bf16 for 16k tokens and 128k words.

Both ops walk over the tokens in chunks. `linear_cross_entropy` computes the gradient of a chunk while its logits are
there, in forward; `linear_logprobs`, whose upstream gradient is known only in backward, computes the logits again
there. A frozen head may be in 8 bits (int8_head.py): then its products are taken slice by slice of the vocabulary.

Legend: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.modules import int8_head

IGNORE_INDEX = -100  # label of a token that is not supervised

# 256 x 128k logits are 0.12 GiB in fp32, and still rows enough for the matrix multiplications: on an H200, 8192 tokens take 36 ms,
# 34 ms in chunks of 512 that need 0.28 GiB more.
CHUNK_SIZE = 256


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in fp32, any shape: nearly the identity near zero, never beyond +-cap (Gemma 2)."""
    return cap * torch.tanh(logits.float() / cap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int = CHUNK_SIZE,
    softcap: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Sum over supervised tokens of -log softmax(hidden weight^T)[label], a fp32 scalar.

    hidden (N, D) and weight (V, D) of any float dtypes (the product is taken in hidden's), labels (N,) int, already
    shifted. Without a supervised token the result is a zero that is still connected to the graph, so that `backward`
    runs. softcap: the logits become cap * tanh(logits / cap). scale (V,) fp32: of weight's rows, where that is int8.
    """
    grad_wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, chunk_size, softcap, scale, grad_wanted)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int = CHUNK_SIZE,
    softcap: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """log softmax(hidden weight^T)[label] of each token: (N,) fp32, zero where the label is `ignore_index`.

    Arguments as in `linear_cross_entropy`. For losses that need each token's own: preference pairs, RL.
    """
    return _LinearLogprobs.apply(hidden, weight, labels, ignore_index, chunk_size, softcap, scale)


def _chunks(num_tokens: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, num_tokens, chunk_size)]


@dataclass(frozen=True)
class _Head:
    """The weight (V, D) in the dtype to compute in, or int8 with the scales of its rows."""

    weight: Tensor
    scale: Tensor | None

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.scale is None else int8_head.product(x, self.weight, self.scale)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight if self.scale is None else int8_head.input_gradient(gradient, self.weight, self.scale)


def _head(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> _Head:
    return _Head(weight.to(dtype) if scale is None else weight, scale)


def _chunk_logprobs(
    x: Tensor, head: _Head, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (C, D), targets (C, 1) -> logits (C, V), fp32 log-probabilities (C, V), and those of the targets (C, 1).

    With a cap the logits are the capped ones, in fp32.
    """
    logits = head.logits(x)
    if softcap is not None:
        logits = soft_cap(logits, softcap)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    return logits, logprobs, logprobs.gather(1, targets)


def _chunk_gradient(x: Tensor, head: _Head, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets (C, 1), and the gradient of minus their sum (C, V): softmax - onehot(target).

    In bf16 a probability near one minus one would be zero, so the target's element is taken as e^logprob - 1 in fp32. With a
    cap c, each element is multiplied by the slope of c tanh(l / c), which is 1 - tanh^2 = 1 - (capped / c)^2.
    """
    logits, logprobs, chosen = _chunk_logprobs(x, head, targets, softcap)
    slope = None if softcap is None else 1 - (logits / softcap).square()
    gradient = torch.exp(logprobs, out=logits)  # the softmax, in the memory of the logits
    gradient = gradient.scatter_(1, targets, torch.expm1(chosen).to(gradient.dtype))
    return chosen, gradient if slope is None else (gradient * slope).to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves d loss / d hidden and d loss / d weight, computed in forward; backward only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        chunk_size: int,
        softcap: float | None,
        scale: Tensor | None,
        grad_wanted: bool,
    ) -> Tensor:
        head = _head(weight, scale, hidden.dtype)
        ignored = (labels == ignore_index)[:, None]  # (N, 1)
        targets = labels[:, None].long().masked_fill(ignored, 0)  # (N, 1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if grad_wanted and hidden.requires_grad else None
        grad_weight = None
        if grad_wanted and weight.requires_grad:  # fp32: in bf16 the sum over many chunks would lose small terms
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in _chunks(len(labels), chunk_size):
            x = hidden[chunk].masked_fill(ignored[chunk], 0.0)  # whatever an ignored row holds, NaN included, stays out
            if grad_wanted:
                chosen, gradient = _chunk_gradient(x, head, targets[chunk], softcap)
            else:
                chosen, gradient = _chunk_logprobs(x, head, targets[chunk], softcap)[2], None
            total -= chosen.masked_fill(ignored[chunk], 0.0).sum()
            if grad_hidden is not None:
                grad_hidden[chunk] = head.input_gradient(gradient).masked_fill_(ignored[chunk], 0.0)
            if grad_weight is not None:
                grad_weight += gradient.T @ x  # x is zero in ignored rows
            del gradient  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 6


class _LinearLogprobs(torch.autograd.Function):
    """Saves its inputs; backward computes the logits a second time and scales each row by its upstream gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        chunk_size: int,
        softcap: float | None,
        scale: Tensor | None,
    ) -> Tensor:
        head = _head(weight, scale, hidden.dtype)
        ignored = (labels == ignore_index)[:, None]  # (N, 1)
        targets = labels[:, None].long().masked_fill(ignored, 0)  # (N, 1)
        result = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(labels), chunk_size):
            result[chunk] = _chunk_logprobs(hidden[chunk], head, targets[chunk], softcap)[2]
        ctx.save_for_backward(hidden, weight, targets, ignored, scale)
        ctx.chunk_size, ctx.softcap = chunk_size, softcap
        return result.masked_fill_(ignored, 0.0)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, ignored, scale = ctx.saved_tensors
        head = _head(weight, scale, hidden.dtype)
        upstream = -upstream[:, None].masked_fill(ignored, 0.0)  # (N, 1)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(targets), ctx.chunk_size):
            x = hidden[chunk].masked_fill(ignored[chunk], 0.0)  # (C, D)
            gradient = _chunk_gradient(x, head, targets[chunk], ctx.softcap)[1]
            gradient *= upstream[chunk]  # (C, V)
            if grad_hidden is not None:
                grad_hidden[chunk] = head.input_gradient(gradient)
            if grad_weight is not None:
                grad_weight += gradient.T @ x
            del gradient
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 5
