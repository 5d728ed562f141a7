"""Merges that must not happen, or must not be called done: nothing is left behind, and the message says why."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import load_with_adapter, make_adapter, make_base

from torchft import merge as merge_module
from torchft import model_dir
from torchft.adapter import WEIGHTS, save_adapter
from torchft.cli import main
from torchft.errors import UserError
from torchft.merge import merge
from torchft.modules.lora import LoraSpec, lora_layers, merged_weight


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_that_changes_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0), trained=False)
    with pytest.raises(UserError, match="base would be as before: the adapter .* changes nothing"):
        merge(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_lost_in_the_rounding_is_refused(base: Path, tmp_path: Path) -> None:
    spec = LoraSpec(4, 10.0)
    model = load_with_adapter(base, spec, trained=False)
    for layer in lora_layers(model).values():
        torch.nn.init.constant_(layer.lora_B.weight, 1e-9)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    with pytest.raises(UserError, match="changes nothing"):
        merge(base, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)


def test_nothing_is_written_over(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    for name in ("base", "adapter"):
        with pytest.raises(UserError, match="exists already and is never written over"):
            merge(base, adapter, tmp_path / name)


def test_a_broken_base_or_adapter_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    make_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match=r"the model's a float tensor \(.*\); is it an adapter for this base model\?"):
        merge(tmp_path / "other", adapter, tmp_path / "merged")
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(UserError, match="not an intact safetensors file"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_merged_with_a_warning(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    base.rename(tmp_path / "instruct")
    main(["merge", str(tmp_path / "instruct"), str(adapter), str(tmp_path / "merged")])
    warning = capsys.readouterr().err
    assert warning.startswith("WARNING: ") and f"names {str(base)!r} as the adapter's base" in warning and warning.count("\n") == 1
    (tmp_path / "instruct").rename(base)
    main(["merge", str(base), str(adapter), str(tmp_path / "merged_again")])
    assert capsys.readouterr().err == ""


def test_overflow_in_the_written_dtype_is_refused(base: Path, tmp_path: Path) -> None:
    spec = LoraSpec(4, 10.0, target_modules=("q_proj",))
    model = load_with_adapter(base, spec)
    torch.nn.init.constant_(model.model.layers[1].self_attn.q_proj.lora_B.weight, 1e7)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    with pytest.raises(
        UserError, match=r"layers.1.self_attn.q_proj.weight holds NaN or infinity after merging in torch.float16"
    ):
        merge(base, tmp_path / "adapter", tmp_path / "merged", torch.float16)


def test_a_written_tensor_that_reads_back_otherwise_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_disk(tensors: dict, file: Path, metadata: dict) -> None:
        save_file(tensors, file, metadata)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(model_dir, "save_safetensors", failing_disk)
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    with pytest.raises(UserError, match="is not what was written; the disk may be failing"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_logits_that_differ_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the merge formula wrong, what was written would be read back all right; the logits would not agree."""
    monkeypatch.setattr(merge_module, "merged_weight", lambda layer: merged_weight(layer) * 1.05)
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    with pytest.raises(UserError, match="logits differ from base \\+ adapter by"):
        merge(base, adapter, tmp_path / "merged", torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_logits_are_not_compared_where_memory_is_short_and_that_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "available_memory", lambda: 1000)
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    report = merge(base, adapter, tmp_path / "merged")
    assert report.logit_error is None and "logits were NOT compared" in str(report)


def test_a_full_disk_is_refused_before_writing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = merge_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    adapter = make_adapter(base, tmp_path / "adapter", LoraSpec(4, 10.0))
    with pytest.raises(UserError, match="GiB are free on that disk"):
        merge(base, adapter, tmp_path / "merged")
