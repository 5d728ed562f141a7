"""Root-mean-square layer norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

Legend: B batch, T tokens, D width of the last dimension.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # that module imports this one
    from torchft.modules.transformer import TransformerConfig


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))  # (D,)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D), same dtype
        # The op takes the mean and the root in fp32 whatever the dtype, and keeps only x and 1/rms for backward.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class UnitOffsetRMSNorm(RMSNorm):
    """y = (1 + weight) * x / sqrt(mean(x^2) + eps): Gemma's, whose weights are stored less one."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D), same dtype
        # All of it in fp32: in bf16, 1 + weight would keep 8 bits of the sum.
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


def build_norm(config: "TransformerConfig", width: int) -> RMSNorm:
    """The kind of norm that all of a model's norms are."""
    return (UnitOffsetRMSNorm if config.norm_offset else RMSNorm)(width, config.rms_norm_eps)
