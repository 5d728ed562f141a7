"""SmolLM3: Llama's block, and every fourth layer without RoPE ("NoPE", https://arxiv.org/abs/2501.18795).

Checkpoint notes: `no_rope_layers` holds 1 for a layer WITH RoPE and 0 for one without; where it is absent every
`no_rope_layer_interval`-th has none. The head is tied. Windows exist in the config and are switched off in the release.
Source: transformers, models/smollm3/modeling_smollm3.py.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import FULL, SLIDING, layer_windows, read_kinds, read_shape, read_window
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import TransformerConfig

SIZES: dict[str, dict[str, Any]] = {
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "vocab_size": 128256,
        "max_position_embeddings": 65536,
        "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
}

INERT = frozenset({"max_window_layers"})  # in the release's file; nothing reads it


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "SmolLM3")
    shape = read_shape(fields, {"theta": 2000000.0}, num_key_value_heads=4, tie_word_embeddings=True)
    num_layers = shape["num_hidden_layers"]
    rotated = _rotated_layers(fields, num_layers)
    used, window = fields.flag("use_sliding_window", False), read_window(fields, None)
    window = window if used else None
    absent = [FULL if window is None or layer_rotates else SLIDING for layer_rotates in rotated]
    kinds = read_kinds(fields, num_layers, absent, window)
    attention_bias = fields.flag("attention_bias", False)
    config = TransformerConfig(
        **shape,
        layer_ropes=tuple(shape["rope"] if yes else RopeConfig(shape["head_dim"], partial_rotary_factor=0.0) for yes in rotated),
        sliding_windows=layer_windows(kinds, window),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
    fields.finish(INERT)
    return config


def _rotated_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers use RoPE."""
    interval = fields.integer("no_rope_layer_interval", 4)
    marks = fields.take("no_rope_layers", None)
    if marks is None:
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(marks, list) or len(marks) != num_layers or any(type(m) is not int or m not in (0, 1) for m in marks):
        raise fields.fail("no_rope_layers", marks, f"{num_layers} times 1 (with RoPE) or 0 (without)")
    return [mark == 1 for mark in marks]
