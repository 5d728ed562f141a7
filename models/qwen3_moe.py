"""Qwen3's mixtures of experts: Qwen3's attention, and in every layer 128 small experts, of which a token takes 8.

Checkpoint notes: files hold each expert by itself, `mlp.experts.3.gate_proj.weight`, and the router as `mlp.gate.weight`;
transformers 5 stacks them in memory and writes them as here. Fields can give layers a plain feed forward of
`intermediate_size` (`mlp_only_layers`, `decoder_sparse_step`), which no released size does. `norm_topk_prob` is true in all of
them, and false where it is absent.
Source: transformers, models/qwen3_moe/modeling_qwen3_moe.py; https://arxiv.org/abs/2505.09388.
"""

from typing import Any

from torchft.models import moe_fields
from torchft.models.fields import Fields
from torchft.models.shapes import read_shape, read_window
from torchft.modules.moe import MoeConfig
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, intermediate: int, expert: int) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


# Released sizes: hidden, layers, heads, intermediate (unused), intermediate of an expert. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": _size(2048, 48, 32, 6144, 768),
    "Qwen3-235B-A22B": _size(4096, 94, 64, 12288, 1536),
}

INERT = moe_fields.INERT | {"max_window_layers"}  # the window, where there is one, is every layer's


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Qwen3-MoE")
    attention_bias = fields.flag("attention_bias", False)
    shape = read_shape(fields, num_key_value_heads=4)
    num_layers, used, window = shape["num_hidden_layers"], fields.flag("use_sliding_window", False), read_window(fields)
    moe = MoeConfig(
        **moe_fields.read_experts(fields, num_experts=128, num_experts_per_tok=8),
        intermediate_size=fields.integer("moe_intermediate_size", 768),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        dense_layers=_dense_layers(fields, num_layers),
    )
    fields.finish(INERT)
    windows = (window,) * num_layers if used and window is not None else ()
    biases = {"qkv_bias": attention_bias, "o_bias": attention_bias}
    return TransformerConfig(**shape, **biases, qk_norm=True, sliding_windows=windows, moe=moe)


def _dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """The layers with a plain feed forward: those named, and all but every `decoder_sparse_step`-th."""
    step, named = fields.integer("decoder_sparse_step", 1), fields.take("mlp_only_layers", None) or []
    if not isinstance(named, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in named):
        raise fields.fail("mlp_only_layers", named, f"a list of layers, from 0 to {num_layers - 1}")
    return tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
