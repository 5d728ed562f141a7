"""`tune merge`: the merged directory is what base and adapter compute, in transformers too, and is refused where it is
not.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import (
    VOCAB_SIZE,
    load_base,
    load_with_adapter,
    make_adapter,
    make_base,
    on_meta,
    sample_ids,
    train_a_little,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchft import model_dir
from torchft.adapter import attach_adapter, load_adapter, save_adapter
from torchft.export import safetensors_bytes, save_safetensors
from torchft.hf_checkpoint import INDEX, SINGLE
from torchft.merge import merge
from torchft.models import read_config
from torchft.modules.lora import LoraSpec, add_lora, init_lora, lora_layers, merged_weight
from torchft.modules.nf4 import NF4Tensor, dequantize, quantize_nf4
from torchft.modules.vocab import init_new_rows, resize_vocab, train_modules
from torchft.safetensors_header import read_header
from torchft.weights import load_weights

VARIANTS = {
    "lora": LoraSpec(4, 10.0),
    "rslora": LoraSpec(16, 8.0, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "dora": LoraSpec(4, 10.0, use_dora=True),
}


def in_transformers(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_merged_in_fp32_is_base_and_adapter_and_pefts_merge(base: Path, tmp_path: Path, variant: str) -> None:
    spec = VARIANTS[variant]
    adapter = make_adapter(base, tmp_path / "adapter", spec)
    report = merge(base, adapter, tmp_path / "merged")
    assert report.num_tensors == 21 and report.num_changed == (14 if spec.target_modules == ("all-linear",) else 4)
    assert report.logit_error < 1e-5 and "logits differ from base + adapter by" in str(report)
    merged = in_transformers(tmp_path / "merged")
    live = PeftModel.from_pretrained(in_transformers(base), adapter).eval()
    ids = sample_ids()
    logits = live(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=2e-5 * max(1, logits.std().item()), rtol=0)
    theirs = live.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / SINGLE)
    for name, tensor in ours.items():
        assert relative(tensor, theirs[name]) < 1e-6, name
    unchanged = [name for name, tensor in load_file(base / SINGLE).items() if torch.equal(ours[name], tensor)]
    assert len(unchanged) == 21 - report.num_changed


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_in_bf16_is_within_the_rounding(tmp_path: Path, variant: str) -> None:
    """A rounded weight is off by at most 2^-9 of itself, 1.7e-3 rms; the logits here by 2e-3 to 4e-3."""
    make_base(tmp_path / "base", dtype=torch.bfloat16)
    spec = VARIANTS[variant]
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", spec)
    report = merge(tmp_path / "base", adapter, tmp_path / "merged", torch.bfloat16)
    model = load_with_adapter(tmp_path / "base", spec)
    tensors = load_file(tmp_path / "merged" / SINGLE)
    for name, layer in lora_layers(model).items():
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
        assert relative(tensors[f"{name}.weight"], merged_weight(layer)) <= 2.5e-3, name
    ids = sample_ids()
    with torch.no_grad():
        assert relative(in_transformers(tmp_path / "merged")(input_ids=ids).logits, model(ids)) <= 5e-3
    assert report.logit_error <= 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_dtype_and_config(base: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """config.json is the base's but for the dtype; without one, byte for byte."""
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    merge(base, adapter, tmp_path / "merged", dtype)
    expected = dtype or torch.float32
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / SINGLE).values()} == {expected}
    before, after = read_config(base), read_config(tmp_path / "merged")
    assert after == before | {"dtype": str(expected).removeprefix("torch.")} and list(after) == list(before)
    if expected == torch.float32:
        assert (base / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()


def test_old_spelling_of_the_dtype_is_kept(base: Path, tmp_path: Path) -> None:
    config = read_config(base)
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    merge(base, adapter, tmp_path / "merged", torch.bfloat16)
    assert read_config(tmp_path / "merged") == config | {"torch_dtype": "bfloat16"}


def test_shards_and_index(tmp_path: Path) -> None:
    """Several files in, several others out; transformers puts them together; no file is larger than asked."""
    make_base(tmp_path / "whole").save_pretrained(tmp_path / "base", max_shard_size="600KB")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", LoraSpec(4, 10.0))
    merge(tmp_path / "base", adapter, tmp_path / "one")
    merge(tmp_path / "base", adapter, tmp_path / "many", max_shard_bytes=300_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) == 5 and files[0] == "model-00001-of-00005.safetensors"
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    parts = {name: load_file(tmp_path / "many" / name) for name in files}
    assert all(sum(tensor.nbytes for tensor in part.values()) <= 300_000 for part in parts.values())
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in parts.values() for tensor in part.values())
    one, many = (in_transformers(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(map(torch.equal, one.values(), many.values()))


def test_two_merges_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """safetensors writes its metadata in an order that is drawn anew for each file: 12 shards agree once in 2,048."""
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    for name in ("one", "other"):
        merge(base, adapter, tmp_path / name, max_shard_bytes=150_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 8 and files == sorted(path.name for path in (tmp_path / "other").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file


def test_a_file_written_in_place_has_the_bytes_of_one_made_in_memory(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    for metadata in ({"format": "pt"}, {"z": '\u00e9 "quoted"', "format": "pt", "a": ""}):
        save_safetensors(tensors, tmp_path / "file", metadata)
        assert (tmp_path / "file").read_bytes() == safetensors_bytes(tensors, metadata)
        assert read_header(tmp_path / "file").metadata == metadata
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "file").items())


def test_at_most_one_shard_is_held(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors handed to each write are gone when the next one comes."""
    import weakref

    alive: list[weakref.ref] = []
    counts = []

    def watched(tensors: dict, *args: Any, **kwargs: Any) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_safetensors(tensors, *args, **kwargs)

    monkeypatch.setattr(model_dir, "save_safetensors", watched)
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    merge(base, adapter, tmp_path / "merged", max_shard_bytes=200_000)
    assert len(counts) >= 5 and set(counts) == {0}


# Ends of the model


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_modules_trained_whole(tmp_path: Path, names: tuple[str, ...], tied: bool) -> None:
    """A tied model whose two ends now differ is written untied, and says so; else transformers would tie them again."""
    make_base(tmp_path / "base", tie_word_embeddings=tied)
    if tied and len(names) == 1:  # only PEFT makes such adapters: we refuse to train one side
        make_base(tmp_path / "untied", tie_word_embeddings=False)
        make_adapter(tmp_path / "untied", tmp_path / "adapter", LoraSpec(4, 10.0), names)
    else:
        make_adapter(tmp_path / "base", tmp_path / "adapter", LoraSpec(4, 10.0), names)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = in_transformers(tmp_path / "merged")
    live = PeftModel.from_pretrained(in_transformers(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = sample_ids()
    logits = live(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=2e-5 * max(1, logits.std().item()), rtol=0)
    stays_tied = tied and len(names) == 2
    assert read_config(tmp_path / "merged")["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / SINGLE)) == (not stays_tied)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_added_tokens_grow_the_vocabulary(tmp_path: Path, tied: bool) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=tied)
    model = on_meta(tmp_path / "base")
    spec = LoraSpec(4, 10.0)
    add_lora(model, spec)
    new_rows = resize_vocab(model, VOCAB_SIZE + 2)
    train_modules(model, ("embed_tokens", "lm_head"))
    load_weights(model, tmp_path / "base", device="cpu", dtype=torch.float32, new_rows=new_rows)
    init_lora(model, torch.Generator().manual_seed(1))
    init_new_rows(model, range(VOCAB_SIZE, VOCAB_SIZE + 2), torch.Generator().manual_seed(1))
    train_a_little(model)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    (tmp_path / "base" / "tokenizer.json").write_text("old")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    (tmp_path / "adapter" / "tokenizer.json").write_text("new")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ids = sample_ids(vocab_size=VOCAB_SIZE + 2)
    merged = in_transformers(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, model.eval()(ids), atol=1e-4, rtol=0)
    assert read_config(tmp_path / "merged")["vocab_size"] == VOCAB_SIZE + 2
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "merged" / "generation_config.json").exists()


# QLoRA (M8)


@pytest.fixture
def qlora(tmp_path: Path) -> Path:
    """A bf16 base and an adapter that was trained on its NF4 form."""
    make_base(tmp_path / "base", dtype=torch.bfloat16)
    model = on_meta(tmp_path / "base")
    spec = LoraSpec(4, 10.0, target_modules=("q_proj", "up_proj"))
    add_lora(model, spec)
    quantize_nf4(model)
    load_weights(model, tmp_path / "base", device="cpu", dtype=torch.bfloat16)
    init_lora(model, torch.Generator().manual_seed(1))
    train_a_little(model)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    return tmp_path


def test_qlora_merges_into_the_checkpoints_weights_by_default(qlora: Path) -> None:
    report = merge(qlora / "base", qlora / "adapter", qlora / "merged")
    assert (
        report.base
        == "the checkpoint's own weights (the adapter was trained on their NF4 form: --nf4-base merges into that)"
        and report.base in str(report)
    )
    dense = load_with_adapter(qlora / "base", LoraSpec(4, 10.0, target_modules=("q_proj", "up_proj")))
    load_adapter(dense, qlora / "adapter")
    with torch.no_grad():
        assert relative(load_base(qlora / "merged")(sample_ids()), dense(sample_ids())) < 5e-3


def test_qlora_merges_into_the_dequantised_weights_if_asked(qlora: Path) -> None:
    """Every frozen linear, adapted or not, is then what training saw: the model is the trained one but for rounding."""
    report = merge(qlora / "base", qlora / "adapter", qlora / "merged", torch.float32, nf4_base=True)
    assert report.base == "the dequantised NF4 weights"
    model = on_meta(qlora / "base")
    attach_adapter(model, qlora / "adapter")
    quantize_nf4(model)
    load_weights(model, qlora / "base", device="cpu", dtype=torch.bfloat16)
    load_adapter(model, qlora / "adapter")
    tensors, layers = load_file(qlora / "merged" / SINGLE), lora_layers(model)
    quantised = {name: param for name, param in model.named_parameters() if isinstance(param, NF4Tensor)}
    assert len(quantised) == 10
    for name, param in quantised.items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = dequantize(param).float() if layer is None else merged_weight(layer)
        assert relative(tensors[name], expected) < 1e-6, name
    own = merge(qlora / "base", qlora / "adapter", qlora / "own", torch.float32)
    assert own.num_changed == report.num_changed == 4
    other = load_file(qlora / "own" / SINGLE)
    assert all(0.05 < relative(tensors[name], other[name]) < 0.12 for name in quantised)


def test_companions_are_copied_and_weights_of_other_formats_are_not(base: Path, tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "USE_POLICY.md",
        "README.md",
        "old.bin",
        "a.py",
    ):
        (base / name).write_text(name)
    (base / "linked.json").symlink_to(base / "tokenizer.json")
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    merge(base, adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    copied = {"tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "USE_POLICY.md", "linked.json"}
    assert names == copied | {"config.json", "generation_config.json", SINGLE}
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
