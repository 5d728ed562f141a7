"""One AdamW update (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) of a bf16 tensor with bf16 moments.

    g = clip grad                                   t: steps so far, this one included
    m = m + (1 - beta1) (g - m)
    v = v + (1 - beta2) (g^2 - v)
    p = p (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

All of it is fp32, and p, m and v are rounded STOCHASTICALLY when they are stored: up with the probability of the part that
bf16 cannot hold, so that the rounding has no bias. To the nearest, an update below half a unit of bf16 (1/512 of the
weight) is lost at every step, and v stands still, since beta2 = 0.999 changes it by less than that
(Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). p takes its step from m and v before they are rounded.

The random bits are a hash of (seed, step, index of the tensor, index of the element in the whole tensor): no generator's
state is needed to go on, and a tensor that is divided over processes gets the bits of the whole one. Kernel and twin do the
same fp32 and integer operations in the same order, and give the same bits. Read and written are 14 B per element with a
bf16 gradient (16 B with a fp32 one), each tensor once.
Left out: tensors in other dtypes, several tensors in one launch.

Legend: N elements of the part of the tensor that is at hand, the first of which is element `first` of the whole.
"""

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchft.kernels import launch

# 8 elements a thread: loads of 16 bytes in bf16. Each thread does the scalars in fp64, which costs as much as some elements:
# where there are enough of those, a program takes several blocks.
BLOCK = tl.constexpr(1024)
MANY_BLOCKS, LARGE = 8, 2**20  # blocks of a program, for tensors from LARGE elements on
NUM_WARPS = 4
PIECE = 2**22  # elements that the eager twin takes at a time, whose integers are 8 bytes each

WORD = 0xFFFFFFFF
MULTIPLY_1, MULTIPLY_2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
GOLDEN = tl.constexpr(0x9E3779B9)  # 2^32 / golden ratio: a word far from small numbers
QUIET_NAN = tl.constexpr(0x7FC00000)


