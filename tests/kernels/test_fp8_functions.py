"""The FP8 functions of the fused block, their values and gradients, against fp64 of the same quantised maths."""

from collections.abc import Callable

import pytest
import torch
from rows import distance, unchanged
from test_fp8_kernels import check_bound, rows
from torch import Tensor

from torchft.kernels import fp8_linear, fp8_quantize, fp8_rms_norm
from torchft.kernels.fp8_mlp import Mlp, fp8_mlp
from torchft.kernels.fp8_norm_linear import fp8_norm_linear
from torchft.kernels.fp8_quantize import quantize_rows_eager
from torchft.kernels.fp8_transpose import transpose

PLAIN = "fp8 rms_norm swiglu"


class Exact(torch.autograd.Function):
    """The base product in fp64, on the codes that ours used."""

    @staticmethod
    def forward(ctx: object, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return as_recorded(x) @ (codes.double() * scale.double()[:, None]).T

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        return as_recorded(dy * scale) @ codes.double(), None, None


RECORDED: list[tuple[Tensor, Tensor]] = []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantised is kept, since fp32 and fp64 may fall on two sides of a tie, with a code's step between them."""
    RECORDED.clear()

    def record(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        RECORDED.append(quantize_rows_eager(x, factor))
        return RECORDED[-1]

    for module in (fp8_quantize, fp8_rms_norm):
        monkeypatch.setattr(module, "quantize_rows_eager", record)


def as_recorded(x: Tensor) -> Tensor:
    """x as ours rounded it: the nearest of what was quantised, which must be its rounding."""
    alike = [codes.double() * scale.double()[:, None] for codes, scale in RECORDED if codes.shape == x.shape]
    index = min(range(len(alike)), key=lambda i: distance(alike[i], x))
    codes, scale = [pair for pair in RECORDED if pair[0].shape == x.shape][index]
    check_bound(x, codes, scale)
    return alike[index]


def group(width: int, outs: tuple[int, ...], ranks: tuple[int, ...], apart: bool, seed: int) -> fp8_linear.Fp8Group:
    """`apart`: weights one by one and no kept transpose, as FSDP2 and recomputed blocks have it."""
    parts = [quantize_rows_eager(rows(out, width, scale=0.3, seed=seed + i).cpu()) for i, out in enumerate(outs)]
    stacked = fp8_linear.above_each_other([codes for codes, _ in parts])
    weights, flipped = ([codes for codes, _ in parts], None) if apart else ([stacked], transpose(stacked, eager=True))
    a = [rows(rank, width, scale=0.2, seed=seed + 10 + i).cpu().requires_grad_() for i, rank in enumerate(ranks)]
    pairs = enumerate(zip(outs, ranks, strict=True))
    b = [rows(out, rank, scale=0.2, seed=seed + 20 + i).cpu().requires_grad_() for i, (out, rank) in pairs]
    base = weights, torch.cat([scale for _, scale in parts]), flipped, torch.ones(width)
    return fp8_linear.with_adapters(base, a, b, 1.5, torch.float32)


def exact_linear(x: Tensor, g: fp8_linear.Fp8Group, leaves: list[Tensor]) -> Tensor:
    codes = fp8_linear.above_each_other(g.weights)
    a, b = leaves[: len(g.a)], leaves[len(g.a) :]
    added = [1.5 * (x @ part.T) @ other.T for part, other in zip(a, b, strict=True)]
    return Exact.apply(x, codes, g.row_scale) + torch.cat(added, dim=1)


def twins(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compare(run: Callable, exact: Callable, inputs: list[Tensor], groups: list[fp8_linear.Fp8Group]) -> None:
    """Outputs and the gradients of all inputs and adapters. On the same codes, what is left is fp32's rounding."""
    leaves = [inputs, *([*g.a, *g.b] for g in groups)]
    doubles = [twins(*each) for each in leaves]
    found, expected = run(*inputs), exact(*doubles[0], *doubles[1:])
    found, expected = ((each,) if isinstance(each, Tensor) else each for each in (found, expected))
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(9)) for y in found]
    with unchanged(*(leaf for each in leaves for leaf in each)):
        torch.autograd.backward(found, upstream)
    torch.autograd.backward(expected, [each.double() for each in upstream])
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours.detach(), theirs.detach()) <= 2e-6
    for ours, theirs in zip([x for each in leaves for x in each], [x for each in doubles for x in each], strict=True):
        assert ours.numel() == 0 or distance(ours.grad, theirs.grad) <= 5e-6


def leaf(count: int, width: int, seed: int) -> Tensor:
    return rows(count, width, seed=seed).cpu().requires_grad_()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("outs, ranks", [((48,), (4,)), ((32, 16, 16), (3, 0, 5)), ((16,), (0,))])
def test_linear_in_fp64s_terms(outs: tuple[int, ...], ranks: tuple[int, ...], apart: bool, recorded: None) -> None:
    g = group(64, outs, ranks, apart, seed=50)
    run, exact = (lambda x: fp8_linear.fp8_linear(x, g, None, PLAIN)), (lambda x, leaves: exact_linear(x, g, leaves))
    compare(run, exact, [leaf(11, 64, 1)], [g])


def exact_norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


def test_norm_and_linear_in_fp64s_terms(recorded: None) -> None:
    g = group(64, (32, 16, 16), (4, 4, 4), False, seed=60)
    norm, bias = rows(1, 64, seed=3)[0].cpu(), rows(1, 64, seed=4)[0].cpu()

    def exact(h: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        return 1.0 * h, exact_linear(exact_norm(h, norm), g, leaves) + bias.double()

    compare(lambda h: fp8_norm_linear(h, norm, 1e-5, g, bias, PLAIN), exact, [leaf(11, 64, 1)], [g])


@pytest.mark.parametrize("ranks", [(4, 4, 4), (0, 3, 5), (3, 0, 0)])
def test_mlp_in_fp64s_terms(ranks: tuple[int, int, int], recorded: None) -> None:
    wide, down = group(64, (96, 96), ranks[:2], False, seed=70), group(96, (64,), ranks[2:], True, seed=80)
    norm = rows(1, 64, seed=3)[0].cpu()
    biases = rows(1, 192, seed=4)[0].cpu(), rows(1, 64, seed=5)[0].cpu()
    mlp = Mlp(norm, 1e-5, wide, biases[0], down, biases[1], PLAIN)

    def exact(h: Tensor, delta: Tensor, first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, Tensor]:
        total = h + delta
        gate, up = (exact_linear(exact_norm(total, norm), wide, first) + biases[0].double()).chunk(2, dim=1)
        return total, exact_linear(gate * torch.sigmoid(gate) * up, down, second) + biases[1].double()

    compare(lambda h, delta: fp8_mlp(h, delta, mlp), exact, [leaf(11, 64, 1), leaf(11, 64, 2)], [wide, down])
