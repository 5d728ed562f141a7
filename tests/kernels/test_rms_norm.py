"""RMS norm: forward and every gradient against fp64, on odd sizes, strided rows and poisoned memory."""

import pytest
import torch
import torch.nn.functional as F
from rows import DEVICE, assert_rounded_once, distance, gaps_untouched, poisoned, spread, unchanged
from torch import Tensor

from torchft.kernels import rms_norm as file
from torchft.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward

EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
SIZES = [(rows, width) for rows in (1, 3, 37) for width in (1, 63, 100, 257, 1000)]
REAL = [(rows, width) for rows in (1, 4095) for width in (2048, 4096, 5120, 8192, 16384)]
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype)


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def gradients64(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    return torch.autograd.grad(norm64(x, weight), (x, weight), dy.double())


def terms64(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """r dy w, from which x's gradient subtracts nearly as much in narrow rows: all of it where D = 1."""
    return (dy.double() * norm64(x, weight).detach() / x.detach().double()).nan_to_num(0.0)


def rstd32(h: Tensor) -> Tensor:
    return torch.rsqrt(h.double().square().mean(-1) + EPS).float()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_forward(rows, width, dtype, with_delta, eager):
    h, weight = randn(rows, width, dtype=dtype), randn(width, dtype=dtype)
    delta = randn(rows, width, dtype=dtype) if with_delta else None
    out = spread(torch.full_like(h, torch.nan))
    with unchanged(h, delta, weight):
        if eager:
            h2, rstd = add_rms_norm(h, delta, weight, EPS, out, eager=True)
        else:
            with poisoned():
                h2, rstd = add_rms_norm(h, delta, weight, EPS, out)
    assert gaps_untouched(out)
    assert torch.equal(h2, h + delta) if with_delta else h2 is h
    assert_rounded_once(out, norm64(h2, weight))
    torch.testing.assert_close(rstd, rstd32(h2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("with_dh", "with_x"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_backward(rows, width, dtype, with_dh, with_x, eager):
    h2, weight, dx = randn(rows, width, dtype=dtype), randn(width, dtype=dtype), spread(randn(rows, width, dtype=dtype))
    dh = randn(rows, width, dtype=dtype) if with_dh else None
    x_out = spread(torch.full_like(h2, torch.nan)) if with_x else None
    rstd = rstd32(h2)
    with unchanged(dx, h2, rstd, weight, dh):
        if eager:
            grad = rms_norm_backward(dx, h2, rstd, weight, dh, x_out, eager=True)
        else:
            with poisoned():
                grad = rms_norm_backward(dx, h2, rstd, weight, dh, x_out)
    exact, _ = gradients64(h2, weight, dx)
    assert_rounded_once(grad, exact + dh.double() if with_dh else exact, terms64(h2, weight, dx))
    if with_x:
        assert gaps_untouched(x_out)
        assert_rounded_once(x_out, norm64(h2, weight))


@pytest.mark.parametrize("dy_kind", ["rows", "expanded", "transposed"])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 63), (2, 3, 100), (1000,)])
def test_op(shape, dtype, weight_dtype, dy_kind):
    x, weight = randn(*shape, dtype=dtype).requires_grad_(), randn(shape[-1], dtype=weight_dtype).requires_grad_()
    dy = randn(*shape, dtype=dtype)
    if dy_kind == "expanded":
        dy = randn(1, dtype=dtype).expand(shape)
    elif dy_kind == "transposed":
        dy = dy.mT.contiguous().mT if len(shape) > 1 else dy
    with unchanged(x, weight, dy), poisoned():
        y = rms_norm(x, weight, EPS)
        y.backward(dy)
    assert y.dtype == dtype and y.is_contiguous()
    assert_rounded_once(y, norm64(x, weight).detach())
    grad_x, grad_weight = gradients64(x, weight, dy)
    terms = terms64(x, weight, dy)
    assert_rounded_once(x.grad, grad_x, terms)
    assert_rounded_once(weight.grad, grad_weight, x * dy)
    eager = rms_norm(x, weight, EPS, eager=True)
    assert_rounded_once(eager, norm64(x, weight).detach())
    eager_x, eager_weight = torch.autograd.grad(eager, (x, weight), dy)
    assert_rounded_once(eager_x, grad_x, terms)
    assert_rounded_once(eager_weight, grad_weight, x * dy)


def test_no_rows():
    x, weight = randn(0, 8).requires_grad_(), randn(8).requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_wanted_gradient(wanted, monkeypatch):
    if not wanted[1]:
        monkeypatch.setattr(file, "_backward_with_weight", None)  # called, it would raise
    x, weight = randn(5, 33), randn(33)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    dy = randn(5, 33)
    rms_norm(x, weight, EPS).backward(dy)
    for leaf, exact, is_wanted in zip((x, weight), gradients64(x, weight, dy), wanted, strict=True):
        if is_wanted:
            assert_rounded_once(leaf.grad, exact)
        else:
            assert leaf.grad is None


def test_the_same_bits_each_time():
    x, weight, dy = randn(37, 100), randn(100), randn(37, 100)
    first = file._backward_with_weight(dy, x, rstd32(x), weight)
    second = file._backward_with_weight(dy, x, rstd32(x), weight)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_torch_library_agrees():
    x, weight = randn(3, 5, 24).requires_grad_(), randn(24).requires_grad_()
    torch.library.opcheck(torch.ops.torchft.rms_norm.default, (x, weight, EPS))
    rows, rstd = x.detach().view(-1, 24), rstd32(x.detach().view(-1, 24))
    for with_weight in (True, False):
        args = (randn(15, 24), rows, rstd, weight.detach(), with_weight)
        torch.library.opcheck(torch.ops.torchft.rms_norm_backward.default, args)


@pytest.mark.parametrize("dy_kind", ["rows", "expanded"])
def test_compiled_it_is_one_node(dy_kind):
    x, weight = randn(2, 5, 24).requires_grad_(), randn(24).requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        y = rms_norm(x * 1.0, weight, EPS)
        return y.sum() if dy_kind == "expanded" else y.square().sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(one, other)


def mistakes() -> list[tuple[str, dict[str, Tensor]]]:
    h = torch.zeros(4, 6)
    across = torch.zeros(6, 4).T  # (4, 6), last stride 4
    return [
        ("h", {"h": across}),
        ("h", {"h": torch.zeros(4, 9)[:, :6]}),
        ("delta", {"delta": h.half()}),
        ("delta", {"delta": torch.zeros(4, 9)[:, :6]}),
        ("weight", {"weight": torch.zeros(7)}),
        ("weight", {"weight": torch.zeros(12)[::2]}),
        ("out", {"out": across}),
        ("out", {"out": torch.zeros(1, 6).expand(4, 6)}),
        ("out", {"out": h.half()}),
        ("dx", {"dx": across}),
        ("h2", {"h2": torch.zeros(4, 9)[:, :6]}),
        ("rstd", {"rstd": torch.zeros(4).half()}),
        ("rstd", {"rstd": torch.zeros(8)[::2]}),
        ("dh", {"dh": across}),
        ("x_out", {"x_out": torch.zeros(1, 6).expand(4, 6)}),
        ("x_out", {"x_out": torch.zeros(5, 6)}),
    ]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("name", "wrong"), mistakes())
def test_a_wrong_argument_is_named(name, wrong, eager):
    h = torch.zeros(4, 6)
    forward = {"h": h, "delta": h, "weight": torch.zeros(6), "eps": EPS, "out": torch.zeros(4, 6)}
    backward = {"dx": h, "h2": h, "rstd": torch.zeros(4), "weight": torch.zeros(6), "dh": h, "x_out": torch.zeros(4, 6)}
    for function, arguments in ((add_rms_norm, forward), (rms_norm_backward, backward)):
        if wrong.keys() <= arguments.keys():
            with pytest.raises(ValueError, match=f"^{name}: "):
                function(**(arguments | wrong), eager=eager)


def test_the_op_refuses_what_it_would_have_to_copy():
    with pytest.raises(ValueError, match="^x: .*contiguous"):
        rms_norm(randn(4, 9)[:, :6], randn(6), EPS)
    with pytest.raises(ValueError, match="rows of 16385 elements"):
        rms_norm(randn(1, 16385), randn(16385), EPS)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    h, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="eager=True"):
        add_rms_norm(h, None, weight, EPS, torch.empty(2, 4))
    with pytest.raises(ValueError, match="eager=True"):
        rms_norm(h, weight, EPS)
    rms_norm(h, weight, EPS, eager=True)


