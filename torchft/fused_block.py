"""A transformer block as five ops around attention: folded LoRA products with the norms, the gate and the sums that feed them.

Swapped in by torchft.fuse. Frozen weights that stay on this process are re-laid once, as views of a matrix E that has room
for the adapters (kernels/lora_linear.py); those of which it holds some rows come in one (divided_blocks.py); NF4 weights, and those
that FSDP2 gathers, are put into one for each product.

Legend: B batch, T tokens, D hidden, H heads, K key/value heads, E head_dim.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from torchft.kernels.lora_linear import Group, lora_linear, new_extended, write_adapters
from torchft.kernels.lora_norm_linear import lora_norm_linear
from torchft.kernels.lora_swiglu_linear import lora_swiglu_linear
from torchft.kernels.rope import rope, rope_split
from torchft.modules import nf4
from torchft.modules.attention import LayerCache, Mask, attend
from torchft.modules.block import Block
from torchft.modules.checkpointing import run_again
from torchft.modules.feed_forward import PackedFeedForward
from torchft.modules.lora import LoRALinear

QKV, O, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
PACKED_QKV, PACKED_GATE_UP = ("qkv_proj",), ("gate_up_proj",)  # where the checkpoint has one linear already (Phi-3)


class FusedBlock(Block):
    """The parameters of a Block under the same names, and what it computes. Made by torchft.fuse."""

    draws = False  # no dropout: fuse leaves blocks that have it as they are
    splits = True
    compilable = False  # its ops are opaque, and there is nothing left between them
    index = 0  # this block's number, where it is divided

    def __init__(self, block: Block, eager: str) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.base_stays, self.recomputed = block.base_stays, block.recomputed
        self.eager = eager
        self.qkv = PACKED_QKV if self.self_attn.packed else QKV
        self.gate_up = PACKED_GATE_UP if isinstance(self.mlp, PackedFeedForward) else GATE_UP
        self.adapted = [module for module in self.modules() if isinstance(module, LoRALinear)]
        self.packed: dict[str, Tensor] = {}  # E of kernels/lora_linear.py, by the group's first linear

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        if cache is not None and isinstance(self.self_attn.o_proj.weight, DTensor):  # what FSDP2 divides is gathered by now
            return functional_call(self, self._whole_weights(), (h, cos, sin, mask, cache, start))
        if cache is not None:
            return super().forward(h, cos, sin, mask, cache, start)
        if self.divided is not None and self.index == 0:
            self.divided.forward_begins()
        flat, delta = self._attention_half(h, cos, sin, mask)
        if self.split and torch.is_grad_enabled():
            return run_again(self._mlp_half, flat, delta, draws=False).view(h.shape)
        return self._mlp_half(flat, delta, self.replayed).view(h.shape)

    def _attention_half(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """h and what attention adds to it, (B * T, D) each."""
        attention, eager = self.self_attn, self.eager
        flat = h.reshape(-1, h.shape[-1])
        norm = self.input_layernorm
        group, bias = self._group(attention, self.qkv)
        _, qkv = lora_norm_linear(flat, None, norm.weight, norm.eps, group, bias, eager)
        q, k, v = self._rotated(qkv.view(*h.shape[:2], -1), cos, sin)  # (B, T, H or K, E)
        del qkv  # of 2,048 tokens of 8B 24 MiB, while the rest of the block has its largest tensors
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        group, bias = self._group(attention, O)
        return flat, lora_linear(y.reshape(len(flat), -1), group, bias, eager)

    def _mlp_half(self, flat: Tensor, delta: Tensor, replayed: bool) -> Tensor:
        """h + delta and what the feed forward adds to it, (B * T, D); without the latter if `replayed`."""
        mlp, norm, eager = self.mlp, self.post_attention_layernorm, self.eager
        group, bias = self._group(mlp, self.gate_up)
        total, gate_up = lora_norm_linear(flat, delta, norm.weight, norm.eps, group, bias, eager)
        group, bias = self._group(mlp, DOWN)
        time = "again" if replayed else "first" if self.recomputed else "only"
        y = lora_swiglu_linear(gate_up, group, bias, "silu", eager, time)
        return total if replayed else total + y

    @property
    def scale(self) -> float:
        """Of all adapters of the model; 0 where they are switched off, so that a reference comes out of the very same products."""
        return self.adapted[0].scale if self.adapted and self.adapted[0].enabled else 0.0

    def _rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, plain = self.self_attn, "rope" in self.eager
        width = attention.head_dim
        turning = cos.shape[-1] > 0  # not in a layer without RoPE
        if turning and attention.q_norm is None:
            heads, kv_heads, _ = (part // width for part in attention.widths)
            return rope_split(qkv, cos, sin, heads, kv_heads, eager=plain)
        q, k, v = (part.unflatten(-1, (-1, width)) for part in qkv.split(attention.widths, dim=-1))
        if attention.q_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if turning:
            q, k = rope(q, cos, sin, eager=plain), rope(k, cos, sin, eager=plain)
        return q, k, v

    def _group(self, parent: nn.Module, names: tuple[str, ...]) -> tuple[Group, Tensor | None]:
        """These linears of `parent` as one, and their biases; E holds the adapters as they are now."""
        linears = [getattr(parent, name) for name in names]
        adapters = [adapter_of(linear) for linear in linears]
        a, b = [pair[0] for pair in adapters], [pair[1] for pair in adapters]
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(biases)
        if self.divided is not None:
            fetch = partial(self.divided.extended, self.index, names[0], a, b, self.scale)
            return Group([], "", a, b, self.scale, fetch), bias
        if self.base_stays and not any(isinstance(linear.weight, nf4.NF4Tensor) for linear in linears):
            extended = self._extended(names[0], linears, a, b)
            # Each time: a fused optimizer's step shows in no version counter.
            write_adapters(extended, a, b, self.scale, eager=not extended.is_cuda)
            return Group([extended], "p", a, b, self.scale), bias
        kinds = "".join("n" if isinstance(linear.weight, nf4.NF4Tensor) else "d" for linear in linears)
        base = [part for linear in linears for part in nf4.storage(linear.weight)]
        return Group(base, kinds, a, b, self.scale), bias

    def can_be_divided(self, parts: int) -> bool:
        """As Block.can_be_divided: not if it is NF4, of which a quarter travels, or has rows that cannot be dealt out evenly."""
        weights = [linear.weight for linears in self.groups().values() for linear in linears]
        return not any(isinstance(weight, nf4.NF4Tensor) or len(weight) % parts for weight in weights)

    def groups(self) -> dict[str, list[nn.Linear]]:
        """The linears of each of the four products, by the name of the first."""
        attention, mlp = self.self_attn, self.mlp
        of = ((attention, self.qkv), (attention, O), (mlp, self.gate_up), (mlp, DOWN))
        return {names[0]: [getattr(parent, name) for name in names] for parent, names in of}

    def _whole_weights(self) -> dict[str, Tensor]:
        """Of a divided block, by their names in it, for the plain forward."""
        weights = self.divided.weights(self.index)
        return {f"{name}.weight": weights[id(module)] for name, module in self.named_modules() if id(module) in weights}

    def _kept(self, key: str, linears: list[nn.Linear]) -> Tensor | None:
        """The matrix laid for these linears, as long as their weights are still views of it."""
        matrix = self.packed.get(key)
        memory = None if matrix is None else matrix.untyped_storage().data_ptr()
        return matrix if all(linear.weight.untyped_storage().data_ptr() == memory for linear in linears) else None

    def _extended(self, key: str, linears: list[nn.Linear], a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The kept E, of which the frozen weights are views; made when they first come, and again when they are replaced."""
        extended = self._kept(key, linears)
        if extended is None:
            extended, row = new_extended(a, b, linears[0].weight.dtype), 0
            for linear in linears:
                place = extended[row : row + linear.out_features, : linear.in_features]
                place.copy_(linear.weight.detach())
                linear.weight.data = place
                row += linear.out_features
            self.packed[key] = extended
        return extended


def adapter_of(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A (r, D) and B (O, r); of rank 0 where a linear has none."""
    if isinstance(linear, LoRALinear):
        return linear.lora_A.weight, linear.lora_B.weight
    device = linear.weight.device
    return torch.empty(0, linear.in_features, device=device), torch.empty(linear.out_features, 0, device=device)
