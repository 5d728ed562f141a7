"""scripts/bench_kernels.py: what it refuses to time, what it reports as missing, and its shares; no time is measured."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_kernels
import kernel_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ["triton", "eager", "compile"]


def gated(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return F.silu(gate) * up


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is `value` in one row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_fill(0, torch.tensor([3], device=grad.device), ctx.value), None


def wrong_row(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return gated(gate, up) if eager else gated(gate, up).index_fill(0, torch.tensor([11], device=gate.device), 0.0)


def not_a_number(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return gated(gate, up) if eager else gated(gate, up).masked_fill(gate == gate.max(), float("nan"))


def wrong_gradient(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return gated(gate, up) if eager else WrongGradient.apply(gated(gate, up), 0.0)


def gradient_not_a_number(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return gated(gate, up) if eager else WrongGradient.apply(gated(gate, up), float("nan"))


def wrong_dtype(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    return gated(gate, up) if eager else gated(gate, up).double()


def raises(gate: Tensor, up: Tensor, eager: bool = False) -> Tensor:
    if not eager:
        raise RuntimeError("no such instruction\nand more")
    return gated(gate, up)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable) -> None:
    """A module of torchft.kernels that holds one function only."""
    module = ModuleType(f"torchft.kernels.{name}")
    setattr(module, kernel_cases.CASES[name][0], function)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "kernels.json"
    code = bench_kernels.main(["--tiny", "--json", str(path), *arguments])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_every_kernel_there_is_passes_its_check(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, found = run(tmp_path)
    assert code == 0, capsys.readouterr().out
    assert [r["variant"] for r in found["records"] if r["case"] == "nf4 128 x 384"] == VARIANTS
    names = {record["case"].split()[0] for record in found["records"]}
    functions = {function for name, (function, _) in kernel_cases.CASES.items() if name not in found["missing"]}
    if DEVICE == "cpu":  # Triton's interpreter cannot round to e4m3
        functions -= {"quantize_rows", "fp8_add_rms_norm"}
    assert names == {"nf4" if function == "dequantize_into" else function for function in functions}


def test_a_missing_kernel_is_reported_and_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchft.kernels.rope", None)  # an import finds nothing
    plant(monkeypatch, "swiglu", gated)
    code, found = run(tmp_path, "--only", "rope", "--only", "swiglu")
    assert code == 0 and found["missing"] == ["rope"]
    assert "rope: skipped, there is no kernels/rope.py" in capsys.readouterr().out
    assert [record["variant"] for record in found["records"]] == VARIANTS


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong_row, "differs from the eager twin"),
        (not_a_number, "differs from the eager twin by nan"),
        (wrong_gradient, "differs from the eager twin"),
        (gradient_not_a_number, "differs from the eager twin by nan"),
        (wrong_dtype, "differs from the eager twin by inf"),
        (raises, "RuntimeError: no such instruction"),
    ],
)
def test_a_wrong_result_is_refused(
    function: Callable, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    plant(monkeypatch, "swiglu", function)
    code, found = run(tmp_path, "--only", "swiglu")
    assert code == 1
    triton, *others = found["records"]
    assert triton["refused"].startswith(words) and not any("refused" in record for record in others)
    assert f"triton   REFUSED: {words}" in capsys.readouterr().out


def test_nf4_is_refused_for_one_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchft.kernels.nf4 import dequantize_into

    def one_off(*storage: Tensor, eager: bool) -> None:
        dequantize_into(*storage, eager=True)
        if not eager:
            weight = storage[-1].view(-1)
            weight[-1] = torch.nextafter(weight[-1], weight.new_tensor(9.0))

    plant(monkeypatch, "nf4", one_off)
    code, found = run(tmp_path, "--only", "nf4")
    assert code == 1 and ["refused" in record for record in found["records"]] == 2 * [True, False, False]


def test_a_refused_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "seconds", lambda run: 1e-3)
    (case,) = kernel_cases.swiglu(wrong_row, kernel_cases.tiny_size(DEVICE))
    refused, eager, compiled = bench_kernels.measure(case, 1e-4, {"bytes": 1e9, "flop": 1e12})
    assert "forward_ms" not in refused
    moved = 12 * 96 * 4  # bytes of one tensor, of which a pass in 1 ms could move 1e6
    for record in (eager, compiled):
        assert record["forward_ms"] == record["both_ms"] == 1.0
        assert record["forward_share"] == round(3 * moved / 1e6, 3) and record["both_share"] == round(8 * moved / 1e6, 3)
    assert "1.000 ms" in bench_kernels.line(eager)


def test_the_least_that_must_be_moved_or_multiplied() -> None:
    """Counted by hand."""
    size = kernel_cases.Size("cpu", compiled=lambda f: f, batch=1, seq=8, nf4=((1024, 4096),))
    (nf4,) = kernel_cases.nf4(gated, size)
    weights = 1024 * 4096
    assert nf4.least == (weights / 2 + weights / 64 + weights / 16384 * 2 + weights * 2, None)
    (rope,) = kernel_cases.rope(gated, size)
    assert rope.least[0] == 2 * (8 * 48 * 128 * 2) + 2 * (8 * 64 * 4) and rope.least[1] == 2 * rope.least[0]
    size = kernel_cases.tiny_size("cpu")
    frozen, trained = kernel_cases.linear_cross_entropy(gated, size)
    product = 2 * 10 * 64 * 130  # 10 of 12 tokens are supervised
    assert frozen.least == (product, 2 * product) and trained.least == (product, 3 * product)
    (adamw,) = kernel_cases.adamw(gated, size)
    assert adamw.least == (96 * 64 * 14, None)
    frozen, trained = kernel_cases.rms_norm(gated, size)
    assert frozen.least == trained.least == (2 * 12 * 64 * 4, 5 * 12 * 64 * 4)


def test_one_wrong_row_of_many_counts_whole() -> None:
    rows = torch.randn(1000, 64)
    rows[:10] *= 100
    rows[900:] = 0
    for row in (5, 500):
        wrong = rows.index_fill(0, torch.tensor([row]), 0.0)
        assert bench_kernels.error(wrong, rows) == pytest.approx(1.0)
    wrong = rows.index_fill(0, torch.tensor([950]), 0.1)  # where zeros belong
    assert bench_kernels.error(wrong, rows) > 1
    assert bench_kernels.error(rows.clone(), rows) == 0
    assert bench_kernels.error(torch.tensor(2.0), torch.tensor(4.0)) == 0.5  # a loss has no rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.main([])
    assert "no GPU to measure on" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_kernel_is_timed(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert bench_kernels.main(["--only", "nf4", "--json", str(path)]) == 0, capsys.readouterr().out
    found = json.loads(path.read_text())
    assert len(found["records"]) == 9 and all(0 < r["forward_share"] < 4 for r in found["records"])
