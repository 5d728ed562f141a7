"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in HF's half-split layout.

Dimensions i and i + E/2 of a head form a pair, which position p rotates by the angle p * f_i. The tables are functions
of the positions alone, made anew in fp32 at each forward (B x T x E/2 numbers): nothing is kept in a buffer, so nothing
can be cast to bf16 by `.to()`, left on meta, or saved. In bf16, angles near position 4,096 would be wrong by whole
turns. Two kinds, dynamic and longrope, depend on how long the text is: each document decides for itself, so that packing and
batching change nothing.

Legend: B batch, T tokens, H heads, E head_dim, R the part of it that is rotated (all of it in most models).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
BY_LENGTH = ("dynamic", "longrope")  # whose frequencies depend on the length of the document


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies and how they are stretched for contexts longer than the ones first trained on."""

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"  # one of KINDS
    factor: float = 1.0  # the context grows by this much; every kind but default
    original_max_positions: int = 0  # tokens; dynamic, llama3, yarn and longrope
    low_freq_factor: float = 1.0  # llama3: fewer turns than this over the original context: divided by factor
    high_freq_factor: float = 4.0  # llama3: more turns than this: left alone
    beta_fast: float = 32.0  # yarn: more turns than this over the original context: left alone
    beta_slow: float = 1.0  # yarn: fewer turns than this: divided by factor
    truncate: bool = True  # yarn: round the borders between the two outwards to whole dimensions
    attention_factor: float | None = None  # yarn, longrope: scale of both tables; None = what the paper says
    short_factors: tuple[float, ...] = ()  # longrope: each pair's divisor in documents of up to original_max_positions
    long_factors: tuple[float, ...] = ()  # longrope: and in longer ones
    partial_rotary_factor: float = 1.0  # share of a head, from its start, that is rotated; 0.0 = none (NoPE)
    interleaved: bool = False  # pairs are dimensions 2i and 2i + 1 (GLM-4)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert self.rotary_dim % 2 == 0, (self.head_dim, self.partial_rotary_factor)
        if self.kind == "longrope":
            assert len(self.short_factors) == len(self.long_factors) == self.rotary_dim // 2, self

    @property
    def rotary_dim(self) -> int:
        """R."""
        return int(self.head_dim * self.partial_rotary_factor)


def inverse_frequencies(rope: RopeConfig, lengths: Tensor | None = None) -> Tensor:
    """Radians per token of each pair of dimensions: (R/2,) fp32 on the CPU; for BY_LENGTH, (B, T, R/2) where `lengths` are.

    On the CPU for every device: a power that differs in its last bit moves the angle at position 100,000 by 0.01.

    lengths (B, T) int: of each token's document, for BY_LENGTH.
    """
    assert lengths is not None or rope.kind not in BY_LENGTH, rope.kind
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device="cpu") / rope.rotary_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "dynamic":
        return _dynamic(rope, lengths)
    if rope.kind == "longrope":
        short, long = (
            (1.0 / (torch.tensor(factors) * rope.theta**exponents)).to(lengths.device, non_blocking=True)
            for factors in (rope.short_factors, rope.long_factors)
        )
        return torch.where(lengths[..., None] > rope.original_max_positions, long, short)
    return plain


def _dynamic(rope: RopeConfig, lengths: Tensor) -> Tensor:
    """NTK-aware: theta grows with the document, from original_max_positions on, so that the slowest pair is stretched in full.

    In fp64, since it is on the device of `lengths`. Source: transformers, modeling_rope_utils.py (after u/bloc97, u/emozilla).
    """
    width = rope.rotary_dim
    stretch = (lengths.double() / rope.original_max_positions).clamp(min=1.0)
    theta = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=lengths.device) / width
    return (theta[..., None] ** -exponents).float()


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's: slow pairs divided by the factor, fast ones kept, a linear blend in between.

    Source: `apply_scaling` in https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    wavelength = 2 * math.pi / plain  # tokens per turn
    turns = rope.original_max_positions / wavelength
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """YaRN's NTK-by-parts (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2).

    As in the authors' code, the blend is linear in the index of the pair, not in its number of turns.
    """

    def pair_that_turns(turns: float) -> float:
        span = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    index = torch.arange(rope.rotary_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((index - low) / (high - low)).clamp(0.0, 1.0)
    return plain / rope.factor * (1 - kept) + plain * kept


def rope_tables(
    rope: RopeConfig, positions: Tensor, more: int = 0, frequencies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle: positions (B, T) int -> two fp32 tensors (B, T, R/2) on the same device.

    more: tokens that each row will still get, in generation; see `document_lengths`. frequencies: `inverse_frequencies` on that
    device, where those are known.
    """
    if frequencies is None:
        lengths = document_lengths(positions, more) if rope.kind in BY_LENGTH else None
        frequencies = inverse_frequencies(rope, lengths).to(positions.device, non_blocking=True)
    angles = positions[..., None].float() * frequencies
    scale = _table_scale(rope)
    return angles.cos() * scale, angles.sin() * scale


def _table_scale(rope: RopeConfig) -> float:
    """Of both tables: YaRN's attention temperature, LongRoPE's the same thing by another formula (section 4.2 there)."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    if rope.kind == "yarn":
        return 0.1 * math.log(rope.factor) + 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def document_lengths(positions: Tensor, more: int = 0) -> Tensor:
    """positions (B, T) int, counting up within each document -> the length of each token's document (B, T).

    With a cache, a row's last document is as long as it will be when the cache is full, `more` tokens from now: keys that were
    rotated by other frequencies than a later query could not be compared with it.
    """
    num_tokens = positions.shape[1]
    index = torch.arange(num_tokens, device=positions.device).expand_as(positions)
    last = torch.ones_like(positions, dtype=torch.bool)  # whether a document ends here
    last[:, :-1] = positions[:, 1:] != positions[:, :-1] + 1
    end = torch.where(last, index, num_tokens).flip(1).cummin(1).values.flip(1)  # index of the last token of each one's document
    return positions.gather(1, end) + 1 + torch.where(end == num_tokens - 1, more, 0)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair of dimensions in fp32: x (B, T, H, E), cos and sin (B, T, R/2) -> (B, T, H, E) in x's dtype.

    The dimensions from R on stay as they are. Pairs are i and i + R/2, or with `interleaved` 2i and 2i + 1.
    """
    width = 2 * cos.shape[-1]
    if width == 0:
        return x
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, R/2): the same angles for every head
    turning = x[..., :width].float()
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return y.to(x.dtype) if width == x.shape[-1] else torch.cat((y.to(x.dtype), x[..., width:]), dim=-1)
