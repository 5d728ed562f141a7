"""A transformer block whose frozen linears are FP8 (modules/fp8.py), as three functions around attention.

Swapped in by torchft.fuse where every linear of the blocks is FP8. Weights that stay on this process are laid above each
other once (q, k and v; gate and up), as views of one matrix. Its transpose, which backward multiplies, is kept where nothing
is recomputed, since then memory is given for time anyway (8B: 6.5 GiB for 1.3% of a step); else, and for weights that FSDP2
gathers, it is made for each use.

Legend: B batch, T tokens, D hidden, O output width.
"""

import torch
from torch import Tensor, nn

from torchft.fused_block import DOWN, FusedBlock, O, adapter_of
from torchft.kernels.fp8_linear import Fp8Group, above_each_other, fp8_linear, with_adapters
from torchft.kernels.fp8_mlp import Mlp, fp8_mlp
from torchft.kernels.fp8_norm_linear import fp8_norm_linear
from torchft.kernels.fp8_transpose import transpose
from torchft.modules.attention import Mask, attend
from torchft.modules.block import Block
from torchft.modules.fp8 import is_fp8


class FusedFp8Block(FusedBlock):
    """The parameters of a Block under the same names, and what it computes. Made by torchft.fuse."""

    def __init__(self, block: Block, eager: str) -> None:
        super().__init__(block, eager)
        self.flipped: dict[str, Tensor] = {}  # kept transposes, by the group's first linear
        self.scales: dict[str, tuple[list[Tensor], Tensor, Tensor]] = {}  # see _scales

    def _attention_half(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """As FusedBlock's."""
        attention, norm, eager = self.self_attn, self.input_layernorm, self.eager
        flat = h.reshape(-1, h.shape[-1])
        flat, qkv = fp8_norm_linear(flat, norm.weight, norm.eps, *self._fp8_group(attention, self.qkv), eager)
        q, k, v = self._rotated(qkv.view(*h.shape[:2], -1), cos, sin)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        return flat, fp8_linear(y.reshape(len(flat), -1), *self._fp8_group(attention, O), eager)

    def _mlp_half(self, flat: Tensor, delta: Tensor, replayed: bool) -> Tensor:
        """As FusedBlock's."""
        norm, mlp = self.post_attention_layernorm, self.mlp
        groups = *self._fp8_group(mlp, self.gate_up), *self._fp8_group(mlp, DOWN)
        total, y = fp8_mlp(flat, delta, Mlp(norm.weight, norm.eps, *groups, self.eager, replayed))
        return total if replayed else total + y

    def can_be_divided(self, parts: int) -> bool:
        """Not without the rest: FSDP2 divides it."""
        return False

    def bytes_beside(self) -> int:
        """The transposes, see above."""
        return sum(param.numel() for param in self.parameters() if is_fp8(param)) if self.base_stays else 0

    def _fp8_group(self, parent: nn.Module, names: tuple[str, ...]) -> tuple[Fp8Group, Tensor | None]:
        """These linears of `parent` as one, and their biases."""
        linears = [getattr(parent, name) for name in names]
        a, b = zip(*(adapter_of(linear) for linear in linears), strict=True)
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        weights, flipped = [linear.weight.detach() for linear in linears], None
        if self.base_stays:
            weights, flipped = [self._stacked(names[0], linears)], self.flipped.get(names[0])
            if flipped is None and not self.recomputed and torch.is_grad_enabled():
                flipped = self.flipped[names[0]] = transpose(weights[0], eager="fp8" in self.eager)
        row_scale, ones = self._scales(names[0], linears)
        dtype = self.input_layernorm.weight.dtype
        return with_adapters((weights, row_scale, flipped, ones), list(a), list(b), self.scale, dtype), bias

    def _scales(self, key: str, linears: list[nn.Linear]) -> tuple[Tensor, Tensor]:
        """Of the weights' rows, (O,), and of those of their transpose, (D,), which are one. Kept until a linear gets others."""
        sources, found = [linear.weight_scale for linear in linears], self.scales.get(key)
        if found is None or any(old is not new for old, new in zip(found[0], sources, strict=True)):
            ones = torch.ones(linears[0].in_features, dtype=torch.float32, device=sources[0].device)
            found = self.scales[key] = sources, torch.cat(sources), ones
        return found[1:]

    def _stacked(self, key: str, linears: list[nn.Linear]) -> Tensor:
        """The kept codes above each other, of which the weights are views; made anew when these are replaced."""
        stacked = self._kept(key, linears)
        if stacked is None:
            stacked, row = above_each_other([linear.weight.detach() for linear in linears]), 0
            for linear in linears:
                linear.weight.data = stacked[row : row + linear.out_features]
                row += linear.out_features
            self.packed[key] = stacked
            self.flipped.pop(key, None)
        return stacked

