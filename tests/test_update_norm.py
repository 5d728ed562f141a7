"""scripts/update_norm.py: two updates of one small model, compared."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from script_modules import script_module


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with script_module("update_norm") as module:
        yield module


def model(folder: Path, **tensors: torch.Tensor) -> Path:
    """One file a tensor, as a large model has several."""
    folder.mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    return folder


def test_norm_and_the_share_along_the_other_over_all_weights(script, tmp_path):
    start = model(tmp_path / "start", a=torch.ones(2).bfloat16(), b=torch.zeros(2, 1).bfloat16())
    fp32 = model(tmp_path / "fp32", a=torch.tensor([4.0, 1.0]), b=torch.tensor([[4.0], [0.0]]))  # moved by (3, 0, 4, 0)
    bf16 = model(tmp_path / "bf16", a=torch.tensor([4.0, 13.0]).bfloat16(), b=torch.tensor([[4.0], [0.0]]).bfloat16())
    found = script.compare(start, fp32, bf16)  # moved by (3, 12, 4, 0)
    assert found == {"norm": pytest.approx(13 / 5), "along": 1.0, "cosine": pytest.approx(5 / 13), "weights": 2}


def test_weights_of_a_checkpoint_and_not_its_moments(script, tmp_path):
    moved = {"params/a": torch.tensor([1.0, 2.0]), "optimizer/a/exp_avg": torch.full((2,), 9.0)}
    folder = model(tmp_path / "step_000003")
    save_file(moved, folder / "shard-00001-model-00001-of-00001.safetensors")
    assert {name: tensor.tolist() for name, tensor in script.tensors(folder)} == {"a": [1.0, 2.0]}


def test_what_is_no_update_of_one_model_is_refused(script, tmp_path):
    start = model(tmp_path / "start", a=torch.ones(2), b=torch.ones(3))
    with pytest.raises(SystemExit, match="b of .*start is not in both results"):
        script.compare(start, model(tmp_path / "one", a=torch.zeros(2), b=torch.zeros(3)), model(tmp_path / "two", a=torch.zeros(2)))
    with pytest.raises(SystemExit, match="has moved"):
        script.compare(start, start, start)
