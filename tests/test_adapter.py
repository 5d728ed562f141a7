"""Adapters on disk: PEFT reads ours and we read PEFT's, with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    VOCAB_SIZE,
    load_saved_adapter,
    load_with_adapter,
    make_base,
    on_meta,
    sample_ids,
    train_a_little,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchft.adapter import WEIGHTS, save_adapter
from torchft.modules.lora import LoraSpec, add_lora, init_lora, lora_layers
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import init_new_rows, is_tied, resize_vocab, train_modules
from torchft.peft_config import CONFIG, read_adapter
from torchft.weights import load_weights

VARIANTS = {  # alpha is never the rank: PITFALLS M5
    "r4": LoraSpec(4, 10.0),
    "r16": LoraSpec(16, 8.0, target_modules=("q_proj", "down_proj")),
    "r64": LoraSpec(64, 24.0),
    "r4-rslora": LoraSpec(4, 10.0, use_rslora=True),
    "r16-rslora": LoraSpec(16, 8.0, use_rslora=True),
    "r64-rslora": LoraSpec(64, 24.0, use_rslora=True),
    "dora": LoraSpec(4, 10.0, use_dora=True),
    "dora-rslora": LoraSpec(
        16, 24.0, use_rslora=True, use_dora=True, target_modules=("v_proj", "o_proj", "mlp.gate_proj")
    ),
    "fractional-alpha": LoraSpec(4, 2.5),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


def in_peft(base: Path, path: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path).eval()


@torch.no_grad()
def assert_same_logits(ours: CausalLM, theirs: PreTrainedModel | PeftModel, vocab_size: int = VOCAB_SIZE) -> None:
    """To 1e-5, in units of the logits' own size where that is above 1."""
    ids = sample_ids(vocab_size=vocab_size)
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-5 * max(1.0, expected.std().item()), rtol=0)


