"""The head and its loss as ops that never hold all logits (see modules/loss.py), with one kernel between the products.

For each chunk of tokens x (C, D), with the head W (V, D), a target t and an upstream gradient s = d loss / d logprob of
each token:

    logits = x W^T                                              a product, into a buffer that all chunks share
    logprob = logits_t - log sum_v exp(logits_v)                the kernel
    logits <- s (onehot(t) - softmax(logits))                   the kernel, in place: d loss / d logits
    d x = logits W,   d W += logits^T x                         products

The maximum and the sum of the exponentials are taken in one pass over V ("online", Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867, algorithm 3). `linear_cross_entropy`, where s = -1, does all of it in forward.
So does `linear_logprobs` below a frozen W: d x for s = -1, which backward multiplies by -s, row by row. For a trained W, whose
gradient mixes the rows, it makes the logits a second time in backward. A frozen W may be int8 with a scale per row: then
its two products are taken slice by slice of V (int8_rows.py), each of which is decoded for each chunk.

Legend: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from torchft.kernels import launch
from torchft.kernels.int8_rows import input_gradient_into, product_into
from torchft.kernels.scaled_cast import scaled_cast

IGNORE_INDEX = -100  # label of a token that is not supervised
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# 16 elements a thread with 16 warps, two loads of 16 bytes in bf16; 4 programs fit on a multiprocessor, so that the 512
# rows of a chunk run at once on 132. At least 1024, so that no two warps hold the same element.
MAX_BLOCK = 8192
MIN_BLOCK = 1024

LOGITS_BYTES = 128 * 2**20  # of one chunk; twice or four times as many where `_tokens_at_once` says so


@triton.jit
def _logprob_kernel(
    p_logits,
    p_labels,
    p_upstream,
    p_logprob,
    stride_logits,
    stride_labels,
    stride_upstream,
    V: tl.constexpr,  # a loop's end as a plain argument is more than Triton 3.6's interpreter takes
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    """One row: logprob = (l_t - m) - log(e + e_t), then l <- s (onehot(t) - softmax(l)) in place.

    m is the maximum, e_t = exp(l_t - m), and e = sum over v != t of exp(l_v - m). The target's element is s e / (e + e_t): as
    1 - p it would be lost where p is near one. s is -1 where p_upstream is None. Labels outside of 0..V-1 give NaN.
    """
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_row * stride_labels).to(tl.int64)
    p_row = p_logits + i_row * stride_logits
    if label == IGNORE:  # whatever the row holds
        tl.store(p_logprob + i_row, 0.0)
        if WRITE_GRADIENT:
            for start in range(0, V, BLOCK):
                o_v = start + tl.arange(0, BLOCK)
                tl.store(p_row + o_v, 0.0, mask=o_v < V)
    else:
        target = tl.load(p_row + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        top = target  # m and e of what was seen so far
        others = target * 0.0
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            b_logits = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)  # (BLOCK,)
            new_top = tl.maximum(top, tl.max(b_logits, axis=0))
            b_exp = tl.where(o_v == label, 0.0, tl.exp(b_logits - new_top))
            others = others * tl.exp(top - new_top) + tl.sum(b_exp, axis=0)
            top = new_top
        total = others + tl.exp(target - top)
        tl.store(p_logprob + i_row, (target - top) - tl.log(total))
        if WRITE_GRADIENT:
            upstream = -1.0
            if p_upstream is not None:
                upstream = tl.load(p_upstream + i_row * stride_upstream).to(tl.float32)
            tl.debug_barrier()  # all threads have read the target's logit
            for start in range(0, V, BLOCK):
                o_v = start + tl.arange(0, BLOCK)
                b_logits = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
                b_grad = tl.where(o_v == label, others, -tl.exp(b_logits - top)) * (upstream / total)
                tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def _logprobs(
    logits: Tensor, labels: Tensor, upstream: Tensor | None, out: Tensor, write_gradient: bool, eager: bool
) -> None:
    """logits (C, V), labels (C,), upstream (C,) or None -> out (C,) fp32, and the gradient in the memory of the logits."""
    if eager:
        _eager_logprobs(logits, labels, upstream, out, write_gradient)
        return
    vocabulary = logits.shape[1]
    block = min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(vocabulary)))
    _logprob_kernel[(len(labels),)](
        *(logits, labels, upstream, out),
        *(logits.stride(0), labels.stride(0), 0 if upstream is None else upstream.stride(0)),
        V=vocabulary,
        IGNORE=IGNORE_INDEX,
        BLOCK=block,
        WRITE_GRADIENT=write_gradient,
        num_warps=block // 512 if block > 2048 else 4,
    )


def _eager_logprobs(
    logits: Tensor, labels: Tensor, upstream: Tensor | None, out: Tensor, write_gradient: bool
) -> None:
    """The kernel in PyTorch's ops; they raise on labels outside of 0..V-1."""
    ignored = (labels == IGNORE_INDEX)[:, None]  # (C, 1)
    targets = labels[:, None].long().masked_fill(ignored, 0)
    logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)  # (C, V)
    chosen = logprobs.gather(1, targets)
    out.copy_(chosen.masked_fill(ignored, 0.0)[:, 0])
    if write_gradient:
        gradient = logprobs.exp_().neg_().scatter_(1, targets, -torch.expm1(chosen))
        gradient *= -1.0 if upstream is None else upstream[:, None]
        logits.copy_(gradient.masked_fill_(ignored, 0.0))


