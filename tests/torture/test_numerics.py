"""Every family at released proportions, 1,024 tokens: logits, gradients and bf16 against transformers and fp64. PITFALLS M3 and 2d.

Four layers of a released size (two where those would be too large, and few experts), with a vocabulary cut to 8,192 words. The small odd
configs of tests/models cover more variants; these have the widths and depths of sums at which rounding is what it is in use.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scale import SEED, scaled
from small_models import in_our_names, make_twins
from test_parity import gradient_errors
from torch import Tensor

from torchft.models import (
    gemma2,
    gemma3,
    glm4,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)

VOCABULARY = 8192
FEW_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4}
FEW_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {  # released size -> what of it is cut
    "Llama-3.2-1B": llama.SIZES["Llama-3.2-1B"],
    "Mistral-7B-v0.1": mistral.SIZES["Mistral-7B-v0.1"] | {"num_hidden_layers": 1, "sliding_window": 400},
    "Qwen2.5-0.5B": qwen2.SIZES["Qwen2.5-0.5B"],
    "Qwen3-0.6B": qwen3.SIZES["Qwen3-0.6B"],
    "Gemma-2-2B": gemma2.SIZES["Gemma-2-2B"] | {"num_hidden_layers": 2, "sliding_window": 400},
    "Gemma-3-1B": gemma3.SIZES["Gemma-3-1B"],
    "Phi-4-mini": phi3.SIZES["Phi-4-mini"] | {"num_hidden_layers": 2},
    "OLMo-2-1B": olmo2.SIZES["OLMo-2-1B"],
    "Granite-3.3-2B": granite.SIZES["Granite-3.3-2B"],
    "GLM-4-9B-0414": glm4.SIZES["GLM-4-9B-0414"] | {"num_hidden_layers": 1},
    "SmolLM3-3B": smollm3.SIZES["SmolLM3-3B"],
    "Qwen3-30B-A3B": qwen3_moe.SIZES["Qwen3-30B-A3B"] | FEW_EXPERTS | {"num_hidden_layers": 2},
    "Mixtral-8x7B": mixtral.SIZES["Mixtral-8x7B"] | FEW_LOCAL | {"num_hidden_layers": 1, "num_local_experts": 2},
    "gpt-oss-20b": gpt_oss.SIZES["gpt-oss-20b"] | FEW_LOCAL | {"num_hidden_layers": 2},
}


def config_of(name: str) -> dict[str, Any]:
    """The released config.json, cut."""
    hf = MODELS[name]
    layers = min(4, hf["num_hidden_layers"])
    cut = {key: hf[key][:layers] for key in ("layer_types", "no_rope_layers") if hf.get(key)}
    return hf | cut | {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "pad_token_id": None}


def error_of(logits: Tensor, exact: Tensor) -> float:
    return (logits.double() - exact).abs().max().item()


def divergence(logits: Tensor, exact: Tensor) -> float:
    """Mean over tokens of KL(exact || logits), in nats."""
    ours, wanted = F.log_softmax(logits.double(), -1), F.log_softmax(exact, -1)
    return F.kl_div(ours, wanted, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("name", MODELS if scaled(0, 1) else ["Qwen3-0.6B"])
def test_at_released_proportions(name: str, tally: Callable) -> None:
    tokens = scaled(40, 1024)
    reference, ours, ids = make_twins(config_of(name), released=True, shape=(1, tokens), seed=SEED)
    model_type = reference.config.model_type
    with torch.no_grad():
        exact_model = copy.deepcopy(reference).double()
        exact = exact_model(ids).logits
        del exact_model
        scale = max(1.0, exact.std().item())
        got, theirs = ours(ids), reference(ids).logits
        error, rounding = error_of(got, theirs.double()), error_of(got, exact) / error_of(theirs, exact)
        assert error <= 2e-5 * scale and rounding <= 1.5

    labels = torch.randint(VOCABULARY, ids.shape)
    labels[0, :9] = -100
    F.cross_entropy(reference(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(ids, labels=labels).backward()
    expected = in_our_names({key: parameter.grad for key, parameter in reference.named_parameters()}, model_type)
    worst = max(gradient_errors({key: parameter.grad for key, parameter in ours.named_parameters()}, expected).values())
    assert worst <= 1e-5

    frequencies = getattr(reference.model.rotary_emb, "inv_freq", None)
    frequencies = None if frequencies is None else frequencies.clone()
    with torch.no_grad():
        reference.bfloat16()
        if frequencies is not None:
            reference.model.rotary_emb.inv_freq = frequencies  # their from_pretrained keeps it in fp32 too
        theirs, got = reference(ids).logits, ours.bfloat16()(ids)
    kl, ratio = divergence(got, exact), error_of(got, exact) / error_of(theirs, exact)
    # Rounded, a router takes another expert here and there, in transformers as often.
    mixture = "bf16 KL of mixtures to transformers'" if ours.config.moe else ""
    kl = kl / divergence(theirs, exact) if mixture else kl
    assert kl <= (1.2 if mixture else 3e-4) and ratio <= 1.5
    errors = {"logits": error / scale, "fp32 error to transformers'": rounding, "gradients": worst}
    tally(1, "models", **errors, **{"bf16 error to transformers'": ratio, mixture or "bf16 KL in nats": kl})
