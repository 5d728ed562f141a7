"""Gemma 3, text: Gemma 2's block with norms on queries and keys instead of caps, five windowed layers to one full, two RoPEs.

Checkpoint notes: 270M and 1B are text models (`Gemma3ForCausalLM`); 4B and larger are vision models
(`Gemma3ForConditionalGeneration`), whose text part can be saved on its own with transformers. Windowed layers rotate with
`rope_local_base_freq`, the full ones with `rope_theta` and `rope_scaling`; transformers 5 writes both below `rope_parameters`.
Source: transformers, models/gemma3/modeling_gemma3.py; https://arxiv.org/abs/2503.19786.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.gemma2 import read_gemma
from torchft.models.rope_fields import read_settings
from torchft.models.shapes import FULL, SLIDING, layer_windows, read_kinds, read_sizes, read_window
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a config.json; `others` replaces or adds."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "intermediate_size": intermediate,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "hidden_activation": "gelu_pytorch_tanh",
    } | others


_SMALL = {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512, "rope_scaling": None}

# Released sizes, of 4B and larger the text part: hidden, layers, heads, key/value heads, intermediate.
SIZES: dict[str, dict[str, Any]] = {
    "Gemma-3-270M": _size(640, 18, 4, 1, 2048, **_SMALL),
    "Gemma-3-1B": _size(1152, 26, 4, 1, 6912, **_SMALL),
    "Gemma-3-4B": _size(2560, 34, 8, 4, 10240),
    "Gemma-3-12B": _size(3840, 48, 16, 8, 15360),
    "Gemma-3-27B": _size(5376, 62, 32, 16, 21504, head_dim=128, query_pre_attn_scalar=168),
}

INERT = frozenset({"cache_implementation"})  # of transformers' generation


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Gemma 3")
    sizes = read_sizes(fields, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True)
    num_layers, window = sizes["num_hidden_layers"], read_window(fields)
    period = fields.integer("sliding_window_pattern", 6)
    kept = fields.integer("_sliding_window_pattern", period)  # transformers writes it beside layer_types, and never reads it
    if kept != period and "layer_types" not in hf:
        raise fields.fail("_sliding_window_pattern", kept, f"sliding_window_pattern to say so too ({period}), or layer_types")
    absent = [SLIDING if window is not None and (index + 1) % period else FULL for index in range(num_layers)]
    kinds = read_kinds(fields, num_layers, absent, window)
    ropes = _ropes(fields, sizes["head_dim"], sizes["max_position_embeddings"])
    if fields.optional_number("attn_logit_softcapping") is not None:
        raise ValueError(f"{fields.where}: attn_logit_softcapping is set; in Gemma 3 it must be null: nothing reads it.")
    config = TransformerConfig(
        **sizes,
        **read_gemma(fields, sizes["hidden_size"]),
        rope=ropes[FULL],
        layer_ropes=tuple(ropes[kind] for kind in kinds),
        sliding_windows=layer_windows(kinds, window),
        qk_norm=True,
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
    )
    fields.finish(INERT)
    return config


def _ropes(fields: Fields, head_dim: int, max_positions: int) -> dict[str, RopeConfig]:
    """The RoPE of each kind of layer, from both spellings."""
    nested, scaling = fields.optional_dict("rope_parameters"), fields.optional_dict("rope_scaling")
    if nested and scaling:
        raise fields.fail("rope_scaling", scaling, "only one of rope_scaling and rope_parameters")
    by_kind = Fields(nested or {FULL: scaling}, fields.family, "config.json, rope_parameters")
    thetas = {FULL: fields.number("rope_theta", 1e6), SLIDING: fields.number("rope_local_base_freq", 1e4)}
    ropes = {}
    for kind, theta in thetas.items():
        where = "config.json, rope_scaling" if scaling else f"config.json, rope_parameters, {kind}"
        settings = Fields(by_kind.optional_dict(kind), fields.family, where)
        ropes[kind] = read_settings(settings, head_dim, max_positions, theta)
    by_kind.finish()
    return ropes
