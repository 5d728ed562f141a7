"""gpt-oss 20B and 120B: mixtures of 32 or 128 experts, of which a token takes 4, and attention with sinks.

Each head has a trained score, `self_attn.sinks`, that takes part in the softmax and has no value; every second layer, the first
one included, sees 128 tokens; RoPE is YaRN. Experts: a clamped SwiGLU with biases, gate and up in alternating rows.

Checkpoint notes: files hold the experts of a layer in one tensor, transposed, `mlp.experts.gate_up_proj` (E, D, 2F), or, as
released, in MXFP4 as `gate_up_proj_blocks` and `_scales`, which are decoded to bf16 as they are read (torchft/mxfp4.py). What
is written is bf16 under the first names, which transformers loads.
Source: transformers, models/gpt_oss/modeling_gpt_oss.py; https://arxiv.org/abs/2508.10925.
"""

from typing import Any

from torchft.models import moe_fields
from torchft.models.fields import Fields
from torchft.models.shapes import FULL, SLIDING, layer_windows, read_kinds, read_shape, read_window
from torchft.modules.moe import MoeConfig
from torchft.modules.transformer import TransformerConfig

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _size(layers: int, experts: int) -> dict[str, Any]:
    """A row as the fields of a config.json."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": YARN,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }


# Released sizes: layers, experts. Each row is a whole config.json.
SIZES: dict[str, dict[str, Any]] = {"gpt-oss-20b": _size(24, 32), "gpt-oss-120b": _size(36, 128)}

INERT = moe_fields.INERT | {"initial_context_length"}  # YaRN's, under a name that transformers does not read


def config_from_hf(hf: dict[str, Any]) -> TransformerConfig:
    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        hf = hf | {"rope_parameters": YARN}
    fields = Fields(hf, "gpt-oss")
    shape = read_shape(fields, {"theta": 150000.0}, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5)
    num_layers, window, bias = shape["num_hidden_layers"], read_window(fields, 128), fields.flag("attention_bias", True)
    kinds = read_kinds(fields, num_layers, [FULL if layer % 2 else SLIDING for layer in range(num_layers)], window)
    experts = moe_fields.read_experts(fields, num_experts=128, num_experts_per_tok=4)
    if (copy := fields.integer("experts_per_token", experts["num_experts_per_tok"])) != experts["num_experts_per_tok"]:
        raise fields.fail("experts_per_token", copy, f"the same as num_experts_per_tok, {experts['num_experts_per_tok']}")
    moe = MoeConfig(
        **experts,
        intermediate_size=shape["intermediate_size"],
        clamp=(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)),
    )
    if fields.optional_dict("quantization_config").get("quant_method", "mxfp4") != "mxfp4":
        raise fields.fail("quantization_config", hf["quantization_config"], "quant_method mxfp4, which is decoded, or no such one")
    fields.finish(INERT)
    biases = {"qkv_bias": bias, "o_bias": bias}
    return TransformerConfig(**shape, **biases, attention_sinks=True, sliding_windows=layer_windows(kinds, window), moe=moe)