class Rule(NamedTuple):
    """The hyperparameters of a step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@triton.jit
def _mixed(x):
    """A bijection of uint32 in which every bit depends on all (https://nullprogram.com/blog/2018/07/31/, lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLY_1).to(tl.uint32)
    x = x ^ (x >> 15)
    x = (x * MULTIPLY_2).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _store_rounded(p_out, o_n, m_n, b_x, b_random):
    """b_x (fp32) to bf16: the 16 bits that are dropped carry into those that stay if random bits below 2^16 are added."""
    b_bits = tl.where(b_x == b_x, b_x.to(tl.uint32, bitcast=True) + b_random, QUIET_NAN)  # a NaN's own bits could run over
    tl.store(p_out + o_n, (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=m_n)


@triton.jit(do_not_specialize=["first", "key"])
def _adamw_kernel(
    p_param,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_step,
    p_clip,
    p_found_inf,
    N,
    first,
    key,
    lr,
    weight1,
    weight2,
    eps,
    decay,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks. p_step: the steps so far, this one included; p_clip may be None; nothing is done at found_inf 1."""
    if tl.load(p_found_inf) != 0.0:
        return
    # Scalars in fp64: 1 - 0.999^t of the first steps would keep three digits in fp32.
    step = tl.load(p_step)
    one = tl.full((), 1.0, tl.float64)
    rate = (one * lr / (one - tl.exp(step * tl.log(one - weight1)))).to(tl.float32)
    unbias = (one / tl.sqrt(one - tl.exp(step * tl.log(one - weight2)))).to(tl.float32)
    keep = (one - one * lr * decay).to(tl.float32)

    key1 = _mixed((step.to(tl.int64) ^ key).to(tl.uint32))
    key2 = _mixed(key1 + GOLDEN)
    clip = 1.0 if p_clip is None else tl.load(p_clip)  # the product with 1 is exact

    for i_block in range(BLOCKS):
        o_n = (tl.program_id(0).to(tl.int64) * BLOCKS + i_block) * BLOCK + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_grad = tl.load(p_grad + o_n, mask=m_n, other=0.0).to(tl.float32) * clip  # (BLOCK,), as all below
        b_avg = tl.load(p_exp_avg + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_sq = tl.load(p_exp_avg_sq + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_param = tl.load(p_param + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_avg = b_avg + weight1 * (b_grad - b_avg)
        b_sq = b_sq + weight2 * (b_grad * b_grad - b_sq)
        b_param = b_param * keep - rate * tl.div_rn(b_avg, tl.sqrt_rn(b_sq) * unbias + eps)

        o_whole = o_n + first
        b_word1 = _mixed(o_whole.to(tl.uint32) ^ key1)
        b_word2 = _mixed((b_word1 + key2) ^ (o_whole >> 32).to(tl.uint32))
        _store_rounded(p_param, o_n, m_n, b_param, b_word2 & 0xFFFF)
        _store_rounded(p_exp_avg, o_n, m_n, b_avg, b_word2 >> 16)
        _store_rounded(p_exp_avg_sq, o_n, m_n, b_sq, b_word1 >> 16)


def _eager_mixed(x: Tensor | int) -> Tensor | int:
    """`_mixed` of words that are kept in 64 bits."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLY_1.value) & WORD
    x = x ^ (x >> 15)
    x = (x * MULTIPLY_2.value) & WORD
    return x ^ (x >> 16)


def _eager_rounded(x: Tensor, random: Tensor) -> Tensor:
    """fp32 (N,) to bf16 with random words below 2^16."""
    bits = torch.where(x == x, (x.view(torch.int32).long() & WORD) + random, QUIET_NAN.value) >> 16
    return torch.where(bits < 2**15, bits, bits - 2**16).short().view(torch.bfloat16)


def _eager(tensors: tuple[Tensor, ...], step: Tensor, rule: Rule, place: tuple[int, int], clip: Tensor | None) -> list[Tensor]:
    """The new parameter and moments, of (N,) parts of parameter, gradient and moments. `place` is (first, key)."""
    param, grad, avg, sq = (tensor.float() for tensor in tensors)
    lr, weight1, weight2, eps, decay = _scalars(rule)
    rate = (lr / (1.0 - (1.0 - weight1) ** step.double())).float()
    unbias = (1.0 / torch.sqrt(1.0 - (1.0 - weight2) ** step.double())).float()
    keep = _fp32(1.0 - lr * decay)
    grad = grad if clip is None else grad * clip
    avg = avg + weight1 * (grad - avg)
    sq = sq + weight2 * (grad * grad - sq)
    param = param * keep - rate * (avg / (sq.sqrt() * unbias + eps))

    first, key = place
    whole = torch.arange(first, first + len(param), device=param.device)
    key1 = _eager_mixed((key ^ step.long()) & WORD)
    key2 = _eager_mixed((key1 + GOLDEN.value) & WORD)
    word1 = _eager_mixed((whole & WORD) ^ key1)
    word2 = _eager_mixed(((word1 + key2) & WORD) ^ (whole >> 32))
    return [_eager_rounded(param, word2 & 0xFFFF), _eager_rounded(avg, word2 >> 16), _eager_rounded(sq, word1 >> 16)]


def _fp32(x: float) -> float:
    """Rounded to fp32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def _scalars(rule: Rule) -> list[float]:
    """lr, 1 - beta1, 1 - beta2, eps and the decay as the kernel gets them: in fp32."""
    return [_fp32(x) for x in (rule.lr, 1.0 - rule.betas[0], 1.0 - rule.betas[1], rule.eps, rule.weight_decay)]


def _key(seed: int, index: int) -> int:
    """A word of a seed of 64 bits and the number of a tensor, as an int32."""
    key = _eager_mixed(_eager_mixed(_eager_mixed(seed & WORD) ^ (seed >> 32 & WORD)) ^ (index + 1))
    return key - (key >> 31 << 32)


def _check(tensors: dict[str, Tensor], scalars: dict[str, Tensor | None], eager: bool) -> None:
    param = tensors["param"]
    for name, tensor in tensors.items():
        dtypes = (torch.bfloat16, torch.float32) if name == "grad" else (torch.bfloat16,)
        if tensor.dtype not in dtypes or tensor.shape != param.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: needs to be contiguous, {' or '.join(map(str, dtypes))}, of shape {tuple(param.shape)}; got "
                f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
            )
    for name, scalar in scalars.items():
        if scalar is not None and (scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != param.device):
            raise ValueError(f"{name}: needs one fp32 number on {param.device}, got {tuple(scalar.shape)}, {scalar.dtype}")
    if not eager and not launch.can_run(param):
        raise ValueError(f"param is on {param.device}, where Triton does not run: pass eager=True")


@torch.no_grad()
def adamw_(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    step: Tensor,
    rule: Rule,
    place: tuple[int, int, int],
    *,
    found_inf: Tensor,
    clip: Tensor | None = None,
    eager: bool = False,
) -> None:
    """Update a parameter and its moments in place; with found_inf 1.0 nothing changes. Nothing waits for the device.

    Args:
        tensors: parameter, gradient, exp_avg, exp_avg_sq: one shape, contiguous, bf16; the gradient bf16 or fp32.
        step: updates so far, this one included (fp32, one number on the device, up to 2^24); it is only read.
        place: the random bits' seed (64 bits, of the run), index (of the tensor in the run), first (element of the whole
            tensor with which the parameter at hand begins).
        clip: one fp32 number on the device by which the gradient is multiplied on its way in; None for 1.
    Raises ValueError on anything else.
    """
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    _check(dict(zip(names, tensors, strict=True)), {"step": step, "found_inf": found_inf, "clip": clip}, eager)
    (seed, index, first), count = place, tensors[0].numel()
    if count == 0:
        return
    if not eager:
        # Without contraction into fused multiply-adds, which would round otherwise than the twin.
        blocks = MANY_BLOCKS if count >= LARGE else 1
        _adamw_kernel[(triton.cdiv(count, blocks * BLOCK.value),)](
            *(*tensors, step, clip, found_inf, count, first, _key(seed, index), *_scalars(rule)),
            BLOCKS=blocks,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, count, PIECE):
        part = tuple(tensor[start : start + PIECE] for tensor in flat)
        new = _eager(part, step, rule, (first + start, _key(seed, index)), clip)
        for old, value in zip((part[0], *part[2:]), new, strict=True):
            old.copy_(torch.where(found_inf != 0, old, value))