def peft_trained(base: Path, path: Path, **fields: Any) -> PeftModel:
    """An adapter that PEFT made, moved off its start and saved at `path`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | fields
    model = get_peft_model(model, LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param += 0.05 * torch.randn(param.shape, generator=generator)
    model.save_pretrained(path)
    return model


# Ours -> PEFT


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_ours_with_the_same_logits(base: Path, tmp_path: Path, variant: str) -> None:
    spec = VARIANTS[variant]
    model = load_with_adapter(base, spec)
    save_adapter(model, spec, tmp_path / "adapter", base_path=str(base))
    twin = in_peft(base, tmp_path / "adapter")
    assert_same_logits(model, twin)

    per_layer = 3 if spec.use_dora else 2
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert len(names) == per_layer * len(lora_layers(model))
    loaded = [param for name, param in twin.named_parameters() if "lora_" in name]
    assert len(loaded) == len(names) and all(param.any() for param in loaded)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base) and "all-linear" not in config["target_modules"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    make_base(tmp_path / "base", family)
    spec = LoraSpec(4, 10.0, use_dora=True)
    model = load_with_adapter(tmp_path / "base", spec)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    assert_same_logits(model, in_peft(tmp_path / "base", tmp_path / "adapter"))


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_modules_trained_whole_reach_peft_and_come_back(base: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(base, spec, names)
    save_adapter(model, spec, tmp_path / "adapter", base_path=str(base))
    assert_same_logits(model, in_peft(base, tmp_path / "adapter"))
    assert_same_logits(load_saved_adapter(base, tmp_path / "adapter"), in_peft(base, tmp_path / "adapter"))
    assert read_adapter(tmp_path / "adapter").modules_to_save == names


def test_tied_pair_trained_as_one_stays_one_in_peft(tmp_path: Path) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=True)
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(tmp_path / "base", spec, ("embed_tokens", "lm_head"))
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    twin = in_peft(tmp_path / "base", tmp_path / "adapter")
    assert_same_logits(model, twin)
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    again = load_saved_adapter(tmp_path / "base", tmp_path / "adapter")
    assert is_tied(again)
    assert_same_logits(again, twin)


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_reach_peft_over_a_resized_base(tmp_path: Path, tied: bool) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=tied)
    model = on_meta(tmp_path / "base")
    spec = LoraSpec(4, 10.0)
    add_lora(model, spec)
    new_rows = resize_vocab(model, VOCAB_SIZE + 3)
    train_modules(model, ("embed_tokens", "lm_head"))
    load_weights(model, tmp_path / "base", device="cpu", dtype=torch.float32, new_rows=new_rows)
    init_lora(model, torch.Generator().manual_seed(1))
    init_new_rows(model, range(VOCAB_SIZE, VOCAB_SIZE + 3), torch.Generator().manual_seed(1))
    train_a_little(model)

    tokenizer = StandInTokenizer()
    save_adapter(model, spec, tmp_path / "adapter", base_path="x", tokenizer=tokenizer)
    assert (tmp_path / "adapter" / "tokenizer.json").read_text() == "{}"
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    resized.resize_token_embeddings(VOCAB_SIZE + 3, mean_resizing=False)
    twin = PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()
    assert_same_logits(model, twin, VOCAB_SIZE + 3)
    assert_same_logits(load_saved_adapter(tmp_path / "base", tmp_path / "adapter"), twin, VOCAB_SIZE + 3)


class StandInTokenizer:
    """What save_adapter needs of a tokenizer."""

    added = ["<a>", "<b>", "<c>"]
    chat_template = None

    def save(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}")


# PEFT -> ours


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 16, "lora_alpha": 24, "use_rslora": True, "lora_dropout": 0.1},
        {"r": 64, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
        {"target_modules": ["layers.1.self_attn.v_proj", "mlp.down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False, "task_type": None},
    ],
    ids=["plain", "rslora", "dora", "suffixes", "head", "both-ends", "gaussian", "no-task"],
)
def test_we_load_pefts_with_the_same_logits(base: Path, tmp_path: Path, fields: dict) -> None:
    twin = peft_trained(base, tmp_path / "adapter", **fields)
    assert_same_logits(load_saved_adapter(base, tmp_path / "adapter"), twin)


@pytest.mark.parametrize(
    ("fields", "stays_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),  # PEFT trains two copies
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=["embedding", "head", "two-copies", "ensured"],
)
def test_pefts_adapters_of_a_tied_model(tmp_path: Path, fields: dict, stays_tied: bool) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=True)
    twin = peft_trained(tmp_path / "base", tmp_path / "adapter", **fields)
    model = load_saved_adapter(tmp_path / "base", tmp_path / "adapter")
    assert_same_logits(model, twin)
    assert is_tied(model) == stays_tied == model.config.tie_word_embeddings


def test_training_can_start_from_a_peft_adapter(base: Path, tmp_path: Path) -> None:
    """SFT of SFT: loaded instead of initialised, trained, saved again, and PEFT sees the second stage."""
    peft_trained(base, tmp_path / "first", use_dora=True)
    model = load_saved_adapter(base, tmp_path / "first")
    train_a_little(model)
    save_adapter(model, read_adapter(tmp_path / "first").spec, tmp_path / "second", base_path=str(base))
    assert_same_logits(model, in_peft(base, tmp_path / "second"))
    first, second = load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert first.keys() == second.keys() and all(not torch.equal(first[name], second[name]) for name in first)


def test_spec_round_trips_through_the_config(base: Path, tmp_path: Path) -> None:
    for index, spec in enumerate(VARIANTS.values()):
        save_adapter(load_with_adapter(base, spec, trained=False), spec, tmp_path / str(index), base_path="org/name")
        config = read_adapter(tmp_path / str(index))
        assert config.base_path == "org/name"
        assert (
            config.spec.scale == spec.scale and config.spec.rank == spec.rank and config.spec.use_dora == spec.use_dora
        )
