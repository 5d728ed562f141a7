"""Saving adapters: whole or not at all, never over another one unasked, and verified by reading back."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import edit_tensors, load_with_adapter, make_base, on_meta, train_a_little

from torchft import adapter
from torchft.adapter import WEIGHTS, save_adapter, verify_adapter
from torchft.errors import UserError
from torchft.modules.lora import LoraSpec, add_lora, init_lora, lora_layers
from torchft.modules.nf4 import quantize_nf4
from torchft.peft_config import CONFIG, read_adapter
from torchft.weights import load_weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


A_NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    spec = LoraSpec(4, 10.0, use_dora=True)
    save_adapter(load_with_adapter(base, spec), spec, tmp_path / "saved", base_path=str(base))
    return tmp_path / "saved"


def test_an_adapter_is_never_written_over_unless_asked(base: Path, tmp_path: Path) -> None:
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(base, spec)
    save_adapter(model, spec, tmp_path / "adapter", base_path="first")
    with pytest.raises(UserError, match="exists already and is never written over"):
        save_adapter(model, spec, tmp_path / "adapter", base_path="second")
    assert read_adapter(tmp_path / "adapter").base_path == "first"
    save_adapter(model, spec, tmp_path / "adapter", base_path="second", replace_existing=True)
    assert read_adapter(tmp_path / "adapter").base_path == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"], "nothing temporary is left"


def test_a_save_that_fails_leaves_the_old_adapter_and_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(base, spec)
    save_adapter(model, spec, tmp_path / "adapter", base_path="first")

    def disk_full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter, "write_bytes", disk_full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        save_adapter(model, spec, tmp_path / "adapter", base_path="second", replace_existing=True)
    assert read_adapter(tmp_path / "adapter").base_path == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_killed_save_leaves_the_old_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill runs no cleanup: whatever the save had done by then is on the disk, and only the last rename shows it."""
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(base, spec)
    save_adapter(model, spec, tmp_path / "adapter", base_path="first")

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
        assert names == [CONFIG, WEIGHTS] and read_adapter(tmp_path / "adapter").base_path == "first"
        raise Killed

    monkeypatch.setattr(os, "rename", kill)
    with pytest.raises(Killed):
        save_adapter(model, spec, tmp_path / "adapter", base_path="second", replace_existing=True)
    assert read_adapter(tmp_path / "adapter").base_path == "first"


@pytest.mark.parametrize("names", [(), ("embed_tokens", "lm_head")])
def test_verify_accepts_what_was_saved(base: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    spec = LoraSpec(4, 10.0, use_dora=True)
    model = load_with_adapter(base, spec, names).train()
    before = {name: param.clone() for name, param in model.named_parameters()}
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    check = verify_adapter(model, spec, tmp_path / "adapter")
    assert check.num_tensors == 42 + len(names) and check.max_difference == 0
    assert (check.effect is None) if names else check.effect > 0.1
    assert "read back bit for bit" in str(check)
    assert model.training and all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_verify_over_nf4_and_its_mark_in_the_file(base: Path, tmp_path: Path) -> None:
    model = on_meta(base)
    spec = LoraSpec(4, 10.0, target_modules=("q_proj", "up_proj"))
    add_lora(model, spec)
    quantize_nf4(model)
    load_weights(model, base, device="cpu", dtype=torch.bfloat16)
    init_lora(model, torch.Generator().manual_seed(1))
    train_a_little(model)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    assert verify_adapter(model, spec, tmp_path / "adapter").max_difference == 0
    assert adapter.read_header(tmp_path / "adapter" / WEIGHTS).metadata["base_quantization"] == "nf4"


VERIFY_EDITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (
        lambda p: edit_tensors(p, lambda t: t[A_NAME].view(torch.int32)[0, 0].bitwise_xor_(1), WEIGHTS),
        "up_proj.lora_A.weight is not what",
    ),
    "scale": (lambda p: edit_config(p, lora_alpha=4), "says"),
    "rslora": (lambda p: edit_config(p, use_rslora=True), "says"),
    "targets too few": (lambda p: edit_config(p, target_modules=["q_proj"]), "mean 2 linears, but 14 were trained"),
    "targets too many": (lambda p: edit_config(p, target_modules="all-linear", modules_to_save=["lm_head"]), "says"),
    "modules": (lambda p: edit_config(p, modules_to_save=["embed_tokens"]), "says"),
}


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize("what", VERIFY_EDITS)
def test_verify_refuses_what_was_not_trained(base: Path, saved: Path, what: str) -> None:
    spec = LoraSpec(4, 10.0, use_dora=True)
    model = load_with_adapter(base, spec)
    verify_adapter(model, spec, saved)
    change, message = VERIFY_EDITS[what]
    change(saved)
    with pytest.raises(UserError, match=message):
        verify_adapter(model, spec, saved)


def test_verify_compares_logits_under_the_config_on_disk(
    base: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the live layers scaled otherwise than the config says, only the logits would show it."""
    spec = LoraSpec(4, 10.0, use_dora=True)
    model = load_with_adapter(base, spec)
    for layer in lora_layers(model).values():
        layer.scale = 1.0
    with pytest.raises(UserError, match="logits differ"):
        verify_adapter(model, spec, saved)
    assert {layer.scale for layer in lora_layers(model).values()} == {1.0}, "the live model is left as it was"
