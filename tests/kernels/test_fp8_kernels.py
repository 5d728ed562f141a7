"""FP8 rows and what is made of them, against PyTorch and fp64. On the CPU the kernels run in Triton's interpreter.

Its cast to e4m3 is wrong (it loses the carry into the exponent: 124.3 becomes 64, not 128; it rounds ties up; NaN becomes a
number), so that there the kernels write fp32 where they write e4m3 on a GPU: what is rounded is compared bit for bit, the
rounding itself is PyTorch's here, and the kernels' in the tests marked gpu.
"""

from collections.abc import Callable

import pytest
import torch
from rows import DEVICE, assert_rounded_once, distance, poisoned, spread, unchanged
from torch import Tensor

from torchft.kernels import fp8_linear, fp8_quantize
from torchft.kernels.fp8_quantize import quantize_rows, quantize_rows_eager
from torchft.kernels.fp8_rms_norm import fp8_add_rms_norm
from torchft.kernels.fp8_transpose import transpose
from torchft.kernels.lora_gate import Term, lora_gate, lora_gate_backward
from torchft.kernels.rms_norm import add_rms_norm
from torchft.modules import fp8

DTYPES = (torch.float32, torch.float16)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 in place of e4m3, kernel and twin."""
    monkeypatch.setattr(fp8_quantize, "DTYPE", torch.float32)


def rows(count: int, width: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, width, generator=generator)).to(dtype).to(DEVICE)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left.float(), right.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, width", [(1, 1), (5, 63), (3, 1000), (2, 1025), (0, 7)])
def test_rows_are_scaled_as_pytorch_does(
    count: int, width: int, dtype: torch.dtype, with_factor: bool, unrounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_quantize, "MAX_HELD", 512)  # wider rows are read twice
    monkeypatch.setattr(fp8_quantize, "PART", 256)
    x = spread(rows(count, width, dtype)) if count else rows(count, width, dtype)
    factor = torch.linspace(0.1, 30, width, device=DEVICE) if with_factor else None
    with unchanged(x, factor):
        found = quantize_rows(x, factor)
    same(found, quantize_rows_eager(x, factor))
    assert found[0].is_contiguous() and found[0].shape == (count, width)


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_rows_eager, fp8.quantize_rows])
def test_scales_are_the_quotient_rounded_once(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], unrounded: None) -> None:
    """Everywhere the same bits: on a GPU PyTorch divides by a number by multiplying with its inverse, which is rounded too."""
    x = rows(500, 3)
    assert torch.equal(quantize(x)[1], (x.abs().amax(1).double() / 448).float())  # fp64 has digits enough to round twice


def check_bound(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """3 bits of mantissa: half a unit of the last place is 2^-4 of a number, below 2^-6 it is 2^-10. (And fp32's rounding.)"""
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double()[:, None] * 2**-10)
    assert bool((error <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e5, 1e37])
def test_codes_are_as_close_as_e4m3_can_be(scale: float) -> None:
    x = rows(9, 4000, scale=scale)
    x[3] *= torch.logspace(-9, 0, 4000, device=DEVICE)
    codes, scales = quantize_rows(x, eager=True)
    assert codes.dtype == torch.float8_e4m3fn and bool(codes.float().isfinite().all())
    assert bool((codes.float().abs().amax(1) == 448).all())
    check_bound(x, codes, scales)
    assert (codes.double() * scales[:, None] - x.double()).norm() <= 0.03 * x.double().norm()  # 2^-4 / sqrt(3) / 1.4 on average


def test_rows_without_a_scale() -> None:
    """Zeros stay zeros; the largest number there is becomes no NaN; an infinity does, and is found by the step's check."""
    x = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [3.4e38, -3.4e38], [torch.inf, 1.0], [torch.nan, 1.0]])
    codes, scale = quantize_rows(x, eager=True)
    back = codes.float() * scale[:, None]
    assert torch.equal(back[0], torch.zeros(2)) and back[1].abs().max() <= 1e-30
    torch.testing.assert_close(back[2], x[2])
    assert bool(back[3].isnan().any()) and bool(back[4].isnan().any())


