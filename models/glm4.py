"""GLM-4-0414, dense (`glm4`): norms before and behind each branch, half of each head rotated, in neighbouring pairs.

Checkpoint notes: `gate_up_proj` is one linear, gate's rows first; q, k, v have biases in 9B and none in 32B, o never; nothing is
tied. `post_attention_layernorm` is the norm before the feed forward. The older GLM-4 (`ChatGLMModel`, `GlmForCausalLM`) and
the mixtures are other architectures. Source: transformers, models/glm4/modeling_glm4.py.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.rope_fields import read_partial
from torchft.models.shapes import read_shape
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, bias: bool) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "vocab_size": 151552,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": bias,
        "tie_word_embeddings": False,
    }


# Released sizes: hidden, layers, heads, key/value heads, intermediate, bias. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "GLM-4-9B-0414": _size(4096, 40, 32, 2, 13696, bias=True),
    "GLM-4-32B-0414": _size(6144, 61, 48, 2, 23040, bias=False),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "GLM-4")
    rope = {"partial": read_partial(fields, 0.5), "interleaved": True}
    shape = read_shape(fields, rope, num_key_value_heads=2, head_dim=128, rms_norm_eps=1.5625e-07)
    attention_bias = fields.flag("attention_bias", True)
    fields.finish()
    return TransformerConfig(**shape, block="glm4", packed_gate_up=True, qkv_bias=attention_bias)
