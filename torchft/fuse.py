"""One line that makes a model faster and smaller: Triton kernels and folded LoRA products in place of plain forwards.

    log.print(str(fuse(model, cfg.model.kernels, device)))     # delete it, and everything works as before

Blocks become FusedBlocks (fused_block.py; with an FP8 base fused_fp8.py), which hold the very same submodules: names,
parameters, state dict and dtypes stay. Whatever a kernel does not cover (generation with a cache) runs
in the plain forward; what is skipped altogether is said. Left out: fused blocks for full fine-tuning, whose weights are
trained, and for families whose blocks compute something else (Gemma, OLMo 2,
Granite, GLM-4, mixtures of experts).
"""

from dataclasses import dataclass

import torch
from torch import nn

from torchft.checks import KERNELS
from torchft.modules.compiler import missing_compiler
from torchft.modules.fp8 import is_fp8
from torchft.modules.host_embedding import HostEmbedding
from torchft.modules.lora import LoRALinear
from torchft.modules.transformer import CausalLM, TransformerConfig


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did, for one printed line."""

    blocks: int  # swapped
    loss: bool  # swapped
    eager: tuple[str, ...]  # kernels that plain PyTorch does instead, as asked
    skipped: str  # why blocks are not swapped, "" if they are
    loss_skipped: str = ""  # why the loss is not, though it was not switched off
    embedding: bool = False  # swapped, of those in CPU memory
    waits: bool = False  # for the GPU at each forward, because it was not

    def __str__(self) -> str:
        done = [f"{self.blocks} blocks"] * bool(self.blocks) + ["the loss"] * self.loss + ["the embedding"] * self.embedding
        line = f"kernels: {' and '.join(done) or 'none'}"
        if self.eager:
            line += f"; switched off: {', '.join(self.eager)}"
        if self.loss_skipped:
            line += f"; the loss stays plain: {self.loss_skipped}"
        if self.waits:
            line += "; the CPU fetches the embedding's rows, for which it waits for the GPU at each forward"
        return line + (f"; blocks stay plain: {self.skipped}" if self.skipped else "")


def fuse(model: CausalLM, switches: dict[str, str], device: torch.device) -> FuseReport:
    """Swap kernels into `model`, on meta or loaded, after adapters and NF4 and before anything is divided or compiled.

    Args:
        switches: kernel -> triton or eager, as `model.kernels` has them; on a CPU nothing is swapped.
    """
    eager = tuple(name for name in KERNELS if switches.get(name) == "eager")
    if missing := why_no_kernels(device):
        waits = device.type == "cuda" and isinstance(model.model.embed_tokens, HostEmbedding)
        return FuseReport(0, False, eager, missing, waits=waits)
    return swap(model, eager)


def why_no_kernels(device: torch.device) -> str:
    """Why Triton's kernels cannot run on this device, or ""."""
    if device.type != "cuda":
        return "Triton needs a GPU"
    if missing := missing_compiler(device):
        return f"this machine lacks {missing}"
    return "this GPU is older than Ampere" if torch.cuda.get_device_capability(device) < (8, 0) else ""


def swap(model: CausalLM, eager: tuple[str, ...]) -> FuseReport:
    """`fuse`, whatever the device."""
    from torchft.fused_block import FusedBlock  # here: Triton is not everywhere
    from torchft.fused_fp8 import FusedFp8Block
    from torchft.kernels.gather_rows import gather_rows
    from torchft.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs

    loss_skipped = "its logits are capped" if model.config.final_logit_softcapping is not None else ""
    loss = "cross_entropy" not in eager and not loss_skipped
    if loss:
        model.head_loss, model.head_logprobs = linear_cross_entropy, linear_logprobs
    on_host = isinstance(model.model.embed_tokens, HostEmbedding)
    embedding = on_host and "embedding" not in eager
    if embedding:
        model.model.embed_tokens.gather = gather_rows
    skipped = "model.kernels says so" if "lora" in eager else _why_not(model)
    if not skipped:
        layers = model.model.layers
        swapped = FusedFp8Block if any(_in_fp8(layers)) else FusedBlock
        for index, block in enumerate(layers):
            layers[index] = swapped(block, " ".join(eager))
    blocks = 0 if skipped else len(model.model.layers)
    return FuseReport(blocks, loss, eager, skipped, loss_skipped, embedding, waits=on_host and not embedding)


def _in_fp8(layers: nn.Module) -> list[bool]:
    """Of each linear with a weight of its own, whether that is FP8."""
    return [is_fp8(param) for name, param in layers.named_parameters() if ".lora_" not in name and param.dim() == 2]


def _why_not(model: CausalLM) -> str:
    """Why the blocks of this model cannot be FusedBlocks, or ""."""
    layers = model.model.layers
    adapted = [module for module in layers.modules() if isinstance(module, LoRALinear)]
    own = [param for name, param in layers.named_parameters() if ".lora_" not in name]
    if not adapted or any(param.requires_grad for param in own):
        return "their own weights are trained"
    if any(layer.lora_magnitude_vector is not None for layer in adapted):
        return "DoRA rescales every output"
    if any(layer.dropout > 0 for layer in adapted):
        return "lora.dropout acts between the products that are folded"
    in_fp8 = _in_fp8(layers)
    if any(in_fp8) and not all(in_fp8):
        return "some of their linears are FP8 and some are not"
    if any(in_fp8) and layers[0].self_attn.packed:
        return "q, k and v, and gate and up, are one FP8 linear each"
    return _other_maths(model.config)


def _other_maths(config: TransformerConfig) -> str:
    """What the blocks of this model compute that a FusedBlock does not, or ""."""
    ropes = (config.rope, *config.layer_ropes)
    reasons = {
        "their feed forwards are mixtures of experts": config.moe is not None,
        "their branches are scaled": config.block == "scaled",
        "their norms stand in other places": config.block not in ("pre_norm", "scaled"),
        "their norms multiply by 1 + weight": config.norm_offset,
        "their queries and keys are normalised over all heads at once": config.qk_norm_over_heads,
        f"their gate is {config.activation}": config.activation != "silu",
        "their attention scores are scaled or capped": (config.attention_multiplier, config.attn_logit_softcapping) != (None, None),
        "their attention has sinks": config.attention_sinks,
        "their heads are rotated in part or in neighbouring pairs": any(
            rope.interleaved or rope.partial_rotary_factor not in (0, 1) for rope in ropes
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")
