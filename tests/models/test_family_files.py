"""Every family through its files: base in and out, adapters in peft, merged models in transformers, NF4, recomputing, answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import (
    LLAMA3_ROPE,
    gemma2,
    gemma3,
    glm4,
    gpt_oss,
    granite,
    llama,
    long_rope,
    ministral,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from tiny_models import load_base, load_saved_adapter, load_with_adapter, make_adapter, on_meta, sample_ids, train_a_little
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torchft.adapter import save_adapter, verify_adapter
from torchft.export import save_safetensors
from torchft.generate import generate
from torchft.hf_checkpoint import SINGLE
from torchft.merge import merge
from torchft.models import build_model
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.lora import LoraSpec, adapters_off, add_lora, init_lora, trainable_parameters
from torchft.modules.nf4 import NF4Tensor, dequantize, quantize_nf4
from torchft.peft_config import read_adapter
from torchft.stored import pieces
from torchft.weights import load_weights, random_weights

SIZES = {  # some linears are whole groups of NF4's (128 x 256), some are not (64 x 128)
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": gemma2(**SIZES, head_dim=32, sliding_window=6),
    "gemma3": gemma3(**SIZES, head_dim=32, sliding_window=6, sliding_window_pattern=2, tie_word_embeddings=False),
    "glm4": glm4(**SIZES, head_dim=32),
    "gpt-oss": gpt_oss(**SIZES | {"intermediate_size": 128}, head_dim=32, num_local_experts=3, sliding_window=6),
    "granite": granite(**SIZES, tie_word_embeddings=True),
    "llama": llama(**SIZES),
    "llama-3.2": llama(**SIZES, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True),
    "ministral": ministral(**SIZES, head_dim=32),
    "mistral": mistral(**SIZES, head_dim=48, sliding_window=6),
    "mixtral": mixtral(**SIZES, num_local_experts=3),
    "olmo2": olmo2(**SIZES),
    "phi3": phi3(**SIZES),
    "phi3-long": phi3(**SIZES, partial_rotary_factor=0.5, tie_word_embeddings=True, **long_rope(8, 10)),
    "qwen2": qwen2(**SIZES),
    "qwen2-tied": qwen2(**SIZES, tie_word_embeddings=True),
    "qwen3": qwen3(**SIZES, head_dim=32),
    "qwen3-tied": qwen3(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": qwen3_moe(**SIZES, head_dim=32, moe_intermediate_size=64, num_experts=6),
    "smollm3": smollm3(**SIZES),
}
SPEC = LoraSpec(4, 10.0)


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that transformers wrote, with weights of a size that matters."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param) / "base"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[request.param]), dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.normal_(std=0.5 if "embed" in name and "gemma" not in request.param else 0.08)
            else:
                param += 0.1 * torch.randn(param.shape)
    model.save_pretrained(path)
    return path


def in_transformers(path: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def assert_same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ids = sample_ids(tokens=20)
    got, expected = (getattr(logits, "logits", logits) for logits in (one(ids), other(ids)))
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, expected.std().item()), rtol=0)


def test_what_is_loaded_is_saved_byte_for_byte(base, tmp_path):
    held = load_file(base / SINGLE)
    state = load_base(base).state_dict()
    tied = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    stored = pieces(on_meta(base))
    saved = {piece.name: piece.cut(state[name]).clone() for name, each in stored.items() for piece in each}
    assert tied == ("lm_head.weight" not in saved)
    assert saved.keys() == held.keys()
    for name, tensor in held.items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name
    shutil.copy(base / "config.json", tmp_path)
    save_safetensors(saved, tmp_path / SINGLE, {"format": "pt"})
    assert_same_logits(in_transformers(tmp_path), load_base(base))


def test_the_adapter_loads_in_peft_and_merges(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", SPEC)
    ours = load_with_adapter(base, SPEC)
    live = PeftModel.from_pretrained(in_transformers(base), adapter).eval()
    assert_same_logits(ours, live)
    assert merge(base, adapter, tmp_path / "merged").logit_error < 1e-5
    assert_same_logits(in_transformers(tmp_path / "merged"), live)
    with adapters_off(ours):
        assert_same_logits(ours, load_base(base))


@pytest.mark.parametrize("base", ["gpt-oss", "mixtral", "qwen3-moe"], indirect=True)
def test_an_adapter_of_experts_trained_with_dropout_loads_in_peft(base, tmp_path):
    """peft refuses the field beside experts; without it the adapter computes the same."""
    spec = replace(SPEC, dropout=0.1)
    ours = load_with_adapter(base, spec)
    save_adapter(ours, spec, tmp_path / "adapter", base_path=str(base))
    assert read_adapter(tmp_path / "adapter").spec.dropout == 0
    assert_same_logits(ours, PeftModel.from_pretrained(in_transformers(base), tmp_path / "adapter").eval())
    assert verify_adapter(ours, spec, tmp_path / "adapter").max_difference == 0


@pytest.mark.parametrize("base, router", [("gpt-oss", "router"), ("mixtral", "gate"), ("qwen3-moe", "gate")], indirect=["base"])
@pytest.mark.parametrize("where", ["", "layers.1.mlp."])
def test_an_adapter_of_a_router_loads_in_peft_and_here(base, router, where, tmp_path):
    """No linear in transformers; with dropout, with which peft refuses it too."""
    router = f"{where.replace('mlp', 'block_sparse_moe') if base.parent.name.startswith('mixtral') else where}{router}"
    spec = replace(SPEC, dropout=0.1, target_modules=("q_proj", router))
    ours = load_with_adapter(base, spec)
    save_adapter(ours, spec, tmp_path / "adapter", base_path=str(base))
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    wanted = f"{where or 'mlp.'}router.weight"
    assert fields.get("target_parameters") == ([wanted] if router.endswith("router") else None)
    verify_adapter(ours, spec, tmp_path / "adapter")
    assert_same_logits(load_saved_adapter(base, tmp_path / "adapter"), ours)
    assert_same_logits(ours, PeftModel.from_pretrained(in_transformers(base), tmp_path / "adapter").eval())


def test_nf4_is_the_model_of_its_decoded_weights(base):
    """Logits, and gradients of all adapters, with full recomputation on one side."""
    model = on_meta(base)
    add_lora(model, SPEC)
    report = quantize_nf4(model)
    load_weights(model, base, device="cpu", dtype=torch.float32)
    init_lora(model, torch.Generator().manual_seed(1))
    train_a_little(model)
    dense = load_with_adapter(base, SPEC)
    coded = {name: param for name, param in model.named_parameters() if isinstance(param.data, NF4Tensor)}
    assert len(coded) == len(report.quantized) > 0 and any("mlp" in name or "moe" in name for name in coded)
    for name, param in coded.items():
        parent, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(parent), leaf, torch.nn.Parameter(dequantize(param.data), requires_grad=False))
    apply_activation_checkpointing(model, "full")
    ids = sample_ids(tokens=20)
    losses = [each(ids, labels=ids.roll(-1, 1)) for each in (model, dense)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for (name, one), other in zip(trainable_parameters(model).items(), trainable_parameters(dense).values(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() and other.grad.norm() > 0, name


def test_greedy_answers_are_transformers(base):
    """Two prompts of different lengths together, each as transformers answers it alone."""
    reference, ours = in_transformers(base), load_base(base)
    prompts = [row.tolist() for row in (*sample_ids(1, 15), *sample_ids(1, 11, seed=4))]
    answers = generate(ours, prompts, max_new_tokens=9, stop_ids=set())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
        assert answer == reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_fresh_norms_do_nothing(name):
    """Whether a norm's weight is stored as it is or less one, at first it multiplies by one."""
    with torch.device("meta"):
        model = build_model(MODELS[name])
    random_weights(model, seed=0, device="cpu", dtype=torch.float32)
    again = build_model(MODELS[name])
    again.init_weights(torch.Generator().manual_seed(0))
    for each in (model, again):
        block = each.model.layers[0]
        for norm in [each.model.norm, *(getattr(block, norm) for norm in block.norms)]:
            x = torch.randn(3, norm.weight.shape[0])
            torch.testing.assert_close(norm(x).square().mean(1), torch.ones(3), rtol=1e-3, atol=0)
