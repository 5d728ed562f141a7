"""Logits and gradients of every family against transformers, on small random models with odd shapes.

The reference is transformers' eager attention in fp32, with weights scaled up so that attention is far from uniform and
norms and biases are not at their trivial initial values: a wrong epsilon, theta or window then moves the logits by far
more than the bound, which is about 5 times the rounding differences seen (3e-6, PITFALLS 2d).
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


def small(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    """A config.json of odd sizes; `others` replaces or adds."""
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
    } | others


CASES = {
    "llama-2-mha": llama(num_key_value_heads=6),
    "llama-3-gqa": llama(rope_theta=500000.0, rms_norm_eps=1e-6),
    "llama-3.1-scaled": llama(rope_scaling=LLAMA3_ROPE, rope_theta=500.0, head_dim=12),
    "llama-3.2-tied": llama(rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True, head_dim=12),
    "llama-linear-biases": llama(rope_scaling={"type": "linear", "factor": 3.0}, attention_bias=True, mlp_bias=True),
    "llama-yarn-new-spelling": llama(rope_theta=None, rope_parameters=YARN_ROPE, head_dim=16),
    "llama-one-layer-mqa": llama(num_hidden_layers=1, num_key_value_heads=1, vocab_size=37, hidden_size=54, head_dim=6),
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
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def twins(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """(transformers' model, ours with the same weights, ids (2, T))."""
    torch.manual_seed(0)
    hf = {key: value for key, value in request.param.items() if value is not None or key == "sliding_window"}
    config = AutoConfig.for_model(**hf)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            center, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.25)
            parameter.normal_(center, spread)
        # Small activations are where the epsilon of the norms matters.
        reference.get_input_embeddings().weight.mul_(0.05)
    with torch.device("meta"):
        ours = build_model(hf)
    ours.to_empty(device="cpu")
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert (missing, unexpected) == ([], [])
    return reference, ours, torch.randint(config.vocab_size, (2, NUM_TOKENS))


def test_logits_equal_transformers(twins):
    reference, ours, ids = twins
    with torch.no_grad():
        expected, got = reference(ids).logits, ours(ids)
    bound = 2e-5 * max(1.0, expected.std().item())
    assert (got - expected).abs().max() <= bound


def test_gradients_equal_transformers(twins):
    reference, ours, ids = twins
    labels = torch.randint(reference.config.vocab_size, ids.shape)
    labels[0, :9] = -100
    F.cross_entropy(reference(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(ids, labels=labels).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == expected.keys()
    norms = {name: grad.norm() for name, grad in expected.items()}
    total = torch.stack(list(norms.values())).norm()
    for name, grad in expected.items():
        # Tensors without a gradient to speak of (a key's bias shifts every score alike) are measured against the whole.
        scale = norms[name] if norms[name] > 1e-6 * max(norms.values()) else total
        assert (got[name] - grad).norm() <= 1e-5 * scale, name


BF16_CASES = ["llama-3.1-scaled", "mistral-window", "qwen2-untied", "qwen3-tied"]


@pytest.mark.parametrize("twins", [CASES[name] for name in BF16_CASES], ids=BF16_CASES, indirect=True)
def test_bf16_is_as_accurate_as_transformers(twins):
    """Against fp64, at most 1.2 times transformers' own bf16 error in root mean square (seen: 0.67 to 0.93)."""
    reference, ours, ids = twins
    frequencies = reference.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        exact = reference.double()(ids).logits
        reference.bfloat16().model.rotary_emb.inv_freq = frequencies  # their from_pretrained keeps it in fp32 too
        theirs, got = reference(ids).logits, ours.bfloat16()(ids)
    assert got.dtype == torch.bfloat16
    their_error, our_error = ((logits - exact).square().mean().sqrt() for logits in (theirs, got))
    assert 0 < our_error <= 1.2 * their_error
