"""Small config.json files of every family, each field of which matters, and other values for them."""

from typing import Any

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_parameters": ROPE,
}
GEMMA = {"attention_bias": False, "query_pre_attn_scalar": 7, "sliding_window": 5, "final_logit_softcapping": 0.5}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
BASES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "mistral": BASE | {"architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "qwen2": BASE | {"architectures": ["Qwen2ForCausalLM"]} | QWEN_WINDOW,
    "qwen3": BASE | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False} | QWEN_WINDOW,
    "qwen3_moe": BASE
    | {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "use_sliding_window": True, "sliding_window": 5}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [0]}
    | BALANCED,
    "mixtral": BASE
    | {"architectures": ["MixtralForCausalLM"], "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}
    | BALANCED,
    "ministral": BASE | {"architectures": ["MinistralForCausalLM"], "sliding_window": 5},
    "smollm3": BASE
    | {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 2}
    | {"use_sliding_window": True, "sliding_window": 5},
    "gemma2": BASE | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 0.5} | GEMMA,
    "gemma3_text": BASE
    | {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2, "rope_theta": 500.0, "rope_local_base_freq": 50.0}
    | {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    | GEMMA,
    "phi3": {key: value for key, value in BASE.items() if key not in ("head_dim", "rope_parameters")}
    | {"architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "sliding_window": 25, "partial_rotary_factor": 0.5}
    | {"original_max_position_embeddings": 16, "rope_scaling": LONG_ROPE},
    "olmo2": BASE | {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False},
    "gpt_oss": BASE
    | {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "sliding_window": 5, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "swiglu_alpha": 2.0, "swiglu_limit": 0.1}
    | BALANCED,
    "granite": BASE
    | {"architectures": ["GraniteForCausalLM"], "attention_bias": False, "mlp_bias": False}
    | {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "glm4": BASE
    | {"architectures": ["Glm4ForCausalLM"], "attention_bias": False, "partial_rotary_factor": 0.5},
}
# Honoured fields that the base leaves out, since they would take the place of others there.
EXTRA = {
    **dict.fromkeys(("qwen2", "qwen3", "ministral", "gemma2", "gemma3_text", "gpt_oss"), ("layer_types",)),
    "smollm3": ("layer_types", "no_rope_layers"),
}
# Fields that are read and must hold one value.
REFUSED = {
    "gpt_oss": {"num_experts": 5, "experts_per_token": 3, "quantization_config": {"quant_method": "awq"}},
    "mixtral": {"num_experts": 5, "router_jitter_noise": 0.1},
    "qwen3_moe": {"num_local_experts": 5},
    "gemma2": {"hidden_activation": "silu", "hidden_act": "silu", "use_bidirectional_attention": True},
    "gemma3_text": {"hidden_activation": "silu", "use_bidirectional_attention": True, "attn_logit_softcapping": 2.0},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "mlp_bias": True, "lm_head_bias": True},
}
MUTATIONS: dict[str, Any] = {
    "vocab_size": 62,
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.21,
    "tie_word_embeddings": True,
    "rope_theta": 10500.0,
    "rope_parameters": ROPE | {"factor": 7.0},
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 6,
    "use_sliding_window": False,
    "max_window_layers": 0,
    "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layer_interval": 1,
    "no_rope_layers": [0, 1],
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": 0.6,
    "sliding_window_pattern": 1,
    "rope_local_base_freq": 60.0,
    "rope_scaling": {"rope_type": "linear", "factor": 5.0},
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
    "embedding_multiplier": 4.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.6,
    "logits_scaling": 3.0,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 3,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 0.2,
    "mlp_only_layers": [1],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.6,
}
FAMILY_MUTATIONS: dict[str, dict[str, Any]] = {
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"head_dim": 12},
    "gpt_oss": {"attention_bias": False},
    "phi3": {"hidden_size": 48, "num_attention_heads": 2, "rope_scaling": LONG_ROPE | {"long_factor": [3.0, 5.0]}},
}

ROPE_MUTATIONS: dict[str, Any] = {
    "rope_type": "linear",
    "rope_theta": 10500.0,
    "factor": 9.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 20,
}
