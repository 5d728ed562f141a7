"""Adapters that ask for what we do not do, or do not fit the model: each refused with its field or tensor named."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import edit_tensors, load_saved_adapter, load_with_adapter, make_base, sample_ids

from torchft.adapter import WEIGHTS, adapter_tensors, save_adapter
from torchft.errors import UserError
from torchft.modules.lora import LoraSpec
from torchft.peft_config import CONFIG, other_base, read_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    spec = LoraSpec(4, 10.0, use_dora=True)
    save_adapter(load_with_adapter(base, spec), spec, tmp_path / "saved", base_path=str(base))
    return tmp_path / "saved"


BASES = [  # what adapter_config.json names, the base that is given, whether they may be one model
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
    ("Qwen/Qwen3-0.6B", "/models/qwen3-0.6b", True),  # another machine's
    ("/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de2", "Qwen3-0.6B", True),
    ("Qwen/Qwen3-0.6B", "/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de2", True),
    ("Qwen/Qwen3-0.6B", "link", True),
    ("link", "Qwen3-0.6B", True),
    ("", "Qwen/Qwen3-0.6B", True),
    (None, "Qwen/Qwen3-0.6B", True),
    (["Qwen/Qwen3-0.6B-Base"], "Qwen/Qwen3-0.6B", True),  # is no name
    ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B", False),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", False),
    ("Qwen3\0-0.6B", "Qwen/Qwen3-0.6B", False),
    ("Qwen/Qwen3-0.6B", "other_link", False),
]


@pytest.mark.parametrize(("named", "given", "agree"), BASES)
def test_an_adapter_of_another_base_is_told_by_the_bases_names(
    saved: Path, named: object, given: str, agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    Path("Qwen3-0.6B").mkdir()
    Path("link").symlink_to("Qwen3-0.6B")
    Path("other_link").symlink_to("saved")
    fields = json.loads((saved / CONFIG).read_text()) | {"base_model_name_or_path": named}
    (saved / CONFIG).write_text(json.dumps(fields))
    said = other_base(saved, given)
    assert said == "" if agree else said.startswith(f"WARNING: {saved / CONFIG} names {named!r} ") and f"this is {given};" in said


REFUSED_FIELDS = {
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": "experts.gate_up_proj",
    "exclude_modules": ["q_proj"],
    "layer_replication": [[0, 1]],
    "init_lora_weights": "eva",
    "eva_config": {"rho": 2.0},
    "loftq_config": {"bits": 4},
    "use_qalora": True,
    "alora_invocation_tokens": [5],
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "a_field_of_the_future": True,
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_config_fields_that_we_do_not_honour_are_refused_by_name(saved: Path, field: str) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | {field: REFUSED_FIELDS[field]}))
    with pytest.raises(UserError, match=f"{CONFIG}: {field} is "):
        read_adapter(saved)


@pytest.mark.parametrize("value", ["olora", "pissa", "pissa_niter_4", "corda", "loftq", "mica"])
def test_initialisations_that_change_the_base_are_refused(saved: Path, value: str) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | {"init_lora_weights": value}))
    with pytest.raises(UserError, match=f"init_lora_weights is '{value}'"):
        read_adapter(saved)


IMPOSSIBLE_VALUES = {
    "r": ("rank|r is", (0, -4, 4.0, "4", None, True)),
    "lora_alpha": ("alpha", (0, "16", None, float("nan"), True)),
    "lora_dropout": ("dropout", (1.0, -0.1, "0")),
    "use_dora": ("use_dora", (1, "yes")),
    "target_modules": ("target_modules", (None, [], "q_proj|v_proj", [1], {})),
    "modules_to_save": ("modules_to_save", (["norm"], "lm_head", [3])),
}


@pytest.mark.parametrize("field", IMPOSSIBLE_VALUES)
def test_impossible_values_are_refused_by_field(saved: Path, field: str) -> None:
    config = json.loads((saved / CONFIG).read_text())
    named, values = IMPOSSIBLE_VALUES[field]
    for value in values:
        (saved / CONFIG).write_text(json.dumps(config | {field: value}))
        with pytest.raises(UserError, match=rf"{CONFIG}: .*({named})"):
            read_adapter(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 1, "r": 2}', "[" * 100_000, "\udcff"])
def test_config_that_is_no_object_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=CONFIG):
        read_adapter(saved)


A_NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(A_NAME), r"1 tensors are missing \['.*layers.1.mlp.up_proj.lora_A.weight'\]"),
    "unexpected": (lambda t: t.update({A_NAME.replace(".1.", ".7."): t[A_NAME].clone()}), "1 unexpected .*layers.7"),
    "without the prefix": (lambda t: t.update({A_NAME[17:]: t.pop(A_NAME)}), "1 tensors are missing"),
    "wrong prefix": (lambda t: t.update({"model." + A_NAME: t.pop(A_NAME)}), "1 tensors are missing"),
    "transposed": (lambda t: t.update({A_NAME: t[A_NAME].T.contiguous()}), r"up_proj.lora_A.weight is F32 \(128, 4\)"),
    "other rank": (lambda t: t.update({A_NAME: t[A_NAME][:2].clone()}), r"is F32 \(2, 128\)"),
    "integers": (lambda t: t.update({A_NAME: t[A_NAME].to(torch.int8)}), "is I8"),
    "weight that the config does not name": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 128)}), "1 unexpected .*lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSOR_EDITS)
def test_adapter_files_that_do_not_fit_are_refused(base: Path, saved: Path, what: str) -> None:
    change, message = TENSOR_EDITS[what]
    edit_tensors(saved, change, WEIGHTS)
    with pytest.raises(UserError, match=message):
        load_saved_adapter(base, saved)


def test_both_spellings_of_the_magnitude_are_read_but_not_at_once(base: Path, saved: Path) -> None:
    expected = load_saved_adapter(base, saved)(sample_ids())
    name = A_NAME.replace("lora_A.weight", "lora_magnitude_vector")
    edit_tensors(saved, lambda tensors: tensors.update({f"{name}.weight": tensors.pop(name)}), WEIGHTS)
    assert torch.equal(load_saved_adapter(base, saved)(sample_ids()), expected)
    edit_tensors(saved, lambda tensors: tensors.update({name: tensors[f"{name}.weight"].clone()}), WEIGHTS)
    with pytest.raises(UserError, match="1 unexpected"):
        load_saved_adapter(base, saved)


def test_half_precision_adapters_are_read_as_fp32(base: Path, saved: Path) -> None:
    edit_tensors(
        saved, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}), WEIGHTS
    )
    tensors = load_file(saved / WEIGHTS)
    for name, param in adapter_tensors(load_saved_adapter(base, saved)).items():
        assert param.dtype == torch.float32 and torch.equal(param, tensors[f"base_model.model.{name}"].float())


def test_adapter_of_another_model_is_refused(tmp_path: Path, saved: Path) -> None:
    make_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match=r"the model's a float tensor \(.*\); is it an adapter for this base model\?"):
        load_saved_adapter(tmp_path / "other", saved)
    make_base(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UserError, match="21 tensors are missing"):
        load_saved_adapter(tmp_path / "deeper", saved)


def test_pickled_adapter_is_refused_and_never_opened(base: Path, saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="adapter_model.bin is a pickle, which is never opened"):
        load_saved_adapter(base, saved)
    assert not (tmp_path / "executed").exists()
