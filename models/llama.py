"""Llama 2, 3, 3.1, 3.2 and 3.3 (text), and the many models that reuse the architecture `LlamaForCausalLM`.

Checkpoint notes: no biases (`attention_bias`, `mlp_bias` exist for descendants); grouped queries from Llama 2 70B on;
RoPE is stretched by `rope_scaling` of type llama3 from 3.1 on; 3.2's 1B and 3B tie the head to the embedding. Files by
Meta itself (`consolidated.*.pth`) order the rows of q_proj and k_proj otherwise; only the HF layout is read.
Relatives that differ in their config.json only: SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama. (SmolLM3 is smollm3.py.)
Source: transformers, models/llama/modeling_llama.py.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.shapes import read_shape
from torchft.modules.transformer import TransformerConfig

_SCALING_8 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SCALING_32 = _SCALING_8 | {"factor": 32.0}


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a Llama 3 config.json; `others` replaces or adds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    } | others


_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
_LLAMA_3 = {"max_position_embeddings": 8192}
_LLAMA_3_1 = {"rope_scaling": _SCALING_8}
_SMOLLM_2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
_YI = {"vocab_size": 64000, "max_position_embeddings": 4096, "rope_theta": 5000000.0}
_LLAMA_3_2 = {"rope_scaling": _SCALING_32, "tie_word_embeddings": True}

# Released sizes: hidden, layers, heads, key/value heads, intermediate. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _size(4096, 32, 32, 32, 11008, **_LLAMA_2),
    "Llama-2-13B": _size(5120, 40, 40, 40, 13824, **_LLAMA_2),
    "Llama-2-70B": _size(8192, 80, 64, 8, 28672, **_LLAMA_2),
    "Llama-3-8B": _size(4096, 32, 32, 8, 14336, **_LLAMA_3),
    "Llama-3-70B": _size(8192, 80, 64, 8, 28672, **_LLAMA_3),
    "Llama-3.1-8B": _size(4096, 32, 32, 8, 14336, **_LLAMA_3_1),
    "Llama-3.1-70B": _size(8192, 80, 64, 8, 28672, **_LLAMA_3_1),
    "Llama-3.1-405B": _size(16384, 126, 128, 8, 53248, **_LLAMA_3_1),
    "Llama-3.2-1B": _size(2048, 16, 32, 8, 8192, head_dim=64, **_LLAMA_3_2),
    "Llama-3.2-3B": _size(3072, 28, 24, 8, 8192, head_dim=128, **_LLAMA_3_2),
    "Llama-3.3-70B": _size(8192, 80, 64, 8, 28672, **_LLAMA_3_1),
    "DeepSeek-R1-Distill-Llama-8B": _size(4096, 32, 32, 8, 14336, **_LLAMA_3_1),
    "DeepSeek-R1-Distill-Llama-70B": _size(8192, 80, 64, 8, 28672, **_LLAMA_3_1),
    "SmolLM2-135M": _size(576, 30, 9, 3, 1536, **_SMOLLM_2),
    "SmolLM2-360M": _size(960, 32, 15, 5, 2560, **_SMOLLM_2),
    "SmolLM2-1.7B": _size(2048, 24, 32, 32, 8192, **_SMOLLM_2 | {"rope_theta": 130000.0}),
    "TinyLlama-1.1B": _size(2048, 22, 32, 4, 5632, **_LLAMA_2 | {"max_position_embeddings": 2048}),
    "Yi-6B": _size(4096, 32, 32, 4, 11008, **_YI),
    "Yi-1.5-9B": _size(4096, 48, 32, 4, 11008, **_YI),
    "Yi-34B": _size(7168, 60, 56, 8, 20480, **_YI),
}

INERT = frozenset({"is_llama_config"})  # a mark on SmolLM's files


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Llama")
    attention_bias = fields.flag("attention_bias", False)  # on q, k, v and o alike
    config = TransformerConfig(
        **read_shape(fields), qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=fields.flag("mlp_bias", False)
    )
    fields.finish(INERT)
    return config
