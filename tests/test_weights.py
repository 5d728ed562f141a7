"""Streaming weights into a model on meta: exact round trips, tensors that do not fit, random weights."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import edit_tensors, hf_config, load_base, make_base, on_meta, refused_load, sample_ids
from torch import Tensor, nn

from torchft import weights
from torchft.hf_checkpoint import SINGLE
from torchft.modules.lora import LoraSpec, add_lora, init_lora
from torchft.modules.nf4 import NF4Tensor, dequantize, quantize_nf4, to_nf4
from torchft.modules.vocab import resize_vocab, train_modules, untie
from torchft.safetensors_header import read_header
from torchft.weights import load_weights, random_weights

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """One file."""
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three files and an index."""
    model = make_base(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="600KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 3
    return tmp_path / "sharded"


# Loading


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_arrives_bit_for_bit(tmp_path: Path, family: str) -> None:
    reference = make_base(tmp_path, family)
    model = load_base(tmp_path)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shards_are_the_single_file(base: Path, sharded: Path) -> None:
    one, many = load_base(base).state_dict(), load_base(sharded).state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_report(base: Path) -> None:
    report = load_weights(on_meta(base), base, device="cpu", dtype=torch.bfloat16)
    assert (report.num_tensors, report.ignored) == (21, ())
    assert report.num_bytes == sum(tensor.nbytes for tensor in load_file(base / SINGLE).values())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtypes_are_cast(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    make_base(tmp_path, dtype=stored)
    model, tensors = load_base(tmp_path, wanted), load_file(tmp_path / SINGLE)
    for name, param in model.named_parameters():
        assert param.dtype == wanted and torch.equal(param, tensors[name].to(wanted)), name


def test_loaded_weights_do_not_share_memory_with_the_file(base: Path) -> None:
    """K14: an mmapped parameter would change, or crash, when the file does."""
    model, before = load_base(base), load_file(base / SINGLE)[NAME].clone()
    with (base / SINGLE).open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\x11" * 4000)
        last = list(read_header(base / SINGLE).tensors)[-1]
    assert torch.equal(model.get_parameter(NAME), before)
    assert not torch.equal(model.get_parameter(last), load_file(base / SINGLE)[last])


def test_streaming_never_holds_a_second_tensor(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is in its place before the next one is read."""
    model = on_meta(sharded)
    filled: list[int] = []
    stream = weights.Checkpoint.stream

    def watched(checkpoint: weights.Checkpoint) -> Iterator[tuple[str, Tensor]]:
        for item in stream(checkpoint):
            filled.append(sum(not param.is_meta for param in model.parameters()))
            yield item

    monkeypatch.setattr(weights.Checkpoint, "stream", watched)
    load_weights(model, sharded, device="cpu", dtype=torch.float32)
    assert filled == list(range(21))


def test_nf4_is_quantised_from_the_base_dtype_as_it_comes(base: Path) -> None:
    model = on_meta(base)
    add_lora(model, LoraSpec(2, 8.0, target_modules=("q_proj", "up_proj")))
    report = quantize_nf4(model)
    load_weights(model, base, device="cpu", dtype=torch.bfloat16)
    assert (len(report.quantized), len(report.skipped)) == (10, 4)  # k_proj and v_proj are too small
    tensors = load_file(base / SINGLE)
    for name, param in model.named_parameters():
        if isinstance(param, NF4Tensor):
            expected = to_nf4(tensors[name].bfloat16()).get_original_weight()
            assert not param.requires_grad and torch.equal(dequantize(param), expected), name
    assert sum(isinstance(param, NF4Tensor) for param in model.parameters()) == 10
    init_lora(model, torch.Generator().manual_seed(0))
    assert torch.isfinite(model(sample_ids())).all()


def test_adapters_stay_on_meta_and_frozen_stays_frozen(base: Path) -> None:
    model = on_meta(base)
    add_lora(model, LoraSpec(2, 8.0, use_dora=True))
    train_modules(model, ("lm_head",))
    load_weights(model, base, device="cpu", dtype=torch.bfloat16)
    for name, param in model.named_parameters():
        trained = ".lora_" in name or name == "lm_head.weight"
        assert param.requires_grad == trained and param.is_meta == (".lora_" in name), name
        assert param.dtype == (torch.float32 if trained else torch.bfloat16), name


def test_tied_weights_are_one_parameter_and_a_stored_head_is_not_needed(tmp_path: Path) -> None:
    make_base(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    before = load_base(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 128)}))
    model = on_meta(tmp_path)
    report = load_weights(model, tmp_path, device="cpu", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert report.ignored == ("lm_head.weight",) and "lm_head.weight" in str(report)


def test_a_pair_parted_on_meta_gets_two_copies(tmp_path: Path) -> None:
    make_base(tmp_path, tie_word_embeddings=True)
    model = on_meta(tmp_path)
    untie(model)
    load_weights(model, tmp_path, device="cpu", dtype=torch.float32)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert torch.equal(embedding, head) and embedding.data_ptr() != head.data_ptr()


def test_old_rope_buffers_in_the_file_are_ignored_and_said_so(base: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(base, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert load_weights(on_meta(base), base, device="cpu", dtype=torch.float32).ignored == (name,)


def test_new_rows_follow_the_files_and_are_zero(base: Path) -> None:
    model = on_meta(base)
    add_lora(model, LoraSpec(2, 8.0))
    new_rows = resize_vocab(model, 100)
    train_modules(model, ("embed_tokens", "lm_head"))
    load_weights(model, base, device="cpu", dtype=torch.bfloat16, new_rows=new_rows)
    tensors = load_file(base / SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        param = model.get_parameter(name)
        assert torch.equal(param[:97], tensors[name]) and param.shape[0] == 100 and not param[97:].any(), name


# Wrong tensors (K4)

ALL_NAMES = [f"model.layers.{i}.{rest}.weight" for i in range(2) for rest in (
    *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    "input_layernorm", "post_attention_layernorm",
)] + ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]  # fmt: skip


@pytest.mark.parametrize("name", ALL_NAMES)
def test_each_tensor_dropped_renamed_transposed_is_named(base: Path, name: str) -> None:
    original = (base / SINGLE).read_bytes()
    edit_tensors(base, lambda tensors: tensors.pop(name))
    refused_load(base, "lacks", name)
    (base / SINGLE).write_bytes(original)
    edit_tensors(base, lambda tensors: tensors.update({f"x.{name}": tensors.pop(name)}))
    refused_load(base, f"lacks {name}", f"holds x.{name} instead")
    (base / SINGLE).write_bytes(original)
    tensor = load_file(base / SINGLE)[name]
    if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
        edit_tensors(base, lambda tensors: tensors.update({name: tensor.T.contiguous()}))
        refused_load(base, name, "transposed?", str(tuple(tensor.shape)))
    (base / SINGLE).write_bytes(original)
    edit_tensors(base, lambda tensors: tensors.update({name: tensor[:-1].contiguous()}))
    refused_load(base, f"{name} is {tuple(tensor[:-1].shape)} in the file and {tuple(tensor.shape)} in the model")


def test_unexpected_tensor_is_named(base: Path) -> None:
    edit_tensors(base, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}))
    refused_load(base, "model.layers.2.mlp.up_proj.weight", "has no place")


def test_many_missing_tensors_are_named_and_counted(base: Path) -> None:
    edit_tensors(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name])
    refused_load(base, "model.layers.1.", "and 1 more")


def test_integer_weights_are_refused(base: Path) -> None:
    edit_tensors(base, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    refused_load(base, f"{NAME} (I8)", "unquantised")


# Random weights


def test_random_weights_are_a_function_of_seed_and_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config("qwen2", attention_dropout=0.0)))

    def build(seed: int, rank: int) -> dict[str, nn.Parameter]:
        model = on_meta(tmp_path)
        if rank:
            add_lora(model, LoraSpec(rank, 9.0))
        random_weights(model, seed=seed, device="cpu", dtype=torch.float32)
        return {name: param for name, param in model.named_parameters() if ".lora_" not in name}

    plain, adapted, other = build(0, 0), build(0, 2), build(1, 0)
    assert plain.keys() == adapted.keys()
    for name, param in plain.items():
        assert torch.equal(param, adapted[name]), name
        if name.endswith("norm.weight"):
            assert torch.equal(param, torch.ones_like(param))
        elif name.endswith(".bias"):
            assert not param.any()
        else:
            assert not torch.equal(param, other[name]) and param.std().item() == pytest.approx(0.02, rel=0.05), name
    assert len({tuple(param.flatten()[:8].tolist()) for name, param in plain.items() if "_proj.weight" in name}) == 14


def test_random_nf4_model_never_holds_two_dense_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    model = on_meta(tmp_path)
    add_lora(model, LoraSpec(2, 8.0))
    names = [f"{name}.weight" for name in quantize_nf4(model).quantized]
    dense = []
    quantise = weights.nf4.to_nf4

    def watched(value: Tensor) -> NF4Tensor:
        dense.append(sum(not isinstance(model.get_parameter(name), NF4Tensor) for name in names))
        return quantise(value)

    monkeypatch.setattr(weights.nf4, "to_nf4", watched)
    random_weights(model, seed=0, device="cpu", dtype=torch.bfloat16)
    assert dense == [0] * 10
    init_lora(model, torch.Generator().manual_seed(0))
    logits = model(sample_ids())
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_load_base_helper_is_transformers(tmp_path: Path) -> None:
    """The ground that the adapter and merge tests stand on."""
    reference = make_base(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_base(tmp_path)(sample_ids()), reference(sample_ids()).logits, atol=2e-5, rtol=0)
