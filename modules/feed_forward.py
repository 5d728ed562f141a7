"""The gated feed forward, SwiGLU or GeGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

Legend: B batch, T tokens, D hidden, F intermediate.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), any shape."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


class FeedForward(nn.Module):
    """y = down(act(gate(x)) * up(x)), act one of ACTIVATIONS."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, activation: str = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))  # inside: (B, T, F)


class PackedFeedForward(nn.Module):
    """The same, with gate and up as one linear, as the checkpoints of Phi-3 and GLM-4 have it: gate's rows, then up's."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, activation: str = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down_proj(self.activation(gate) * up)
