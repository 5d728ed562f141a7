"""Small configs of every family, odd in every size, and pairs of models with the same weights: transformers' and ours.

The weights are scaled up so that attention is far from uniform and norms and biases are not at their trivial initial values: a
wrong epsilon, theta or window then moves the logits by far more than rounding does.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from torchft.models import build_model

NUM_TOKENS = 70

LLAMA3_ROPE = {  # over 32 tokens, so that with heads of 12 fast, blended and slow pairs all occur
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}


def llama(**others: Any) -> dict[str, Any]:
    return small("llama", "LlamaForCausalLM", **others)


def mistral(**others: Any) -> dict[str, Any]:
    return small("mistral", "MistralForCausalLM", **({"sliding_window": None} | others))


def qwen2(**others: Any) -> dict[str, Any]:
    return small("qwen2", "Qwen2ForCausalLM", **others)


def qwen3(**others: Any) -> dict[str, Any]:
    return small("qwen3", "Qwen3ForCausalLM", **({"head_dim": 10} | others))


def phi3(**others: Any) -> dict[str, Any]:
    return small("phi3", "Phi3ForCausalLM", **others)


def gemma2(**others: Any) -> dict[str, Any]:
    """Caps that are reached, a window on every second layer, a scale of scores that is not the head's width."""
    return _gemma("gemma2", "Gemma2ForCausalLM", **({"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | others))


def gemma3(**others: Any) -> dict[str, Any]:
    return _gemma("gemma3_text", "Gemma3ForCausalLM", **({"rope_local_base_freq": 100.0, "sliding_window_pattern": 3} | others))


def _gemma(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    defaults = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 9, "tie_word_embeddings": True}
    return small(model_type, architecture, **(defaults | others))


def olmo2(**others: Any) -> dict[str, Any]:
    return small("olmo2", "Olmo2ForCausalLM", **others)


def granite(**others: Any) -> dict[str, Any]:
    multipliers = {"embedding_multiplier": 11.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 3.0}
    return small("granite", "GraniteForCausalLM", **(multipliers | others))


def glm4(**others: Any) -> dict[str, Any]:
    return small("glm4", "Glm4ForCausalLM", **({"head_dim": 12, "attention_bias": True} | others))


def smollm3(**others: Any) -> dict[str, Any]:
    return small("smollm3", "SmolLM3ForCausalLM", **({"no_rope_layer_interval": 2} | others))


def qwen3_moe(**others: Any) -> dict[str, Any]:
    """Five experts, of which a token takes two."""
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 19, "norm_topk_prob": True}
    return small("qwen3_moe", "Qwen3MoeForCausalLM", **({"head_dim": 10} | experts | others))


def mixtral(**others: Any) -> dict[str, Any]:
    """Five experts, of which a token takes two."""
    return small("mixtral", "MixtralForCausalLM", **({"num_local_experts": 5, "num_experts_per_tok": 2} | others))


def gpt_oss(**others: Any) -> dict[str, Any]:
    """Sinks, a window on every second layer, a limit that is reached, YaRN."""
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 0.7}
    rope = {"rope_parameters": YARN_ROPE | {"truncate": False, "beta_fast": 8.0, "rope_theta": 500.0}}
    return small("gpt_oss", "GptOssForCausalLM", **({"head_dim": 12, "sliding_window": 9} | experts | rope | others))


def ministral(**others: Any) -> dict[str, Any]:
    return small("ministral", "MinistralForCausalLM", **({"head_dim": 8, "sliding_window": 7} | others))


def long_rope(pairs: int, original: int, **others: Any) -> dict[str, Any]:
    """`rope_scaling` and what goes with it in Phi-3's files."""
    factors = {"short_factor": [1 + i / 10 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return {"rope_scaling": {"type": "longrope"} | factors | others, "original_max_position_embeddings": original}


def small(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    """A config.json of odd sizes; copies of `others`, into which transformers writes, replace or add."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 51,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "pad_token_id": None,  # or transformers gives that row of the embedding no gradient
    } | copy.deepcopy(others)


# Where null is not the same as absent.
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "pad_token_id")

CASES = {
    "llama-2-mha": llama(num_key_value_heads=6),
    "llama-3-gqa": llama(rope_theta=500000.0, rms_norm_eps=1e-6),
    "llama-3.1-scaled": llama(rope_scaling=LLAMA3_ROPE, rope_theta=500.0, head_dim=12),
    "llama-3.2-tied": llama(rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True, head_dim=12),
    "llama-linear-biases": llama(rope_scaling={"type": "linear", "factor": 3.0}, attention_bias=True, mlp_bias=True),
    "llama-yarn-new-spelling": llama(rope_theta=None, rope_parameters=YARN_ROPE, head_dim=16),
    "llama-one-layer-mqa": llama(num_hidden_layers=1, num_key_value_heads=1, vocab_size=37, hidden_size=54, head_dim=6),
    "llama-dynamic": llama(rope_scaling={"type": "dynamic", "factor": 4.0}, head_dim=12, max_position_embeddings=32),
    "llama-longrope": llama(head_dim=12, **long_rope(6, 30, original_max_position_embeddings=30, factor=3.0)) | {
        "original_max_position_embeddings": None
    },
    "mistral-window": mistral(sliding_window=7),
    "mistral-no-window": mistral(head_dim=14, rope_theta=1000000.0),
    "mistral-window-of-one": mistral(sliding_window=1, num_key_value_heads=3),
    "mistral-wide-window-tied": mistral(sliding_window=NUM_TOKENS - 1, tie_word_embeddings=True, hidden_size=24),
    "mistral-window-out-of-reach": mistral(sliding_window=NUM_TOKENS, num_key_value_heads=6, intermediate_size=77),
    "qwen2-tied": qwen2(tie_word_embeddings=True, rope_theta=1000000.0, use_sliding_window=False, sliding_window=5),
    "qwen2-untied": qwen2(num_key_value_heads=3, rms_norm_eps=1e-6),
    "qwen2-upper-windows": qwen2(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2-layer-types": qwen2(
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2-yarn": qwen2(rope_scaling=YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 8.0, "truncate": False}),
    "qwen3-tied": qwen3(tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen3-untied-biases": qwen3(attention_bias=True, num_key_value_heads=3, rms_norm_eps=1e-6),
    "qwen3-default-head-dim": {k: v for k, v in qwen3(num_attention_heads=2).items() if k != "head_dim"},
    "qwen3-windows": qwen3(use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3-yarn": qwen3(rope_scaling=YARN_ROPE, head_dim=16, num_key_value_heads=1),
    "qwen3-moe": qwen3_moe(),
    "qwen3-moe-shares": qwen3_moe(norm_topk_prob=False, num_experts=7, num_experts_per_tok=3, tie_word_embeddings=True),
    "qwen3-moe-some-layers": qwen3_moe(decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[1], attention_bias=True),
    "qwen3-moe-window": qwen3_moe(use_sliding_window=True, sliding_window=6, num_experts_per_tok=5, num_key_value_heads=1),
    "mixtral": mixtral(),
    "mixtral-window": mixtral(sliding_window=6, num_local_experts=3, head_dim=10, tie_word_embeddings=True),
    "mixtral-one": mixtral(num_experts_per_tok=1, num_key_value_heads=6),
    "ministral-layers": ministral(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "ministral-windows": ministral(num_key_value_heads=3),
    "smollm3-tied": smollm3(),
    "smollm3-listed": smollm3(no_rope_layers=[0, 1, 1], attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "smollm3-windows": smollm3(use_sliding_window=True, sliding_window=6, no_rope_layers=[1, 0, 0]),
    "gemma2": gemma2(),
    "gemma2-untied": gemma2(tie_word_embeddings=False, hidden_size=54, num_key_value_heads=3, rms_norm_eps=1e-4),
    "gemma2-one-cap": gemma2(attn_logit_softcapping=None, attention_bias=True, sliding_window=1),
    "gemma2-other-cap": gemma2(final_logit_softcapping=None, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
    "gemma3": gemma3(),
    "gemma3-scaled": gemma3(rope_scaling={"rope_type": "linear", "factor": 8.0}, num_hidden_layers=4, num_key_value_heads=1),
    "gemma3-new-spelling": gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
        tie_word_embeddings=False,
    ),
    "phi3-mini": phi3(num_key_value_heads=6, sliding_window=11),
    "phi3-long": phi3(**long_rope(3, 32)),
    "phi3-long-partial": phi3(
        hidden_size=48, num_attention_heads=4, partial_rotary_factor=0.5, tie_word_embeddings=True, **long_rope(3, 48)
    ),
    "phi3-short": phi3(**long_rope(3, 128, attention_factor=1.3)),
    "phi4-partial": phi3(hidden_size=48, num_attention_heads=4, partial_rotary_factor=0.84, intermediate_size=77),
    "olmo2": olmo2(),
    "olmo2-mha-biases": olmo2(num_key_value_heads=6, attention_bias=True, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "gpt-oss": gpt_oss(),
    "gpt-oss-alpha": gpt_oss(swiglu_alpha=1.1, num_experts_per_tok=4, num_key_value_heads=6, tie_word_embeddings=True),
    "gpt-oss-layers": gpt_oss(layer_types=["full_attention"] * 2 + ["sliding_attention"], attention_bias=False, head_dim=10),
    "granite-tied": granite(tie_word_embeddings=True),
    "granite-untied-biases": granite(attention_bias=True, mlp_bias=True, logits_scaling=0.7, head_dim=10),
    "glm4": glm4(),
    "glm4-quarter": glm4(partial_rotary_factor=0.34, attention_bias=False, tie_word_embeddings=True, num_key_value_heads=3),
    "glm4-whole": glm4(partial_rotary_factor=1.0, num_key_value_heads=1),
}


def make_twins(
    case: dict[str, Any], released: bool = False, shape: tuple[int, int] = (2, NUM_TOKENS), seed: int = 0
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(transformers' model, ours with the same weights, ids of `shape`). released: weights as wide models have them, 0.02."""
    torch.manual_seed(seed)
    hf = {key: value for key, value in case.items() if value is not None or key in NULLABLE}
    config = AutoConfig.for_model(**hf)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    reference = AutoModelForCausalLM.from_config(config, **eager).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            center, spread = (0.0 if "gemma" in hf["model_type"] else 1.0, 0.3) if "norm" in name else (0.0, 0.02 if released else 0.25)
            parameter.normal_(center, spread)
        # Small activations are where the epsilon of the norms matters; where no norm comes first, biases would drown them.
        if hf["model_type"] != "olmo2" and not released:
            reference.get_input_embeddings().weight.mul_(0.05)
    with torch.device("meta"):
        ours = build_model(hf)
    ours.to_empty(device="cpu")
    missing, unexpected = ours.load_state_dict(in_our_names(reference.state_dict(), hf["model_type"]), strict=False)
    assert (missing, unexpected) == ([], [])
    return reference, ours, torch.randint(config.vocab_size, shape)


def in_our_names(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """transformers' tensors (weights, gradients) as our parameters hold them: it packs the experts' gate and up into one."""
    if model_type == "gpt_oss":
        return dict(_gpt_osss(name, tensor) for name, tensor in tensors.items())
    ours = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)  # of (E, 2F, D)
            ours[name.replace("gate_up_proj", "gate_proj.weight")] = gate.flatten(0, 1)
            ours[name.replace("gate_up_proj", "up_proj.weight")] = up.flatten(0, 1)
        elif name.endswith("experts.down_proj"):
            ours[f"{name}.weight"] = tensor.flatten(0, 1)
        else:
            ours[name] = tensor
    return {_mixtrals(name): tensor for name, tensor in ours.items()} if model_type == "mixtral" else ours


def _gpt_osss(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    if name.endswith("_proj_bias"):
        return name.replace("_bias", ".bias"), tensor.flatten()
    return (f"{name}.weight", tensor.transpose(1, 2).flatten(0, 1)) if ".experts." in name else (name, tensor)


def _mixtrals(name: str) -> str:
    for theirs, own in ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(theirs, own)
    return name
