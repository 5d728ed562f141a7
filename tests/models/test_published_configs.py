"""config.json as released, but for token ids and the like: every field is accounted for, and means a row of our tables."""

from typing import Any

import pytest

from torchft.models import gemma2, gemma3, gpt_oss, granite, llama, mixtral, model_config, olmo2, phi3, qwen3_moe, smollm3

COMMON = {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
GEMMA = COMMON | {"cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06}
SMOLLM2 = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 8192, "mlp_bias": False} | COMMON
SMOLLM2 |= {"model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "vocab_size": 49152}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma-3-1b-it": (
        GEMMA
        | {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"eos_token_id": [1, 106], "head_dim": 256, "hidden_size": 1152, "intermediate_size": 6912, "model_type": "gemma3_text"}
        | {"max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1}
        | {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
        gemma3.SIZES["Gemma-3-1B"],
    ),
    "gemma-3-270m": (
        {key: value for key, value in GEMMA.items() if key != "cache_implementation"}
        | {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"_sliding_window_pattern": 6, "head_dim": 256, "hidden_size": 640, "intermediate_size": 2048}
        | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 5 + ["full_attention"]
           + ["sliding_attention"] * 5 + ["full_attention"]}
        | {"max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18}
        | {"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_scaling": None}
        | {"rope_theta": 1000000.0, "sliding_window": 512, "use_bidirectional_attention": False, "vocab_size": 262144},
        gemma3.SIZES["Gemma-3-270M"],
    ),
    "gemma-2-9b": (
        GEMMA
        | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336}
        | {"max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42}
        | {"num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096}
        | {"sliding_window_size": 4096, "vocab_size": 256000},
        gemma2.SIZES["Gemma-2-9B"],
    ),
    "smollm2-135m": (
        SMOLLM2
        | {"hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True}
        | {"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False}
        | {"rope_theta": 100000, "tie_word_embeddings": True},
        llama.SIZES["SmolLM2-135M"] | {"initializer_range": 0.041666666666666664},
    ),
    "smollm2-1.7b-instruct": (
        SMOLLM2
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 24}
        | {"num_key_value_heads": 32, "rope_theta": 130000, "tie_word_embeddings": True}
        | {"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}}},
        llama.SIZES["SmolLM2-1.7B"],
    ),
    "phi-4-mini": (  # the release's own numbers in the two lists are others
        COMMON
        | {"architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0}
        | {"full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1}
        | {"lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3"}
        | {"num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.75}
        | {"original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"rope_scaling": {"type": "longrope", "long_factor": [2] * 48, "short_factor": [1] * 48}}
        | {"sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
        phi3.SIZES["Phi-4-mini"]
        | {"rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "factor": 32.0}}
        | {"max_position_embeddings": 131072, "sliding_window": 262144},
    ),
    "qwen3-30b-a3b": (
        COMMON
        | {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu"}
        | {"hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48}
        | {"mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}
        | {"num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None}
        | {"rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False}
        | {"use_sliding_window": False, "vocab_size": 151936},
        qwen3_moe.SIZES["Qwen3-30B-A3B"],
    ),
    "mixtral-8x7b": (
        {key: value for key, value in COMMON.items() if key != "attention_bias"}
        | {"architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336}
        | {"max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False}
        | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None}
        | {"tie_word_embeddings": False, "vocab_size": 32000},
        mixtral.SIZES["Mixtral-8x7B"],
    ),
    "gpt-oss-20b": (
        COMMON
        | {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64}
        | {"hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880}
        | {"layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "model_type": "gpt_oss"}
        | {"num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8}
        | {"num_local_experts": 32, "output_router_logits": False, "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.9}
        | {"rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
           | {"rope_type": "yarn", "truncate": False}}
        | {"quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"}}
        | {"rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088},
        gpt_oss.SIZES["gpt-oss-20b"],
    ),
    "granite-3.3-8b": (
        COMMON
        | {"architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0}
        | {"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800, "logits_scaling": 16.0}
        | {"max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32}
        | {"num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05}
        | {"rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": 49159},
        granite.SIZES["Granite-3.3-8B"],
    ),
    "olmo-2-7b": (
        COMMON
        | {"architectures": ["Olmo2ForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008}
        | {"max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000}
        | {"tie_word_embeddings": False, "vocab_size": 100352},
        olmo2.SIZES["OLMo-2-7B"],
    ),
    "smollm3": (
        COMMON
        | {"architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008}
        | {"layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False}
        | {"model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16}
        | {"num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None}
        | {"rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
        smollm3.SIZES["SmolLM3-3B"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_a_row_of_the_table(name):
    published, row = PUBLISHED[name]
    assert model_config(published) == model_config(row)