def test_the_widest_row():
    h, weight, dy = randn(2, 16384).requires_grad_(), randn(16384).requires_grad_(), randn(2, 16384)
    y = rms_norm(h, weight, EPS)
    y.backward(dy)
    assert_rounded_once(y, norm64(h, weight).detach())
    for leaf, exact in zip((h, weight), gradients64(h, weight, dy), strict=True):
        assert_rounded_once(leaf.grad, exact)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), REAL)
def test_as_exact_as_pytorch(rows, width, dtype):
    h, delta, dy = (randn(rows, width, dtype=dtype) for _ in range(3))
    weight = (1 + 0.1 * randn(width)).to(dtype)
    out = torch.full_like(h, torch.nan)
    h2, rstd = add_rms_norm(h, delta, weight, EPS, out)
    assert torch.equal(h2, h + delta)
    x, w = h2.clone().requires_grad_(), weight.clone().requires_grad_()
    plain = F.rms_norm(x, (width,), w, EPS)
    plain_x, plain_weight = torch.autograd.grad(plain, (x, w), dy)
    exact_x, exact_weight = gradients64(h2, weight, dy)
    exact = norm64(h2, weight)
    y = rms_norm(x, w, EPS)
    op_x, op_weight = torch.autograd.grad(y, (x, w), dy)
    x_out = torch.full_like(h2, torch.nan)
    grad = rms_norm_backward(dy, h2, rstd, weight, None, x_out)
    small = 1e-6 if dtype == torch.float32 else 0.0  # there both are at fp32's limit
    for result, other, reference in (
        (out, plain, exact), (y, plain, exact), (x_out, plain, exact), (grad, plain_x, exact_x),
        (op_x, plain_x, exact_x), (op_weight, plain_weight, exact_weight),
    ):  # fmt: skip
        assert distance(result, reference) <= 1.2 * distance(other, reference) + small


@gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_31_elements():
    rows, width, chunk = 2**18 + 3, 8192, 2**14
    h = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    delta, dy = torch.empty_like(h).normal_(), torch.empty_like(h).normal_()
    weight = randn(width, dtype=torch.bfloat16)
    out, x_out = torch.full_like(h, torch.nan), torch.full_like(h, torch.nan)
    h2, rstd = add_rms_norm(h, delta, weight, EPS, out)
    grad = rms_norm_backward(dy, h2, rstd, weight, delta, x_out)
    op_grad, op_weight = file._backward_with_weight(dy, h2, rstd, weight)
    sum64 = torch.zeros(width, dtype=torch.float64, device="cuda")
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        assert torch.equal(h2[part], h[part] + delta[part])
        exact = norm64(h2[part], weight)
        exact_grad, exact_weight = gradients64(h2[part], weight, dy[part])
        sum64 += exact_weight
        assert_rounded_once(out[part], exact)
        assert_rounded_once(x_out[part], exact)
        assert_rounded_once(grad[part], exact_grad + delta[part].double())
        assert_rounded_once(op_grad[part], exact_grad)
    assert distance(op_weight, sum64) <= 4e-3  # bf16's rounding
