"""scripts/bench_attention.py: what it compares is one attention in several layouts, and a wrong one is refused; no time is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_attention


@pytest.mark.parametrize("layout", ["as RoPE leaves them", "heads first", "parts of one"])
def test_layouts_hold_the_same_values(layout: str) -> None:
    given = [torch.randn(2, heads, 6, 16) for heads in (4, 2, 2)]
    found = bench_attention.layouts(*given)[layout]
    assert all(torch.equal(x, y) for x, y in zip(found, given, strict=True))
    strides = {"as RoPE leaves them": (6 * 4 * 16, 16, 4 * 16, 1), "heads first": (4 * 6 * 16, 6 * 16, 16, 1), "parts of one": (6 * 8 * 16, 16, 8 * 16, 1)}
    assert found[0].stride() == strides[layout]


def test_a_wrong_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ways = bench_attention.ways(False)
    wrong = {"wrong": ("heads first", lambda q, k, v: ways["math"][1](q, k, v) + 0.01 * q)}
    wrong["fails"] = ("heads first", lambda q, k, v: q @ v)
    monkeypatch.setattr(bench_attention, "ways", lambda on_gpu: ways | wrong)
    assert bench_attention.main(["--tiny", "--json", str(tmp_path / "found.json")]) == 0
    found = {record["way"]: record for record in json.loads((tmp_path / "found.json").read_text())["records"]}
    assert list(found) == ["as the recipes", "math", "wrong", "fails"]
    assert "refused" not in found["math"] and found["math"]["error"] < 1e-5
    assert "differs" in found["wrong"]["refused"] and "Error" in found["fails"]["refused"]
    assert capsys.readouterr().out.count("REFUSED") == 2
