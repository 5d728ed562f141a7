"""Mixtures of experts through files: saved in several of them, merged into NF4 weights, damaged ones named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import gpt_oss, mixtral, qwen3_moe
from test_family_files import assert_same_logits, in_transformers
from tiny_models import edit_tensors, load_base, load_saved_adapter, load_with_adapter, make_adapter, on_meta, refused_load
from transformers import AutoConfig, AutoModelForCausalLM

from torchft.adapter import attach_adapter, load_adapter
from torchft.config import ASSETS
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.hf_checkpoint import open_checkpoint
from torchft.merge import merge
from torchft.modules.lora import LoraSpec, add_lora
from torchft.modules.nf4 import quantize_nf4
from torchft.save_model import save_model
from torchft.weights import load_weights

SIZES = {"vocab_size": 97, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "gpt-oss": gpt_oss(**SIZES | {"intermediate_size": 128}, num_local_experts=5),
    "mixtral": mixtral(**SIZES, intermediate_size=128, num_local_experts=5),
    "qwen3-moe": qwen3_moe(**SIZES, moe_intermediate_size=128, num_experts=5, mlp_only_layers=[1], intermediate_size=128),
}
EXPERT = {  # of the files
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w3.weight",
    "qwen3-moe": "model.layers.0.mlp.experts.3.up_proj.weight",
}
SPEC = LoraSpec(4, 10.0)


each_by_itself = pytest.mark.parametrize("base", EXPERT, indirect=True)


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("moe") / request.param
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[request.param]), dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param += (0.5 if "embed" in name else 0.08) * torch.randn(param.shape)
    model.save_pretrained(path)
    return path


def test_a_trained_model_is_saved_in_several_files(base, tmp_path):
    """Their borders go through stacks of experts; transformers reads them, with nothing missing or left over."""
    model = load_base(base)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.01 * torch.randn(param.shape)
    options = {"dtype": torch.float32, "tokenizer": load_tokenizer(ASSETS / "tiny_llama"), "template": None}
    report = save_model(model, base, tmp_path / "out", max_shard_bytes=300_000, **options)
    assert report.logit_error == 0.0 and len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(base).tensors.keys()
    assert_same_logits(model, in_transformers(tmp_path / "out"))


def test_merged_into_the_weights_of_nf4_training(base, tmp_path):
    """The merged model is the one that was trained: whole stacks are quantised, though files hold expert by expert."""
    adapter = make_adapter(base, tmp_path / "adapter", SPEC)
    trained = on_meta(base)
    add_lora(trained, SPEC)
    assert any("experts" in name for name in quantize_nf4(trained).quantized)
    load_weights(trained, base, device="cpu", dtype=torch.float32)
    load_adapter(trained, adapter)
    assert merge(base, adapter, tmp_path / "merged", torch.float32, nf4_base=True).logit_error < 1e-5
    assert_same_logits(trained, load_base(tmp_path / "merged"))


@each_by_itself
def test_an_expert_that_is_missing_or_misshapen_is_named(base, tmp_path):
    name = EXPERT[base.name]
    another = name.replace(".3.", ".5.")
    for number, (edit, words) in enumerate(
        (
            (lambda tensors: tensors.pop(name), f"lacks {name}"),
            (lambda tensors: tensors.update({name: tensors[name][:-1].clone()}), f"{name} is (127, 128) in the file"),
            (lambda tensors: tensors.update({another: tensors[name].clone()}), f"holds {another}"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        edit_tensors(folder, edit)
        refused_load(folder, words)


@each_by_itself
def test_an_adapter_file_holds_each_expert(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", SPEC)
    held = load_file(adapter / "adapter_model.safetensors")
    name = EXPERT[base.name].removesuffix(".weight")
    assert held[f"base_model.model.{name}.lora_A.weight"].shape == (4, 128)
    assert held[f"base_model.model.{name}.lora_B.weight"].shape == (128, 4)
    stack = load_with_adapter(base, SPEC).get_parameter(name.replace(".3.", ".") + ".lora_B.weight")
    assert torch.equal(held[f"base_model.model.{name}.lora_B.weight"], stack[3 * 128 : 4 * 128])


@pytest.mark.parametrize("base", ["gpt-oss"], indirect=True)
@pytest.mark.parametrize("experts", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
def test_an_adapter_that_peft_made_for_stacks_is_loaded(base, experts, tmp_path):
    """Of both of a stack's parameters, or one, which is wrapped otherwise then."""
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in experts])
    theirs = get_peft_model(in_transformers(base), config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param.copy_(0.1 * torch.randn(param.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    assert_same_logits(load_saved_adapter(base, tmp_path / "adapter"), theirs.eval())


@pytest.mark.parametrize("base", ["qwen3-moe"], indirect=True)
def test_an_adapter_for_another_form_of_the_experts_is_refused(base, tmp_path):
    """transformers 5 packs gate and up into one parameter in memory, and peft can adapt that."""
    adapter = make_adapter(base, tmp_path / "adapter", SPEC)
    text = (adapter / "adapter_config.json").read_text()
    fields = json.loads(text) | {"target_parameters": ["mlp.experts.gate_up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="mlp.experts.gate_up_proj' matches no module"):
        attach_adapter(on_meta(base), adapter)
