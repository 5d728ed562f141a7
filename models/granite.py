"""Granite 3, dense: Llama's block with four constants, on embeddings, scores, residual branches and logits.

Checkpoint notes: `attention_multiplier` takes the place of 1 / sqrt(head_dim); `logits_scaling` divides. The head is tied. The
mixtures and Granite 4 are other architectures.
Source: transformers, models/granite/modeling_granite.py; https://github.com/ibm-granite/granite-3.0-language-models.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, intermediate: int, vocab: int, attention_multiplier: float, logits_scaling: float) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_size": hidden,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rope_theta": 10000000.0,
        "rms_norm_eps": 1e-5,
        "attention_multiplier": attention_multiplier,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": logits_scaling,
        "tie_word_embeddings": True,
    }


# Released sizes: hidden, intermediate, vocabulary, attention multiplier, logits scaling. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Granite-3.2-2B": _size(2048, 8192, 49155, 0.015625, 8.0),
    "Granite-3.2-8B": _size(4096, 12800, 49155, 0.0078125, 16.0),
    "Granite-3.3-2B": _size(2048, 8192, 49159, 0.015625, 8.0),
    "Granite-3.3-8B": _size(4096, 12800, 49159, 0.0078125, 16.0),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Granite")
    attention_bias = fields.flag("attention_bias", False)  # on q, k, v and o alike
    config = TransformerConfig(
        **read_shape(fields),
        block="scaled",
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        attention_multiplier=fields.number("attention_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        logits_scaling=fields.number("logits_scaling", 1.0),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
    fields.finish()
    return config
