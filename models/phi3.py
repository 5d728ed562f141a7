"""Phi-3, Phi-3.5 and Phi-4, dense: Llama's block with q, k, v in one linear and gate, up in another, and LongRoPE.

Checkpoint notes: `qkv_proj` holds the rows of q, then k, then v; `gate_up_proj` those of gate, then up. They stay as they are: an
adapter on them is one adapter, as in PEFT. The 128k models rotate by other frequencies beyond
`original_max_position_embeddings` (LongRoPE, https://arxiv.org/abs/2402.13753); Phi-4-mini rotates 3/4 of each head, and is tied.
 Phi-3-small, Phi-4-multimodal and the mixtures are other architectures. In generation a text counts as long as it may
become, prompt and all answer tokens, so that all its keys rotate alike.
Source: transformers, models/phi3/modeling_phi3.py; https://arxiv.org/abs/2404.14219.
"""

from typing import Any

from torchft.models.fields import Fields
from torchft.models.rope_fields import read_partial
from torchft.models.shapes import read_shape, read_window
from torchft.modules.transformer import TransformerConfig


def _size(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **others: Any) -> dict[str, Any]:
    """A row as the fields of a config.json; `others` replaces or adds."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    } | others


# Released sizes: hidden, layers, heads, key/value heads, intermediate. The 128k models have these shapes, and LongRoPE's two
# lists of 48 numbers in `rope_scaling`, which differ between them.
SIZES: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": _size(3072, 32, 32, 32, 8192, sliding_window=2047),
    "Phi-3-medium-4k": _size(5120, 40, 40, 10, 17920, sliding_window=2047),
    "Phi-4": _size(5120, 40, 40, 10, 17920, vocab_size=100352, max_position_embeddings=16384, rope_theta=250000.0),
    "Phi-4-mini": _size(3072, 32, 24, 8, 8192, vocab_size=200064, partial_rotary_factor=0.75, tie_word_embeddings=True),
}

# In the released files, and read by nothing: `auto_map` names an older copy of the same code, which is never run.
INERT = frozenset({"attention_bias", "auto_map", "full_attn_mod", "interpolate_factor"})
ABSENT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "mlp_bias": False, "lm_head_bias": False}  # what the block does not have


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    fields = Fields(hf, "Phi-3")
    original = fields.integer("original_max_position_embeddings", 4096)
    partial = read_partial(fields, 1.0)
    shape = read_shape(fields, {"partial": partial, "original": original}, rms_norm_eps=1e-5)
    if shape["rope"].kind not in ("default", "longrope"):
        raise fields.fail("rope_scaling, type", shape["rope"].kind, "'default' or 'longrope'")
    window = read_window(fields, None)
    for key, nothing in ABSENT.items():
        if fields.take(key, nothing) != nothing:
            raise fields.fail(key, hf[key], repr(nothing))
    fields.finish(INERT)
    windows = () if window is None else (window,) * shape["num_hidden_layers"]
    return TransformerConfig(**shape, packed_qkv=True, packed_gate_up=True, sliding_windows=windows)