def default_chunk_size(vocabulary: int, dtype: torch.dtype) -> int:
    """The largest power of two from 128 to 2048 whose logits take at most 128 MiB, or 128.

    Of these two alone, and not of the memory that is free: results would depend on it.
    """
    size = 2048
    while size > 128 and size * vocabulary * dtype.itemsize > LOGITS_BYTES:
        size //= 2
    return size


def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total (V, D) fp32 += gradient (C, V)^T x (C, D): on CUDA the sum stays in fp32 from the product's first term on."""
    if x.dtype == torch.float32:
        total.addmm_(gradient.T, x)
    elif x.is_cuda:
        torch.addmm(total, gradient.T, x, out_dtype=torch.float32, out=total)
    else:
        total += gradient.T @ x


def _tokens_at_once(hidden: Tensor, weight: Tensor, trained: bool) -> int:
    """Tokens of a chunk. For each an int8 head is decoded anew, and a head's gradient read and written in fp32: take more there."""
    factor = 4 if trained else 2 if weight.dtype == torch.int8 else 1
    return factor * default_chunk_size(len(weight), hidden.dtype)


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _walk(
    inputs: Inputs, upstream: Tensor | None, chunk_size: int, wanted: list[bool], eager: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, scale, labels -> log-probabilities (N,) fp32, d hidden, d weight in fp32 (empty where not `wanted`)."""
    hidden, weight, scale, labels = inputs
    _check(inputs, chunk_size, eager)
    (num_tokens, width), vocabulary = hidden.shape, len(weight)
    chunk_size = chunk_size or _tokens_at_once(hidden, weight, wanted[1])
    head = weight.to(hidden.dtype) if scale is None else weight  # (V, D)
    ignored = (labels == IGNORE_INDEX)[:, None]  # (N, 1)
    logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(min(chunk_size, num_tokens), vocabulary, dtype=hidden.dtype, device=hidden.device)
    grad_hidden = torch.empty((num_tokens, width) if wanted[0] else 0, dtype=hidden.dtype, device=hidden.device)
    # fp32: in bf16 the sum over many chunks would lose small terms.
    grad_weight = torch.zeros((vocabulary, width) if wanted[1] else 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, num_tokens, chunk_size):
        chunk = slice(start, start + chunk_size)
        x = hidden[chunk].masked_fill(ignored[chunk], 0.0)  # NaN times a gradient of zero would be NaN
        logits = product_into(x, head, scale, buffer[: len(x)], eager)
        own = None if upstream is None else upstream[chunk]
        _logprobs(logits, labels[chunk], own, logprobs[chunk], any(wanted), eager)  # the logits are their gradient now
        if wanted[0]:
            input_gradient_into(logits, head, scale, grad_hidden[chunk], eager)
        if wanted[1]:
            _add_product(grad_weight, logits, x)
    return logprobs, grad_hidden, grad_weight


def _check(inputs: Inputs, chunk_size: int, eager: bool) -> None:
    hidden, weight, scale, labels = inputs
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden, weight: need (N, D) and (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: need ({len(hidden)},) int64 or int32, got {tuple(labels.shape)} {labels.dtype}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: the loss is fp32, so that it takes fp32, fp16 and bf16, and not {hidden.dtype}")
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError("scale: an int8 weight needs one of each row, and no other weight has them")
    if chunk_size < 0:
        raise ValueError(f"chunk_size: {chunk_size} is negative (0 chooses)")
    if not eager and not launch.can_run(hidden):
        raise ValueError(f"hidden is on {hidden.device}, where Triton does not run: pass eager=True")


@torch.library.custom_op("torchft::linear_cross_entropy", mutates_args=())
def _cross_entropy_op(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor, chunk_size: int, wanted: list[bool], eager: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, grad_hidden, grad_weight = _walk((hidden, weight, scale, labels), None, chunk_size, wanted, eager)
    return 0.0 - logprobs.sum(), grad_hidden, grad_weight


def _fake_gradients(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    grad_hidden = torch.empty(hidden.shape if wanted[0] else 0, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.empty(weight.shape if wanted[1] else 0, dtype=torch.float32, device=hidden.device)
    return grad_hidden, grad_weight


@_cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor, chunk_size: int, wanted: list[bool], eager: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    return loss, *_fake_gradients(hidden, weight, wanted)


def _setup_cross_entropy(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.weight_dtype, ctx.wanted, ctx.eager = inputs[1].dtype, inputs[5], inputs[6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward is given zeros as large as the head for what is no loss
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _cross_entropy_backward(ctx: FunctionCtx, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    scaled_hidden = grad_hidden * upstream if ctx.wanted[0] else None
    scaled_weight = scaled_cast(grad_weight, upstream, ctx.weight_dtype, ctx.eager) if ctx.wanted[1] else None
    return scaled_hidden, scaled_weight, *[None] * 5


_cross_entropy_op.register_autograd(_cross_entropy_backward, setup_context=_setup_cross_entropy)


@torch.library.custom_op("torchft::linear_logprobs", mutates_args=())
def _logprobs_op(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor, chunk_size: int, ahead: bool, eager: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,); `ahead`: and minus the gradient of each for its row of hidden (N, D), else nothing."""
    return _walk((hidden, weight, scale, labels), None, chunk_size, [ahead, False], eager)[:2]


@_logprobs_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor, chunk_size: int, ahead: bool, eager: bool
) -> tuple[Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    return logprobs, _fake_gradients(hidden, weight, [ahead, False])[0]


@torch.library.custom_op("torchft::linear_logprobs_backward", mutates_args=())
def _logprobs_backward_op(
    upstream: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor,
    chunk_size: int, wanted: list[bool], eager: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _walk((hidden, weight, scale, labels), upstream, chunk_size, wanted, eager)[1:]


@_logprobs_backward_op.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor | None, labels: Tensor,
    chunk_size: int, wanted: list[bool], eager: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_gradients(hidden, weight, wanted)


def _setup_logprobs(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_size, ctx.ahead, ctx.eager = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*([output[1]] if ctx.ahead else tensors))


@once_differentiable
def _logprobs_backward(ctx: FunctionCtx, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if ctx.ahead:
        (ahead,) = ctx.saved_tensors
        return (ahead * -upstream[:, None]).to(ahead.dtype), *[None] * 6
    wanted = list(ctx.needs_input_grad[:2])
    grads = _logprobs_backward_op(upstream, *ctx.saved_tensors, ctx.chunk_size, wanted, ctx.eager)
    grad_hidden, grad_weight = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.saved_tensors[1].dtype), *[None] * 5


_logprobs_op.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, scale: Tensor | None = None, chunk_size: int = 0, eager: bool = False
) -> Tensor:
    """Sum over supervised tokens of -log softmax(hidden weight^T)[label], a fp32 scalar.

    hidden (N, D) fp32, fp16 or bf16; weight (V, D) of any float dtype (the product is taken in hidden's); labels (N,)
    int64 or int32, already shifted, -100 where a token is not supervised: such a row may hold anything. Without a
    supervised token the result is a zero that is still connected to the graph. scale (V,) fp32: of the rows of an int8 weight,
    which gets no gradient. `chunk_size` in tokens, 0 chooses. Raises ValueError on other shapes and dtypes.
    """
    grad = torch.is_grad_enabled()
    wanted = [grad and hidden.requires_grad, grad and weight.requires_grad]
    return _cross_entropy_op(hidden, weight, scale, labels, chunk_size, wanted, eager)[0]


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, scale: Tensor | None = None, chunk_size: int = 0, eager: bool = False
) -> Tensor:
    """log softmax(hidden weight^T)[label] of each token: (N,) fp32, zero where the label is -100.

    Arguments and errors as in `linear_cross_entropy`. For losses that need each token's own: preference pairs, RL.
    """
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    return _logprobs_op(hidden, weight, scale, labels, chunk_size, ahead, eager)[0]
