"""Mistral 7B, Nemo, Small and Ministral 8B: Llama's block, in 7B v0.1 and Ministral with a sliding window on every layer.

Checkpoint notes: no biases, head never tied; Nemo and Small have heads of 128, not hidden_size / heads. An absent
`sliding_window` means 4,096 and `null` means none, as in transformers. `consolidated.safetensors`, which Mistral ships
beside the HF shards, has other names and is not read. `MinistralForCausalLM` is ministral.py; Small 3.1 and later are vision
models.
Source: transformers, models/mistral/modeling_mistral.py; Jiang et al. 2023, https://arxiv.org/abs/2310.06825.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape, read_window
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, intermediate: int, vocab: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a config.json; `others` adds."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    } | others


# Released sizes: hidden, layers, intermediate, vocabulary. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": _size(4096, 32, 14336, 32000, rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.2": _size(4096, 32, 14336, 32000, rope_theta=1000000.0),
    "Mistral-7B-v0.3": _size(4096, 32, 14336, 32768, rope_theta=1000000.0),
    "Mistral-Nemo-12B": _size(5120, 40, 14336, 131072, rope_theta=1000000.0, max_position_embeddings=131072),
    "Ministral-8B": _size(4096, 36, 12288, 131072, rope_theta=100000000.0, sliding_window=32768),
    "Mistral-Small-24B": _size(5120, 40, 32768, 131072, rope_theta=100000000.0),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Mistral")
    window = read_window(fields)
    shape = read_shape(fields, num_key_value_heads=8)
    windows = () if window is None else (window,) * shape["num_hidden_layers"]
    fields.finish()
    return TransformerConfig(**shape, sliding_windows=windows)
