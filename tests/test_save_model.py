"""The directory of a model trained whole: in several files, what it keeps of the base's, and what is refused."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchft import model_dir
from torchft import save_model as save_model_module
from torchft.config import ASSETS
from torchft.data.chat_template import ChatTemplate, load_template
from torchft.data.tokenizer import Tokenizer, load_tokenizer
from torchft.errors import UserError
from torchft.hf_checkpoint import INDEX, open_checkpoint
from torchft.models import build_model, read_config
from torchft.modules.transformer import CausalLM
from torchft.save_model import SavedModel, save_model
from torchft.weights import load_weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The shipped tiny model as a directory of a user's, with a licence and pickled weights beside it."""
    folder = tmp_path / "base"
    shutil.copytree(ASSETS / "tiny_llama", folder)
    (folder / "LICENSE.txt").write_text("some")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


def trained(base: Path) -> CausalLM:
    """The model, every weight moved."""
    with torch.device("meta"):
        model = build_model(read_config(base))
    load_weights(model, base, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.add_(0.01 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number)))
    return model


def texts(base: Path, chosen: str = "") -> dict[str, Tokenizer | ChatTemplate | None]:
    tokenizer = load_tokenizer(base)
    return {"tokenizer": tokenizer, "template": load_template(chosen, tokenizer)}


def save(base: Path, out: Path, **more: object) -> SavedModel:
    options = {"dtype": torch.float32, **texts(base)} | more
    return save_model(trained(base), base, out, **options)


def test_in_several_files_of_at_most_one_size(base: Path, tmp_path: Path) -> None:
    report = save(base, tmp_path / "out", max_shard_bytes=3_000_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 3_100_000
    assert list(open_checkpoint(tmp_path / "out").tensors) and (tmp_path / "out" / INDEX).exists()
    expected = dict(trained(base).named_parameters())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], param) for name, param in expected.items())
    assert report.num_tensors == len(expected) and report.logit_error == 0.0
    assert f"{len(expected)} tensors, 0.01 GiB, each read back bit for bit; loaded anew" in str(report)


def test_what_is_kept_of_the_base(base: Path, tmp_path: Path) -> None:
    """config.json byte for byte where nothing changed, tokenizer and licence; no pickles."""
    save(base, tmp_path / "same", dtype=torch.bfloat16)
    save(base, tmp_path / "other", dtype=torch.float32, **texts(base, "alpaca"))
    stored = {tensor.dtype for tensor in load_file(tmp_path / "same/model.safetensors").values()}
    assert stored == {torch.bfloat16}
    key = "dtype" if "dtype" in read_config(base) else "torch_dtype"
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("same", "other")}
    assert {name: config.pop(key) for name, config in configs.items()} == {"same": "bfloat16", "other": "float32"}
    assert configs["same"] == configs["other"] == {k: v for k, v in read_config(base).items() if k != key}
    names = {path.name for path in (tmp_path / "same").iterdir()}
    assert {"LICENSE.txt", "tokenizer.json"} <= names and "pytorch_model.bin" not in names
    assert "### Instruction" in (tmp_path / "other/chat_template.jinja").read_text()
    assert load_template("", load_tokenizer(tmp_path / "other")).source == texts(base, "alpaca")["template"].source
    assert not (tmp_path / "same/chat_template.jinja").exists()


def test_what_the_disk_changes_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was there before stays."""
    save(base, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    original = model_dir.save_safetensors

    def failing_disk(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        tensors["model.norm.weight"][3] += 1e-6
        original(tensors, file, metadata)
        tensors["model.norm.weight"][3] -= 1e-6

    monkeypatch.setattr(model_dir, "save_safetensors", failing_disk)
    with pytest.raises(UserError, match="model.norm.weight is not what was written"):
        save(base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_not_finite_weights_and_full_disks_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(UserError, match="model.norm.weight holds NaN or infinity"):
        save_model(model, base, tmp_path / "out", dtype=torch.float32, **texts(base))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_dir.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match="GiB are free on that disk"):
        save(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_are_compared_where_memory_allows(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(save_model_module, "available_memory", lambda: 1000)
        assert "logits were NOT compared" in str(save(base, tmp_path / "short"))
    original = save_model_module.load_weights

    def other_weights(model: CausalLM, *args: object, **more: object) -> object:
        report = original(model, *args, **more)
        with torch.no_grad():
            model.model.norm.weight.mul_(torch.linspace(0.5, 2, len(model.model.norm.weight)))
        return report

    monkeypatch.setattr(save_model_module, "load_weights", other_weights)
    with pytest.raises(UserError, match="its logits differ from the trained model's"):
        save(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_at_most_one_file_is_held(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K10: the tensors handed to each write are gone before the next ones are gathered."""
    alive: list[weakref.ref] = []
    counts = []
    gather, write = save_model_module._gathered_as, model_dir.save_safetensors

    def counted(*args: object) -> torch.Tensor:
        counts.append(sum(ref() is not None for ref in alive))
        return gather(*args)

    def watched(tensors: dict[str, torch.Tensor], *args: object) -> None:
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        write(tensors, *args)

    monkeypatch.setattr(save_model_module, "_gathered_as", counted)
    monkeypatch.setattr(model_dir, "save_safetensors", watched)
    save(base, tmp_path / "out", max_shard_bytes=3_000_000)
    assert len(alive) > 30 and set(counts) == {0}