@pytest.mark.parametrize("shape", [(1, 1), (130, 5), (64, 256), (129, 300)])
def test_transpose(shape: tuple[int, int]) -> None:
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    out = transpose(x)
    assert out.dtype == x.dtype and out.is_contiguous() and torch.equal(out.view(torch.uint8), x.view(torch.uint8).T)
    assert torch.equal(transpose(x, eager=True).view(torch.uint8), out.view(torch.uint8))


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_codes_is_the_norm_and_its_codes(dtype: torch.dtype, with_delta: bool, unrounded: None) -> None:
    h, delta, weight = rows(5, 300, dtype), rows(5, 300, dtype, seed=1) if with_delta else None, rows(1, 300, seed=2)[0]
    with poisoned(), unchanged(h, delta, weight):
        h2, rstd, x, codes, scale = fp8_add_rms_norm(h, delta, weight, 1e-5)
    out = torch.empty_like(h)
    same((h2, rstd), add_rms_norm(h, delta, weight, 1e-5, out))
    same((x, codes, scale), (out, *quantize_rows_eager(out)))


GATES = [(1, 16, 4, 4, 4), (70, 40, 3, 0, 5), (65, 130, 17, 17, 0), (3, 129, 0, 0, 0)]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, width, rank_gate, rank_up, rank_down", GATES)
def test_gate_with_adapters(
    count: int, width: int, rank_gate: int, rank_up: int, rank_down: int, dtype: torch.dtype, eager: bool
) -> None:
    """Forward, both gradients and the activation once more, against fp64 of the operands as they are rounded."""
    gate_up, dact = rows(count, 2 * width, dtype), rows(count, width, dtype, seed=1)
    xa = rows(count, rank_gate + rank_up, dtype, seed=2)
    bg, bu, a = rows(width, rank_gate, seed=3), rows(width, rank_up, seed=4), rows(rank_down, width, seed=5)
    q = rows(count, rank_down, dtype, seed=6)
    gate, up, down = Term(xa[:, :rank_gate], bg), Term(xa[:, rank_gate:], bu), Term(q, a)
    with poisoned(), unchanged(gate_up, dact, xa, bg, bu, a, q):
        torch.empty(1, dtype=dtype, device=DEVICE)  # the twin allocates nothing by itself
        act = lora_gate(gate_up, gate, up, 1.5, eager=eager)
        grad, again = lora_gate_backward(dact, down, gate_up, gate, up, 1.5, eager=eager)
    base = gate_up.double().requires_grad_()
    exact = [term.x.double() @ (term.w * 1.5).to(dtype).double().T for term in (gate, up)]
    g, u = base[:, :width] + exact[0], base[:, width:] + exact[1]
    expected = g * torch.sigmoid(g) * u
    da = dact.double() + q.double() @ (a * 1.5).to(dtype).double()
    expected.backward(da)
    for found, wanted in ((act, expected.detach()), (again, expected.detach()), (grad, base.grad)):
        assert found.dtype == dtype
        assert_rounded_once(found, wanted)


def test_a_small_update_of_the_gate_is_not_rounded_away() -> None:
    """A tenth of a bf16 step of the base: one result in ten moves by a step, on average as far as in fp64. Added to the
    base and rounded there, it would be lost in all of them. (bf16 in the twin, since tl.dot is wrong in the interpreter.)"""
    gate_up = torch.cat([rows(256, 512, torch.bfloat16), torch.ones(256, 512, device=DEVICE).bfloat16()], dim=1)
    one, none = torch.ones(256, 1, device=DEVICE).bfloat16(), torch.zeros(512, 0, device=DEVICE)
    acts = [
        lora_gate(gate_up, Term(one, torch.full((512, 1), size, device=DEVICE)), Term(one[:, :0], none), 1.0, eager=DEVICE == "cpu")
        for size in (0.0, 2**-11)
    ]
    gate = gate_up[:, :512].double()
    exact = (torch.nn.functional.silu(gate + 2**-11) - torch.nn.functional.silu(gate)).sum()
    assert (acts[1].double() - acts[0].double()).sum().item() == pytest.approx(exact.item(), rel=0.1)


