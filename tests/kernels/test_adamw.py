"""The bf16 AdamW update: kernel and twin bit for bit, each result beside the exact one, rounding without bias."""

import math

import pytest
import torch
from rows import DEVICE
from torch import Tensor

from torchft.kernels import adamw
from torchft.kernels.adamw import Rule, adamw_

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of log(0) and NaN in the interpreter

GO = torch.zeros((), device=DEVICE)
STOP = torch.ones((), device=DEVICE)
RULE = Rule(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
NAMES = ("param", "exp_avg", "exp_avg_sq")


def number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def problem(*shape: int, grad_dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Parameter, gradient and moments, as after some steps."""
    torch.manual_seed(0)
    param, grad, first, second = torch.randn(4, *shape, device=DEVICE)
    return [(0.02 * param).bfloat16(), grad.to(grad_dtype), (0.3 * first).bfloat16(), second.square().bfloat16()]


def update(tensors: list[Tensor], rule: Rule = RULE, place: tuple = (1, 2, 0), step: int = 3, **options) -> list[Tensor]:
    """New parameter and moments; what was given stays as it is."""
    copies = [tensor.clone() for tensor in tensors]
    adamw_(tuple(copies), number(float(step)), rule, place, **{"found_inf": GO} | options)
    assert torch.equal(copies[1].view(torch.uint8), tensors[1].view(torch.uint8))
    return [copies[0], *copies[2:]]


def exact(tensors: list[Tensor], rule: Rule = RULE, step: int = 3, clip: float = 1.0) -> list[Tensor]:
    """The formula in fp64."""
    param, grad, first, second = (tensor.double() for tensor in tensors)
    first = rule.betas[0] * first + (1 - rule.betas[0]) * clip * grad
    second = rule.betas[1] * second + (1 - rule.betas[1]) * (clip * grad) ** 2
    direction = first / (1 - rule.betas[0] ** step) / ((second / (1 - rule.betas[1] ** step)).sqrt() + rule.eps)
    return [param * (1 - rule.lr * rule.weight_decay) - rule.lr * direction, first, second]


def unit(x: Tensor) -> Tensor:
    """The distance of bf16 numbers at |x|: 8 significant bits."""
    return torch.exp2(x.abs().clamp_min(2.0**-126).log2().floor() - 7)


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (1023,), (37, 100), (3, 2100)])
def test_kernel_and_twin_give_the_same_bits(shape, grad_dtype, monkeypatch):
    tensors = problem(*shape, grad_dtype=grad_dtype)
    for clip, place, step, large in [
        (None, (0, 0, 0), 1, 2**20),
        (number(0.37), (2**63 - 1, 7, 2**32 - 50), 1000, 1),  # the elements' numbers cross 2^32; one program of 8 blocks
    ]:
        monkeypatch.setattr(adamw, "LARGE", large)
        kernel, twin = (update(tensors, place=place, step=step, clip=clip, eager=eager) for eager in (False, True))
        assert same_bits(kernel, twin)


@pytest.mark.parametrize("rule", [Rule(1e-2, (0.0, 0.0), 1e-30, 0.0), Rule(0.0, (0.5, 0.99), 1.0, 10.0)])
def test_the_ends_of_the_options_agree_too(rule):
    tensors = problem(5, 300)
    kernel, twin = (update(tensors, rule, eager=eager) for eager in (False, True))
    assert same_bits(kernel, twin)
    assert all(tensor.isfinite().all() for tensor in kernel)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("step", [1, 3, 5000])
def test_every_result_is_a_neighbour_of_the_exact_one(step, eager):
    """Rounded down or up by less than one unit, never further, but for what fp32 itself loses."""
    tensors = problem(20, 100, grad_dtype=torch.float32)
    results = update(tensors, step=step, clip=number(0.5), eager=eager)
    ups = 0
    for name, got, expected in zip(NAMES, results, exact(tensors, step=step, clip=0.5), strict=True):
        off = (got.double() - expected) / unit(expected)
        assert off.abs().max() < 1 + 1e-2, name  # fp32 loses 2^-24 of the terms, which is more where they cancel
        ups += (off > 0.5).sum()
    assert ups > 100  # it is no rounding to the nearest


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("fraction", [1 / 64, 0.5, 0.8])
def test_the_rounding_has_no_bias(fraction, eager):
    """The share rounded up is the fraction of a unit that bf16 cannot hold: within 5 standard deviations of n draws."""
    n = 8192
    exact_value = 1 + fraction / 128  # between 1 and the next bf16 number
    for sign in (1, -1):
        zeros = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
        grad = torch.full((n,), sign * exact_value, device=DEVICE)
        # betas 0: m is g; v is g^2; the parameter, 0, becomes -lr g / |g|
        results = update([zeros, grad, zeros, zeros], Rule(exact_value, (0.0, 0.0), 0.0, 0.0), eager=eager)
        for name, got, value in zip(NAMES, results, (-sign * exact_value, sign * exact_value, exact_value**2), strict=True):
            grain = 1 / 128 if abs(value) < 2 else 1 / 64
            expected = abs(value) / grain % 1
            low = math.floor(abs(value) / grain) * grain
            up = got.double().abs() > low
            assert set(got.double().abs().unique().tolist()) == {low, low + grain}, name
            assert abs(up.double().mean().item() - expected) <= 5 * math.sqrt(expected * (1 - expected) / n), name


def test_random_bits_are_independent_of_each_other():
    """Of neighbours, steps, tensors, seeds, and of parameter and moments: correlations below 5 / sqrt(n)."""
    n = 2**16
    zeros = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)

    def ups(**where) -> list[Tensor]:
        grad = torch.full((n,), 1 + 0.5 / 128, device=DEVICE)
        results = update([zeros, grad, zeros, zeros], Rule(1 + 0.5 / 128, (0.0, 0.0), 0.0, 0.0), eager=True, **where)
        return [(tensor.float().abs() > middle).float() - 0.5 for tensor, middle in zip(results, (1, 1, 1.0078), strict=True)]

    base = ups()
    others = [ups(step=4)[0], ups(place=(1, 3, 0))[0], ups(place=(2, 2, 0))[0], ups(place=(1 + 2**32, 2, 0))[0]]
    others += [ups(place=(1, 2, 2**32))[0], base[1], base[2], base[0].roll(1), base[0].roll(2), base[0].roll(1024)]
    for other in others:
        assert abs((base[0] * other).mean().item() * 4) <= 5 / math.sqrt(n)
    assert abs((base[1] * base[2]).mean().item() * 4) <= 5 / math.sqrt(n)
    assert same_bits([x.bfloat16() for x in base], [x.bfloat16() for x in ups()])


def test_every_word_is_as_frequent():
    """The 16 random bits behind each of the three tensors, in 256 classes by their high and by their low byte: chi^2 of 255
    degrees of freedom stays below 255 + 6 sqrt(2 255)."""
    n = 2**16
    words: list[Tensor] = []
    original = adamw._eager_rounded
    adamw._eager_rounded = lambda x, random: words.append(random) or original(x, random)
    try:
        update(problem(n), eager=True)
    finally:
        adamw._eager_rounded = original
    assert len(words) == 3
    for word in words:
        assert 0 <= word.min() and word.max() < 2**16
        for byte in (word >> 8, word & 255):
            counts = torch.bincount(byte, minlength=256).double()
            assert ((counts - n / 256) ** 2 / (n / 256)).sum() <= 255 + 6 * math.sqrt(2 * 255)


@pytest.mark.parametrize("eager", [False, True])
def test_a_part_gets_the_bits_of_the_whole(eager):
    tensors = problem(11, 130)
    whole = update(tensors, eager=eager)
    first = update([tensor[:4] for tensor in tensors], eager=eager)
    second = update([tensor[4:] for tensor in tensors], place=(1, 2, 4 * 130), eager=eager)
    assert same_bits(whole, [torch.cat(pair) for pair in zip(first, second, strict=True)])


def test_the_twin_takes_long_tensors_in_pieces(monkeypatch):
    tensors = problem(5, 101)
    whole = update(tensors, eager=True)
    monkeypatch.setattr(adamw, "PIECE", 64)
    assert same_bits(whole, update(tensors, eager=True))


@pytest.mark.parametrize("eager", [False, True])
def test_found_inf_leaves_everything(eager):
    tensors = problem(3, 500)
    tensors[1][1, 7] = math.nan
    assert same_bits(update(tensors, found_inf=STOP, eager=eager), [tensors[0], *tensors[2:]])


@pytest.mark.parametrize("eager", [False, True])
def test_what_is_not_finite_stays_so(eager):
    """A NaN whose bits are all ones, as GPUs make them, would become -0 by the carry."""
    tensors = problem(6, grad_dtype=torch.float32)
    tensors[1].copy_(torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1.0, 1.0]))
    tensors[1].view(torch.int32)[0] = 0x7FFFFFFF
    tensors[0][3] = -math.inf
    param, first, second = update(tensors, eager=eager)
    assert param[:3].isnan().all() and param[3] == -math.inf and param[4:].isfinite().all()
    assert first[0].isnan() and first[1] == math.inf and first[2] == -math.inf and first[3:].isfinite().all()
    assert second[0].isnan() and (second[1:3] == math.inf).all() and second[3:].isfinite().all()


@pytest.mark.parametrize("eager", [False, True])
def test_nothing_at_all(eager):
    assert [tensor.numel() for tensor in update(problem(0, 5), eager=eager)] == [0, 0, 0]


def test_what_a_kernel_cannot_take_is_refused_by_name(monkeypatch):
    good = problem(4, 6)
    refused = {
        "param": [good[0].float(), *good[1:]],
        "grad": [good[0], good[1].T.contiguous().T, *good[2:]],
        "exp_avg": [*good[:2], good[2][:3], good[3]],
        "exp_avg_sq": [*good[:3], good[3].half()],
    }
    for name, tensors in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            update(tensors)
    with pytest.raises(ValueError, match="^grad: "):
        update([good[0], good[1].double(), *good[2:]])
    with pytest.raises(ValueError, match="^clip: "):
        update(good, clip=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="^found_inf: "):
        update(good, found_inf=GO.double())
    monkeypatch.setattr("torchft.kernels.launch.can_run", lambda tensor: False)
    update(good, eager=True)
    with pytest.raises(ValueError, match="eager=True"):
        update(good)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_kernel_and_twin_give_the_same_bits_at_real_sizes(grad_dtype):
    tensors = problem(2048, 8192, grad_dtype=grad_dtype)
    for clip in (None, number(0.37)):
        assert same_bits(*(update(tensors, clip=clip, eager=eager) for eager in (False, True)))


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_offsets_beyond_32_bits():
    """PITFALLS G1: 2^31 + 5,000 elements; the last ones get the bits that they get as a part of their own."""
    count, tail = 2**31 + 5000, 6000
    tensors = [torch.zeros(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    end = problem(tail)
    for tensor, values in zip(tensors, end, strict=True):
        tensor[-tail:] = values
    adamw_(tuple(tensors), number(3.0), RULE, (1, 2, 0), found_inf=GO)
    expected = update(end, place=(1, 2, count - tail), eager=True)
    assert same_bits([tensors[0][-tail:], *(t[-tail:] for t in tensors[2:])], expected)
