"""Root-mean-square layer norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

Legend: B batch, T tokens, D width of the last dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
