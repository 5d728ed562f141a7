"""Mixtral 8x7B and 8x22B: Mistral's attention, and in every layer 8 experts as large as its feed forward, two for each token.

Checkpoint notes: the feed forward is `block_sparse_moe`, the router its `gate`, and an expert's linears are w1 (gate), w3 (up)
and w2 (down), each by itself: `block_sparse_moe.experts.3.w1.weight`. transformers 5 calls them otherwise in memory and writes
them as here. `router_jitter_noise`, noise on the router's input in training, is 0 in all released models.
Source: transformers, models/mixtral/modeling_mixtral.py; Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
"""

from typing import Any

from torchft.models import moe_fields
from torchft.models.fields import Fields
from torchft.models.shapes import read_shape, read_window
from torchft.modules.moe import MoeConfig
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, intermediate: int, positions: int) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": positions,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }


# Released sizes: hidden, layers, heads, intermediate, longest text. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": _size(4096, 32, 32, 14336, 32768),
    "Mixtral-8x22B": _size(6144, 56, 48, 16384, 65536),
}

INERT = moe_fields.INERT


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Mixtral")
    window = read_window(fields, None)
    shape = read_shape(fields, {"theta": 1e6}, num_key_value_heads=8, rms_norm_eps=1e-5)
    moe = MoeConfig(
        **moe_fields.read_experts(fields, num_experts=8, num_experts_per_tok=2),
        intermediate_size=shape["intermediate_size"],
        names=("w1", "w3", "w2"),
    )
    if fields.take("router_jitter_noise", 0.0) != 0:
        raise fields.fail("router_jitter_noise", hf["router_jitter_noise"], "0.0: noise on the router is not implemented")
    fields.finish(INERT)
    windows = () if window is None else (window,) * shape["num_hidden_layers"]
    return TransformerConfig(**shape, block="mixtral", sliding_windows=windows, moe=moe)
