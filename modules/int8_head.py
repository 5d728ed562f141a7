"""lm_head in 8 bits: int8 codes with one fp32 scale per row, for frozen heads of models whose linears are in 4 bits.

    scale = max |w| / 127 of a row        code = round(w / scale), ties to even        w ~ code * scale

The error of a row of normal numbers is some 0.9% (root mean square; NF4's is 9%, and the logits of all words hang on the head).
Nothing here ever holds the dense head: products walk over the vocabulary and decode a slice of rows at a time into a buffer,
in the dtype of the activations, so that all of it computes what the dense head `code * scale`, rounded once, would.

The weight is a plain int8 Parameter under its own name; its scales are the buffer `weight_scale`, which is in no state dict.
Of a tied pair embed_tokens stays as it is, and the head has its own copy. Several processes hold the head whole, each for
itself: the loss would otherwise gather it for every micro-batch. The loss over it is in loss.py. Left out: training it.

Legend: D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

LARGEST = 127
SMALLEST_ROW = 1e-30  # rows of smaller numbers become zeros
SLICE_BYTES = 64 * 2**20  # of decoded rows: of 128k x 4096 in bf16 a sixteenth, 8,016 rows
ROWS_MULTIPLE = 16  # of a slice, so that its columns of the logits begin where a vector load may


def is_int8(weight: Tensor) -> bool:
    return weight.dtype == torch.int8


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(V, D) of any float dtype -> codes (V, D) int8 and scales (V,) fp32. A row with an infinity or NaN gives scale NaN."""
    rows = rows.float()
    largest = rows.abs().amax(dim=1).clamp_min(SMALLEST_ROW)
    scale = largest / torch.full_like(largest, LARGEST)  # a tensor: a GPU multiplies by a number's rounded inverse
    codes = torch.round(rows / scale[:, None]).clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes, torch.where(scale.isfinite(), scale, torch.nan)


def row_slices(num_rows: int, width: int, itemsize: int) -> list[slice]:
    """All rows in slices of about equal size, each of at most SLICE_BYTES where that holds 16 rows."""
    count = -(-num_rows * width * itemsize // SLICE_BYTES)
    step = max(1, -(-num_rows // (max(1, count) * ROWS_MULTIPLE))) * ROWS_MULTIPLE
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their dense weights in `dtype`), slice by slice; the next slice takes the memory of the one before."""
    slices = row_slices(*codes.shape, dtype.itemsize)
    buffer = torch.empty(slices[0].stop, codes.shape[1], dtype=dtype, device=codes.device)
    for rows in slices:
        yield rows, torch.mul(codes[rows], scale[rows, None], out=buffer[: rows.stop - rows.start])


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (N, D) -> logits (N, V) in x's dtype, without autograd."""
    logits = x.new_empty(len(x), len(codes))
    for rows, weight in decoded(codes, scale, x.dtype):
        torch.mm(x, weight.T, out=logits[:, rows])
    return logits


def input_gradient(dlogits: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """dlogits (N, V) -> dx (N, D) in its dtype; the sum over the slices is taken in fp32."""
    wide = torch.promote_types(dlogits.dtype, torch.float32)
    total = torch.zeros(len(dlogits), codes.shape[1], dtype=wide, device=dlogits.device)
    for rows, weight in decoded(codes, scale, dlogits.dtype):
        part = dlogits[:, rows]
        if part.is_cuda and part.dtype != wide:
            torch.addmm(total, part, weight, out_dtype=wide, out=total)
        else:
            total.addmm_(part.to(wide), weight.to(wide))
    return total.to(dlogits.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return product(x, codes, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dlogits: Tensor) -> tuple[Tensor, None, None]:
        return input_gradient(dlogits.contiguous(), *ctx.saved_tensors), None, None


class Int8Head(nn.Linear):
    """A frozen lm_head whose `weight` is int8. Made by `quantize_head`."""

    def forward(self, h: Tensor) -> Tensor:  # (..., D) -> (..., V)
        return _Product.apply(h.reshape(-1, h.shape[-1]), self.weight, self.weight_scale).view(*h.shape[:-1], -1)


@dataclass(frozen=True)
class Int8Report:
    """What `quantize_head` did, for one printed line."""

    num_bytes: int  # of codes and scales
    was_tied: bool

    def __str__(self) -> str:
        tied = "; beside embed_tokens, to which it is tied: that saves memory with model.offload=[embeddings] alone" * self.was_tied
        return f"lm_head: 8 bits with a scale per row, {self.num_bytes / 2**20:,.1f} MiB, whole on each process{tied}"


def quantize_head(model: nn.Module) -> Int8Report:
    """Give `model` (a CausalLM) an Int8Head in place of its frozen lm_head.

    Meant, as `quantize_nf4`, for a model on meta, after `add_lora` and before the weights are streamed in; works on real
    weights too.

    Raises:
        ValueError: the head is trained, or is not a plain linear.
    """
    plain = model.lm_head
    if type(plain) is not nn.Linear or plain.weight.requires_grad:
        raise ValueError("lm_head is trained here, and only a frozen one can be stored in 8 bits")
    was_tied = plain.weight is model.model.embed_tokens.weight
    head = Int8Head(plain.in_features, plain.out_features, bias=False, device="meta")
    codes, scale = quantize_rows(plain.weight.detach())
    head.weight = nn.Parameter(codes, requires_grad=False)
    head.register_buffer("weight_scale", scale, persistent=False)
    model.lm_head = head
    return Int8Report(codes.nbytes + scale.nbytes, was_tied)
