"""Tokens to experts and back: who is chosen with what weight, rows sorted by expert, and one product per expert.

    p = softmax(router x)        the k largest are chosen; their weights are p, or p over their sum
    y = sum over the chosen e of p_e * expert_e(x)         (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538)

Every token is computed, none is dropped. On CUDA nothing waits for the device: where an expert's rows end is counted there and
read there by one grouped product. Left out: noise on the router. Its auxiliary loss is balance.py.

Legend: N tokens, k experts of a token, M = N * k rows, E experts, D width of a row.
"""

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

ROUTERS = ("gate", "router")  # what checkpoints call the router's linear: never NF4, and with an adapter only where named
ALIGNED = 8  # a bf16 grouped product takes rows of a multiple of 16 bytes


class Rows(NamedTuple):
    """M rows sorted by their expert."""

    offsets: Tensor  # (E,) int32: the row behind each expert's last
    experts: Tensor  # (M,) int64: each row's expert


def route(logits: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Each token's experts: logits (N, E) -> weights (N, k) fp32 and indices (N, k).

    normalised: the weights sum to one, as a softmax over the chosen logits alone does; else they are shares of all experts.
    """
    logits = logits.float()
    values, chosen = logits.topk(top_k, dim=-1)
    if normalised:
        return values.softmax(dim=-1), chosen
    return (values - logits.logsumexp(dim=-1, keepdim=True)).exp(), chosen


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Rows, Tensor]:
    """chosen (N, k) -> where the experts' rows are, and the order (M,): row i is the choice order[i] of chosen.flatten()."""
    experts, order = chosen.flatten().sort(stable=True)
    each = torch.arange(num_experts, device=chosen.device)
    return Rows(torch.searchsorted(experts, each, right=True, out_int32=True), experts), order


class _Dispatch(torch.autograd.Function):
    """Row i is token order[i] // k. Its gradient is a gather and a sum, where autograd's would add row by row, in any order."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order.argsort()].unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Unsort(torch.autograd.Function):
    """Choice order[i] is row i."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order.argsort()]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None


def dispatch(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Tokens (N, D) -> the experts' rows (M, D)."""
    return _Dispatch.apply(x, order, top_k)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The experts' results (M, D) and weights (N, k) -> (N, D), in the dtype of the rows."""
    results = _Unsort.apply(rows, order).unflatten(0, weights.shape)  # (N, k, D)
    return (results * weights.to(rows.dtype).unsqueeze(-1)).sum(1)


def grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows times its matrix: x (M, in) sorted by expert, weights (E, in, out), offsets (E,) -> (M, out)."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return grouped_mm_fused(x, weights, offsets)
    if x.is_cuda:
        _warn_of_loop(x.dtype)
    return grouped_mm_eager(x, weights, offsets)


def grouped_mm_fused(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm` as one kernel. What is no multiple of 8 wide, an adapter's rank say, is padded with zeros."""
    width = weights.shape[2]
    short_in, short_out = -weights.shape[1] % ALIGNED, -width % ALIGNED
    if short_in:
        x = F.pad(x, (0, short_in))
    if short_in or short_out:
        weights = F.pad(weights, (0, short_out, 0, short_in))
    return torch._grouped_mm(x, weights, offs=offsets)[:, :width]


def grouped_mm_eager(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm` as a loop, for any device and dtype; waits for the device."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([rows @ weight for rows, weight in zip(x.split(counts), weights.unbind(), strict=True)])


@functools.cache
def _warn_of_loop(dtype: torch.dtype) -> None:
    warnings.warn(f"experts are computed one after the other in {dtype}, several times slower than in bf16", stacklevel=4)
