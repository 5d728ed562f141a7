"""gpt-oss's released form: MXFP4 blocks and scales are decoded as transformers does it, and the model is written as bf16."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import load_base, load_with_adapter, make_adapter, on_meta, refused_load, sample_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from torchft import mxfp4
from torchft.config import ASSETS
from torchft.data.tokenizer import load_tokenizer
from torchft.hf_checkpoint import SINGLE, open_checkpoint
from torchft.merge import merge
from torchft.models import read_config
from torchft.modules.lora import LoraSpec
from torchft.save_model import save_model
from torchft.weights import load_weights

HF = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "sliding_window": 6, "pad_token_id": None,
}  # fmt: skip
SPEC = LoraSpec(4, 10.0)


def random_codes(experts: int, out: int, width: int, seed: int) -> dict[str, Tensor]:
    """Every code, and scales from 2^-9 to 1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
    return {"_blocks": blocks, "_scales": torch.randint(118, 126, blocks.shape[:3], dtype=torch.uint8, generator=generator)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in MXFP4, as released, and in bf16, as transformers decodes it."""
    torch.manual_seed(0)
    coded, plain = (tmp_path_factory.mktemp("gpt_oss") / name for name in ("coded", "plain"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HF), dtype=torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape)
    model.save_pretrained(plain)
    tensors = load_file(plain / SINGLE)
    codes = {}
    for seed, name in enumerate(name for name in list(tensors) if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        experts, width, out = tensors[name].shape
        parts = random_codes(experts, out, width, seed)
        codes |= {name + kind: part for kind, part in parts.items()}
        tensors[name] = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])
    save_file(tensors, plain / SINGLE, metadata={"format": "pt"})
    coded.mkdir()
    others = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in codes}
    save_file(others | codes, coded / SINGLE, metadata={"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (coded / "config.json").write_text(json.dumps(read_config(plain) | {"quantization_config": quantization}))
    return coded, plain


def test_codes_are_decoded_as_transformers_does():
    """All codes with all scales, bit for bit, the sign of zero included."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 254, 16, 16)
    scales = torch.arange(1, 255, dtype=torch.uint8).view(1, 254, 1).expand(1, 254, 16)
    expected = convert_moe_packed_tensors(blocks, scales)  # (E, in, out)
    got = mxfp4.Coded(blocks, scales)[:]
    assert torch.equal(got.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))
    assert mxfp4.decode(blocks, scales)[0, 126, :6].tolist() == [0.0, 0.0, 0.5, 0.0, 1.0, 0.0]  # scale 1: low half first


def test_both_forms_are_one_model(pair):
    coded, plain = pair
    for one, other in zip(load_base(coded).parameters(), load_base(plain).parameters(), strict=True):
        assert torch.equal(one, other)
    read, expected = open_checkpoint(coded), load_file(plain / SINGLE)
    assert {name: info.shape for name, info in read.tensors.items()} == {k: tuple(v.shape) for k, v in expected.items()}
    assert all(torch.equal(read.read(name), tensor) for name, tensor in expected.items())


def test_an_expert_is_decoded_by_itself(pair, monkeypatch):
    """Of a stack that is divided, only the experts of which this process has rows."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    decoded, original = [], mxfp4.decode
    monkeypatch.setattr(mxfp4, "decode", lambda blocks, scales: decoded.append(len(blocks)) or original(blocks, scales))
    stack = next(tensor for found, tensor in open_checkpoint(pair[0]).stream() if found == name)
    assert torch.equal(stack[1:2], load_file(pair[1] / SINGLE)[name][1:2]) and decoded == [1]


def test_a_saved_model_is_bf16_and_transformers_loads_it(pair, tmp_path):
    coded, plain = pair
    model = on_meta(coded)
    load_weights(model, coded, device="cpu", dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "tokenizer": load_tokenizer(ASSETS / "tiny_llama"), "template": None}
    save_model(model, coded, tmp_path / "out", **options)
    assert "quantization_config" not in read_config(tmp_path / "out")
    written, expected = load_file(tmp_path / "out" / SINGLE), load_file(plain / SINGLE)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


def test_an_adapter_merges_into_the_decoded_weights(pair, tmp_path):
    coded, plain = pair
    adapter = make_adapter(coded, tmp_path / "adapter", SPEC)
    merge(coded, adapter, tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        got, expected = merged(sample_ids()).logits, load_with_adapter(plain, SPEC)(sample_ids())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.std().item()))


def test_half_of_a_pair_is_named(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "model")
    file = tmp_path / "model" / SINGLE
    with safe_open(file, framework="pt") as opened:
        kept = [name for name in opened.keys() if not name.endswith("0.mlp.experts.down_proj_scales")]  # noqa: SIM118
        tensors = {name: opened.get_tensor(name) for name in kept}
    save_file(tensors, file)
    refused_load(tmp_path / "model", "lacks model.layers.0.mlp.experts.down_proj;", "model.layers.0.mlp.experts.down_proj_blocks")
