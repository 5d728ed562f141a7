"""OLMo 2: norms behind attention and feed forward, none before; norms over the whole width of queries and keys.

Checkpoint notes: q_norm has the width of all query heads together, k_norm that of all key heads; there is no
`input_layernorm`. Nothing is tied. Source: transformers, models/olmo2/modeling_olmo2.py; https://arxiv.org/abs/2501.00656.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


# Released sizes: hidden, layers, heads, key/value heads, intermediate. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "OLMo-2-1B": _size(2048, 16, 16, 16, 8192),
    "OLMo-2-7B": _size(4096, 32, 32, 32, 11008),
    "OLMo-2-13B": _size(5120, 40, 40, 40, 13824),
    "OLMo-2-32B": _size(5120, 64, 40, 8, 27648),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "OLMo 2")
    attention_bias = fields.flag("attention_bias", False)
    config = TransformerConfig(
        **read_shape(fields, rms_norm_eps=1e-5),
        block="post_norm",
        qk_norm=True,
        qk_norm_over_heads=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )
    fields.finish()
    return config
