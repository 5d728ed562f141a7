"""MXFP4, as gpt-oss's experts are released: decoded to bf16, exactly, when they are read.

A block of 32 numbers along the input dimension shares a scale, a power of two stored as its exponent + 127 (E8M0). A number has
4 bits, sign, two of exponent, one of mantissa (E2M1), two to a byte, the first in the low half. Files hold, for a stack of
experts, `X_blocks` uint8 (E, out, in / 32, 16) and `X_scales` uint8 (E, out, in / 32); here that is one tensor X, bf16 (E, in, out).
Left out: writing it, and computing in it.
Source: OCP Microscaling Formats (MX) v1.0, section 5.3; transformers, integrations/mxfp4.py, for how the files lay it out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchft.safetensors_header import TensorInfo

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the 8 codes without a sign; the 8 with one follow
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_SIZE = 32  # numbers


@dataclass(frozen=True)
class Coded:
    """A stack of experts as the files hold it. What is taken of it, by experts, is decoded."""

    blocks: Tensor  # (E, out, in / 32, 16) uint8
    scales: Tensor  # (E, out, in / 32) uint8

    def __getitem__(self, experts: slice) -> Tensor:
        """(e, in, out) bf16."""
        return decode(self.blocks[experts], self.scales[experts]).transpose(1, 2)


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (..., in / 32, 16) and scales (..., in / 32), uint8 -> (..., in) bf16. Exact but for underflow, as ldexp's."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16, device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack([table[byte & 15], table[byte >> 4]], dim=-1)  # (256, 2): both numbers of a byte
    numbers = pairs[blocks.int()].flatten(-2)  # (..., in / 32, 32)
    return torch.ldexp(numbers, scales.int().unsqueeze(-1) - 127).flatten(-2)


def decoded(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """A checkpoint's tensors, with each pair of blocks and scales as the one tensor that they mean, in the blocks' place."""
    found = {}
    for name, info in tensors.items():
        stem = name.removesuffix(BLOCKS)
        if stem != name and is_coded(stem, tensors):
            experts, out, groups, _ = info.shape
            shape = (experts, groups * BLOCK_SIZE, out)
            found[stem] = replace(info, dtype="BF16", shape=shape, num_bytes=info.num_bytes + tensors[stem + SCALES].num_bytes)
        elif not (name.endswith(SCALES) and is_coded(name.removesuffix(SCALES), tensors)):
            found[name] = info
    return found


def is_coded(name: str, tensors: dict[str, TensorInfo]) -> bool:
    """Whether blocks and scales that belong together are there for the tensor `name`."""
    blocks, scales = tensors.get(name + BLOCKS), tensors.get(name + SCALES)
    if blocks is None or scales is None or len(blocks.shape) != 4:
        return False
    return blocks.dtype == scales.dtype == "U8" and blocks.shape == (*scales.shape, BLOCK_SIZE // 2)
