"""How hard the hardware works: model FLOPs per token, the GPU's peak, peak memory.

MFU (model FLOPs utilisation, https://arxiv.org/abs/2204.02311 appendix B) = tokens/s x FLOPs per token / peak FLOP/s.
Only work that the maths needs is counted: no recomputation by activation checkpointing, no dequantisation.
"""

import re
import resource
import sys

import torch
from torch import nn

from torchft.modules.transformer import CausalLM

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets (which print twice that, with sparsity, for most).
# The first name found as a whole word in the device's name counts.
PEAK_BF16 = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def flops_per_token(model: CausalLM, seq_len: int) -> float:
    """FLOPs of one training step per token, in rows of `seq_len` tokens.

    A linear with N weights costs 2N FLOPs per token forward and 2N for its input's gradient; its weight's gradient,
    another 2N, only where the weight is trained. So about 4N with LoRA, 6N for full fine-tuning; the embedding is a
    lookup, and of a mixture's experts only those that a token takes are counted. Attention costs 2 x 2 x context x heads x head_dim forward (scores, weighted sum of values) and twice that
    backward, its causal context being seq_len / 2 on average: 6 x seq_len x heads x head_dim per layer. Slightly too
    much: packed rows attend to less, and with LoRA the first block's q, k and v need no input gradient.
    """
    config = model.config
    active = 1.0 if config.moe is None else config.moe.num_experts_per_tok / config.moe.num_experts
    matmuls = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            # in x out rather than numel: a quantised weight is stored in another shape
            size = layer.in_features * layer.out_features * (active if ".experts." in name else 1.0)
            matmuls += (6 if layer.weight.requires_grad else 4) * size
    return matmuls + 6 * config.num_hidden_layers * seq_len * config.num_attention_heads * config.head_dim


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by `torch.cuda.get_device_name()`; None if it is not in the table."""
    if "Laptop" in device_name:  # slower than the desktop card of the same name
        return None
    found = (peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: tensors on the GPU, or on CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