def test_refused() -> None:
    x = torch.randn(3, 8)
    for call, what in (
        (lambda: quantize_rows(x.T, eager=True), "x: a kernel needs"),
        (lambda: quantize_rows(x, torch.ones(7), eager=True), "factor"),
        (lambda: transpose(x), "matrix of bytes"),
        (lambda: lora_gate(x, Term(x[:, :2], x[:2]), Term(x[:, :2], x[:2]), 1.0, eager=True), "lora_gate"),
    ):
        with pytest.raises(ValueError, match=what):
            call()


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 1000, 4096, 14336, 28672, 57344])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_on_cuda_are_the_twins_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    """Those of the twin and of the plain module on the GPU, and those of the CPU."""
    x = rows(64, width, dtype)
    x[1], x[2, 0] = 0, torch.finfo(dtype).max
    x[3] *= torch.logspace(-6, 0, width, device=DEVICE).to(dtype)
    factor = torch.linspace(1e-4, 3e-4, width, device=DEVICE)
    for each in (None, factor):
        found = quantize_rows(x, each)
        same(found, quantize_rows_eager(x, each))
        same([part.cpu() for part in found], quantize_rows_eager(x.cpu(), None if each is None else each.cpu()))
    same(quantize_rows(x), fp8.quantize_rows(x))
    spoiled = rows(2, width, dtype)
    spoiled[0, 3], spoiled[1, 5] = torch.inf, torch.nan
    assert bool(quantize_rows(spoiled)[0].float().isnan().any(1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(333, 4096, 6144), (64, 14336, 4096), (1, 16, 32)])
def test_products_on_cuda_are_those_of_the_codes(shape: tuple[int, int, int]) -> None:
    """bf16's rounding, 2^-9 of a number, and the tensor cores' sums of 14 bits."""
    count, width, out = shape
    x, w = quantize_rows(rows(count, width, torch.bfloat16)), quantize_rows(rows(out, width, torch.bfloat16, seed=1))
    bias = rows(1, out, torch.bfloat16, seed=2)[0]
    y = fp8_linear.scaled_product(*x, *w, bias, torch.bfloat16)
    dense = [codes.double() * scale.double()[:, None] for codes, scale in (x, w)]
    assert distance(y, dense[0] @ dense[1].T + bias.double()) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_and_norm_on_cuda(dtype: torch.dtype) -> None:
    count, width, rank = 333, 14336, 16
    gate_up, dact, xa = rows(count, 2 * width, dtype), rows(count, width, dtype, seed=1), rows(count, 2 * rank, dtype, seed=2)
    bg, bu, a = rows(width, rank, seed=3), rows(width, rank, seed=4), rows(rank, width, seed=5)
    q = rows(count, rank, dtype, seed=6)
    terms = Term(xa[:, :rank], bg), Term(xa[:, rank:], bu)
    units = torch.finfo(dtype).eps
    results = [
        (
            lora_gate(gate_up, *terms, 0.5, eager=eager),
            *lora_gate_backward(dact, Term(q, a), gate_up, *terms, 0.5, eager=eager),
        )
        for eager in (False, True)
    ]
    for found, expected in zip(*results, strict=True):
        assert distance(found, expected.double()) <= max(units, 1e-5)
    h, delta, weight = rows(count, 4096, dtype), rows(count, 4096, dtype, seed=1), rows(1, 4096, seed=2)[0]
    h2, rstd, x, codes, scale = fp8_add_rms_norm(h, delta, weight, 1e-5)
    exact = torch.rsqrt((h + delta).double().square().mean(1) + 1e-5)
    # Not the bits of add_rms_norm's 1/rms: stores of one byte make a thread hold 16 numbers in place of 8 or 4, and the squares
    # are summed in another order: at most 24 roundings of 2^-24, of which the root takes half, its own and a quotient's of 2 steps.
    assert ((rstd.double() - exact) / exact).abs().max() <= 1e-6
    same((h2, x), (h + delta, (h2.float() * rstd[:, None] * weight).to(dtype)))
    same((codes, scale), quantize_rows_eager(x))
