"""Gemma 2: norms before and behind each branch, capped scores and logits, a window on every second layer.

Checkpoint notes: norms are stored less one; embeddings are multiplied by sqrt(hidden_size), rounded to the weights' dtype; the
head is tied to an embedding of 256,000 words; GeGLU with the tanh approximation; scores are scaled by
1 / sqrt(query_pre_attn_scalar), which is not the width of a head in 27B. Layers 0, 2, 4, ... have the window.
Source: transformers, models/gemma2/modeling_gemma2.py; https://arxiv.org/abs/2408.00118.
"""

import math
from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import FULL, SLIDING, layer_windows, read_kinds, read_shape, read_window
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a config.json; `others` replaces or adds."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 256,
        "intermediate_size": intermediate,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    } | others


# Released sizes: hidden, layers, heads, intermediate. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Gemma-2-2B": _size(2304, 26, 8, 9216),
    "Gemma-2-9B": _size(3584, 42, 16, 14336),
    "Gemma-2-27B": _size(4608, 46, 32, 36864, head_dim=128, query_pre_attn_scalar=144),
}

INERT = frozenset({"cache_implementation", "sliding_window_size"})  # of transformers' generation; an old name for the window


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Gemma 2")
    shape = read_shape(fields, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True)
    window, num_layers = read_window(fields), shape["num_hidden_layers"]
    alternating = [FULL if window is None or index % 2 else SLIDING for index in range(num_layers)]
    kinds = read_kinds(fields, num_layers, alternating, window)
    config = TransformerConfig(
        **shape,
        **read_gemma(fields, shape["hidden_size"]),
        sliding_windows=layer_windows(kinds, window),
        attn_logit_softcapping=fields.optional_number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=fields.optional_number("final_logit_softcapping", 30.0),
    )
    fields.finish(INERT)
    return config


def read_gemma(fields: Fields, hidden_size: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    for key in ("hidden_activation", "hidden_act"):  # transformers reads the first; files of Gemma 2 have both
        activation = fields.take(key, "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise fields.fail(key, activation, "'gelu_pytorch_tanh'")
    if fields.take("use_bidirectional_attention", None):
        raise fields.fail("use_bidirectional_attention", True, "false: this is for models that predict the next token")
    attention_bias = fields.flag("attention_bias", False)
    return {
        "block": "sandwich",
        "norm_offset": True,
        "activation": "gelu_tanh",
        "embedding_multiplier": math.sqrt(hidden_size),
        "attention_multiplier": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
    }
