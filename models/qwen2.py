"""Qwen2 and Qwen2.5, dense, and DeepSeek-R1's distills of them: Llama's block with biases on q, k and v (and on nothing else).

Checkpoint notes: sizes up to 3B tie the head to the embedding; `vocab_size` is padded beyond the tokenizer's (151,936
for 151,665 tokens); a sliding window is described in every config.json but switched off (`use_sliding_window`) in all
releases. Source: transformers, models/qwen2/modeling_qwen2.py; https://arxiv.org/abs/2412.15115.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape, read_windows
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a config.json; `others` replaces or adds."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    } | others


_SMALL = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}

# Released sizes: hidden, layers, heads, key/value heads, intermediate. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _size(896, 24, 14, 2, 4864, **_SMALL),
    "Qwen2.5-1.5B": _size(1536, 28, 12, 2, 8960, **_SMALL),
    "Qwen2.5-3B": _size(2048, 36, 16, 2, 11008, **_SMALL),
    "Qwen2.5-7B": _size(3584, 28, 28, 4, 18944),
    "Qwen2.5-14B": _size(5120, 48, 40, 8, 13824, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _size(5120, 64, 40, 8, 27648, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _size(8192, 80, 64, 8, 29568, rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-1.5B": _size(1536, 28, 12, 2, 8960, vocab_size=151936, rope_theta=10000.0),
    "DeepSeek-R1-Distill-Qwen-7B": _size(3584, 28, 28, 4, 18944, rope_theta=10000.0),
    "DeepSeek-R1-Distill-Qwen-14B": _size(5120, 48, 40, 8, 13824, rms_norm_eps=1e-5),
    "DeepSeek-R1-Distill-Qwen-32B": _size(5120, 64, 40, 8, 27648, rms_norm_eps=1e-5),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Qwen2")
    shape = read_shape(fields, num_key_value_heads=32)
    windows = read_windows(fields, shape["num_hidden_layers"])
    fields.finish()
    return TransformerConfig(**shape, qkv_bias=True, sliding_windows=windows)
