"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in HF's half-split layout.

Dimensions i and i + E/2 of a head form a pair, which position p rotates by the angle p * f_i. The tables are functions
of the positions alone, made anew in fp32 at each forward (B x T x E/2 numbers): nothing is kept in a buffer, so nothing
can be cast to bf16 by `.to()`, left on meta, or saved. In bf16, angles near position 4,096 would be wrong by whole
turns.

Legend: B batch, T tokens, H heads, E head_dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies and how they are stretched for contexts longer than the ones first trained on."""

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"  # one of KINDS
    factor: float = 1.0  # the context grows by this much; every kind but default
    original_max_positions: int = 0  # tokens; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3: fewer turns than this over the original context: divided by factor
    high_freq_factor: float = 4.0  # llama3: more turns than this: left alone
    beta_fast: float = 32.0  # yarn: more turns than this over the original context: left alone
    beta_slow: float = 1.0  # yarn: fewer turns than this: divided by factor
    truncate: bool = True  # yarn: round the borders between the two outwards to whole dimensions
    attention_factor: float | None = None  # yarn: scale of both tables; None = the paper's 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert self.head_dim % 2 == 0, self.head_dim


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per token of each pair of dimensions: (E/2,) fp32 on the CPU.

    On the CPU for every device: a power that differs in its last bit moves the angle at position 100,000 by 0.01.
    """
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device="cpu") / rope.head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain


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
        return rope.head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    index = torch.arange(rope.head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((index - low) / (high - low)).clamp(0.0, 1.0)
    return plain / rope.factor * (1 - kept) + plain * kept


def rope_tables(rope: RopeConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle: positions (B, T) int -> two fp32 tensors (B, T, E/2) on the same device."""
    frequencies = inverse_frequencies(rope).to(positions.device, non_blocking=True)
    angles = positions[..., None].float() * frequencies
    scale = 1.0
    if rope.kind == "yarn":
        scale = rope.attention_factor
        if scale is None:
            scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions in fp32: x (B, T, H, E), cos and sin (B, T, E/2) -> (B, T, H, E) in x's dtype."""
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, E/2): the same angles for every head
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
