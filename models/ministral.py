"""Ministral: Mistral's block with a kind of attention per layer, windowed or full (`layer_types`).

Checkpoint notes: as Mistral's. Ministral 8B was released as `MistralForCausalLM` (mistral.py); this is the architecture's own
name. Source: transformers, models/ministral/modeling_ministral.py.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import FULL, SLIDING, layer_windows, read_kinds, read_shape, read_window
from torchft.modules.transformer import TransformerConfig

SIZES: dict[str, dict[str, Any]] = {}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Ministral")
    window = read_window(fields)
    shape = read_shape(fields, num_key_value_heads=8)
    num_layers = shape["num_hidden_layers"]
    kinds = read_kinds(fields, num_layers, [FULL if window is None else SLIDING] * num_layers, window)
    fields.finish()
    return TransformerConfig(**shape, sliding_windows=layer_windows(kinds, window))
