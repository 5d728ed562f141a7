"""Transformer blocks: one class for each way of placing the norms. A model's is chosen when it is built (`block` in its config).

Names are those of the checkpoints, which do not agree: `post_attention_layernorm` stands before the feed forward in Llama and
GLM-4, behind the attention in Gemma and OLMo 2.

Legend: B batch, T tokens, D hidden.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from torchft.modules.attention import Attention, LayerCache, Mask
from torchft.modules.moe import build_feed_forward
from torchft.modules.norm import build_norm

if TYPE_CHECKING:  # that module imports this one
    from torchft.modules.transformer import TransformerConfig


class Block(nn.Module):
    """Pre-norm: attention and feed forward, each on the normalised residual stream. The other blocks change `forward` alone."""

    base_stays = True  # whether frozen weights stay where they are; False once shard_model divides them
    recomputed = False  # whether its forward runs again in backward: set by apply_activation_checkpointing
    replayed = False  # during that second time, when only what it saves is wanted and not what it returns
    split = False  # whether that is so for its feed forward alone, the rest being kept; of blocks that can do it
    splits = False  # whether it can
    draws = True  # whether its forward may draw random numbers (dropout)
    compilable = True  # whether torch.compile has something to gain
    divided = None  # torchft.divided_blocks.DividedBlocks, where this process holds but some rows of its frozen weights
    norms = ("input_layernorm", "post_attention_layernorm")
    feed_forward = "mlp"  # what the checkpoint calls it

    def __init__(self, config: "TransformerConfig", layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.add_module(self.feed_forward, build_feed_forward(config, layer))
        for name in self.norms:
            self.add_module(name, build_norm(config, config.hidden_size))

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """h (B, T, D) -> (B, T, D); the other arguments are the attention's."""
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, start)
        return h + self.mlp(self.post_attention_layernorm(h))

    def can_be_divided(self, parts: int) -> bool:
        """Whether its frozen weights can be divided over that many processes without the rest: see torchft/divided_blocks.py."""
        return False

    def bytes_beside(self) -> int:
        """What the block holds where nothing of it is recomputed, beside its parameters and what autograd saves."""
        return 0


class ScaledBlock(Block):
    """Pre-norm, each branch scaled by a constant before it is added (Granite)."""

    def __init__(self, config: "TransformerConfig", layer: int) -> None:
        super().__init__(config, layer)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        h = h + self.residual_multiplier * self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, start)
        return h + self.residual_multiplier * self.mlp(self.post_attention_layernorm(h))


class PostNormBlock(Block):
    """Each branch takes the residual stream as it is, and is normalised before it is added (OLMo 2)."""

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        h = h + self.post_attention_layernorm(self.self_attn(h, cos, sin, mask, cache, start))
        return h + self.post_feedforward_layernorm(self.mlp(h))


class SandwichBlock(Block):
    """Norms before and behind each branch, under Gemma 2 and 3's names."""

    norms = (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        h = h + self.post_attention_layernorm(self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, start))
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


class MixtralBlock(Block):
    """Pre-norm, under Mixtral's name of the feed forward."""

    feed_forward = "block_sparse_moe"

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, start)
        return h + self.block_sparse_moe(self.post_attention_layernorm(h))


class Glm4Block(Block):
    """Norms before and behind each branch, under GLM-4's names."""

    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """As Block.forward."""
        h = h + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, start))
        return h + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(h)))


BLOCKS: dict[str, type[Block]] = {
    "pre_norm": Block,
    "scaled": ScaledBlock,
    "post_norm": PostNormBlock,
    "sandwich": SandwichBlock,
    "mixtral": MixtralBlock,
    "glm4": Glm4Block,
}
