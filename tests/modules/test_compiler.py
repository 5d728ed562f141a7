"""Whether torch.compile can work here, asked of machines that lack one thing."""

import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from torchft.modules.compiler import missing_compiler


@pytest.mark.parametrize(("device", "compiler"), [("cpu", "g++"), ("cuda", "gcc")])
def test_no_compiler_names_the_package(device: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # Triton is there
    monkeypatch.setenv("PATH", "/nonexistent")
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    assert f"apt install {compiler})" in missing_compiler(torch.device(device))


def test_cuda_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in missing_compiler(torch.device("cuda"))


def test_a_compiler_needs_pythons_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in missing_compiler(torch.device("cpu"))
    (tmp_path / "Python.h").touch()
    assert missing_compiler(torch.device("cpu")) == ""
