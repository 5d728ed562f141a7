"""Sizes and sliding windows of a config.json -> fields of TransformerConfig."""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.rope_fields import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"  # of `layer_types`

DEFAULTS = {  # of Llama's config in transformers
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read_shape(fields: Fields, rope: dict[str, Any] | None = None, **defaults: Any) -> dict[str, Any]:
    """The TransformerConfig fields that all families share. rope: options of `read_rope`; defaults: as in `read_sizes`."""
    sizes = read_sizes(fields, **defaults)
    return sizes | {"rope": read_rope(fields, sizes["head_dim"], sizes["max_position_embeddings"], **(rope or {}))}


def read_sizes(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """All of them but `rope`.

    defaults: what transformers takes for a field that is absent, where the family's differs from Llama's. null means what
        follows from the other shapes.
    """
    defaults = DEFAULTS | defaults
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.derived("num_key_value_heads", defaults["num_key_value_heads"], num_heads)
    if num_heads % num_kv_heads != 0:
        raise fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    no_head_dim = fields.left.get("head_dim", defaults["head_dim"]) is None
    if no_head_dim and hidden_size % num_heads != 0:
        raise fields.fail("hidden_size", hidden_size, f"a multiple of num_attention_heads = {num_heads}, or head_dim")
    head_dim = fields.derived("head_dim", defaults["head_dim"], hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise fields.fail("head_dim", head_dim, "an even number, for RoPE")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
        "initializer_range": fields.number("initializer_range", 0.02),
    }


def read_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's sliding windows, per layer: `layer_types` where given, else the layers from `max_window_layers` on.

    None of them has one unless `use_sliding_window` is true.
    """
    used = fields.flag("use_sliding_window", False)
    window = read_window(fields)
    first = fields.take("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise fields.fail("max_window_layers", first, "a whole number, 0 or more")
    absent = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    return layer_windows(read_kinds(fields, num_layers, absent, window if used else None), window if used else None)


def layer_windows(kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    """Layer kinds -> TransformerConfig.sliding_windows."""
    return () if window is None else tuple(window if kind == SLIDING else None for kind in kinds)


def read_window(fields: Fields, absent: int | None = 4096) -> int | None:
    """`sliding_window`: tokens, null for none."""
    window = fields.take("sliding_window", absent)
    if window is not None and (type(window) is not int or window <= 0):
        raise fields.fail("sliding_window", window, "a whole number above 0, or null for none")
    return window


def read_kinds(fields: Fields, num_layers: int, absent: list[str], window: int | None) -> list[str]:
    """`layer_types`, FULL or SLIDING per layer; `absent` where the field is not there, which needs no window to be set."""
    kinds = fields.take("layer_types", None)
    if kinds is None:
        return absent
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise fields.fail("layer_types", kinds, f"{num_layers} times {FULL} or {SLIDING}")
    if SLIDING in kinds and window is None:
        raise fields.fail("layer_types", kinds, "use_sliding_window true and a sliding_window for that")
    return kinds
