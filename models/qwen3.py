"""Qwen3, dense: Llama's block with an RMS norm on each head's queries and keys, and heads of 128.

Checkpoint notes: no biases (`attention_bias` exists for descendants: on q, k, v and o alike); sizes up to 4B tie the
head to the embedding, though the files of some hold `lm_head.weight` too; q_norm and k_norm have one weight of
head_dim, shared by all heads. The mixtures of experts are qwen3_moe.py. Source:
transformers, models/qwen3/modeling_qwen3.py; https://arxiv.org/abs/2505.09388.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape, read_windows
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


# Released sizes: hidden, layers, heads, intermediate, tied. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _size(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _size(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _size(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _size(4096, 36, 32, 12288, tied=False),
    "Qwen3-14B": _size(5120, 40, 40, 17408, tied=False),
    "Qwen3-32B": _size(5120, 64, 64, 25600, tied=False),
}


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Qwen3")
    attention_bias = fields.flag("attention_bias", False)
    shape = read_shape(fields, num_key_value_heads=32, head_dim=128)
    windows = read_windows(fields, shape["num_hidden_layers"])
    fields.finish()
    return TransformerConfig(
        **shape, qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True, sliding_windows=windows
    )
