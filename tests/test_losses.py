"""Every preference loss against its paper's formula in numpy fp64, over 1,000 batches, gradients by differences included."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torchft import losses
from torchft.config import PreferenceOptions
from torchft.losses import log1mexp, preference_loss

BATCHES, PAIRS = 1000, 8
Arrays = dict[str, np.ndarray]


def log_sigma(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigma(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigma(x))


def ratios(v: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return v["w"] - v["ref_w"], v["l"] - v["ref_l"]


def margin(v: Arrays) -> np.ndarray:
    return ratios(v)[0] - ratios(v)[1]


def log_odds(v: Arrays) -> np.ndarray:
    mean_w, mean_l = v["w"] / v["len_w"], v["l"] / v["len_l"]
    return mean_w - np.log(-np.expm1(mean_w)) - mean_l + np.log(-np.expm1(mean_l))


# name -> the options, and the paper's formula of log pi and log pi_ref
PAPERS: dict[str, tuple[PreferenceOptions, Callable[[Arrays], np.ndarray]]] = {
    "dpo": (PreferenceOptions(beta=0.1), lambda v: -log_sigma(0.1 * margin(v))),
    "cdpo": (
        PreferenceOptions(beta=0.3, label_smoothing=0.2),
        lambda v: -0.8 * log_sigma(0.3 * margin(v)) - 0.2 * log_sigma(-0.3 * margin(v)),
    ),
    "robust": (
        PreferenceOptions("robust", beta=0.3, label_smoothing=0.2),
        lambda v: (-0.8 * log_sigma(0.3 * margin(v)) + 0.2 * log_sigma(-0.3 * margin(v))) / 0.6,
    ),
    "ipo": (PreferenceOptions("ipo", beta=0.2), lambda v: (margin(v) - 1 / 0.4) ** 2),
    "hinge": (PreferenceOptions("hinge", beta=0.2), lambda v: np.maximum(0, 1 - 0.2 * margin(v))),
    "apo_zero": (PreferenceOptions("apo_zero"), lambda v: 1 - sigma(0.1 * ratios(v)[0]) + sigma(0.1 * ratios(v)[1])),
    "apo_down": (PreferenceOptions("apo_down"), lambda v: 1 + sigma(0.1 * ratios(v)[0]) - sigma(0.1 * margin(v))),
    "simpo": (
        PreferenceOptions("simpo", beta=2.0, gamma=0.5),
        lambda v: -log_sigma(2.0 * (v["w"] / v["len_w"] - v["l"] / v["len_l"]) - 0.5),
    ),
    "orpo": (PreferenceOptions("orpo", beta=0.25), lambda v: -v["w"] / v["len_w"] - 0.25 * log_sigma(log_odds(v))),
    "cpo": (PreferenceOptions("cpo", beta=0.1), lambda v: -log_sigma(0.1 * (v["w"] - v["l"])) - v["w"]),
    "dpo and sft": (PreferenceOptions(sft_weight=0.5), lambda v: -log_sigma(0.1 * margin(v)) - 0.5 * v["w"] / v["len_w"]),
}


def random_pairs(seed: int = 0) -> Arrays:
    """1,000 batches as fp64 of fp32 numbers: answers of 1 to 200 tokens, 0.02 to 6 nats each, log-ratios of up to 30."""
    rng = np.random.default_rng(seed)
    values: Arrays = {}
    for side in ("w", "l"):
        length = rng.integers(1, 200, (BATCHES, PAIRS))
        values[f"len_{side}"] = length.astype(np.float64)
        values[side] = -(length * rng.uniform(0.02, 6.0, length.shape)).astype(np.float32).astype(np.float64)
        values[f"ref_{side}"] = (values[side] + rng.normal(0, 10, length.shape)).astype(np.float32).astype(np.float64)
    return values


def tensors(v: Arrays) -> tuple[Tensor, Tensor, Tensor]:
    """policy, reference and lengths, (BATCHES, PAIRS, 2) fp32."""
    sides = [("w", "l"), ("ref_w", "ref_l"), ("len_w", "len_l")]
    return tuple(torch.from_numpy(np.stack([v[w], v[l]], -1)).float() for w, l in sides)


def relative(got: Tensor, expected: np.ndarray) -> float:
    """Largest error relative to max(1, |expected|)."""
    return float((np.abs(got.double().numpy() - expected) / np.maximum(1, np.abs(expected))).max())


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_and_its_gradient_are_the_papers(name: str) -> None:
    options, paper = PAPERS[name]
    values = random_pairs()
    policy, reference, lengths = tensors(values)
    policy.requires_grad_()
    needed = None if options.loss in losses.REFERENCE_FREE else reference
    references = [None] * BATCHES if needed is None else needed
    got = torch.stack([preference_loss(*batch, options) for batch in zip(policy, references, lengths, strict=True)])
    assert got.dtype == torch.float32 and got.shape == (BATCHES, PAIRS)
    assert relative(got.detach(), paper(values)) <= 1e-6
    gradient = torch.autograd.grad(got.sum(), policy)[0]
    step = 1e-4
    for column, side in enumerate("wl"):
        ends = [paper(values | {side: values[side] + sign * step}) for sign in (1, -1)]
        smooth = (ends[0] == 0) == (ends[1] == 0)  # hinge has a corner
        assert smooth.mean() > 0.99
        expected = np.where(smooth, (ends[0] - ends[1]) / (2 * step), gradient[..., column].double().numpy())
        assert relative(gradient[..., column], expected) <= 2e-6  # 1e-6 of ours, and the rounding of the differences


def test_dpo_begins_at_ln_2() -> None:
    policy = tensors(random_pairs())[0][0]
    for loss in ("sigmoid", "robust"):
        start = preference_loss(policy, policy.clone(), torch.ones_like(policy), PreferenceOptions(loss))
        assert (start - math.log(2)).abs().max() <= 1e-6


def test_no_loss_takes_a_gradient_through_the_reference() -> None:
    """Or asks for one where it needs none."""
    policy, reference, lengths = (tensor[0] for tensor in tensors(random_pairs()))
    for name, (options, _) in PAPERS.items():
        if options.loss in losses.REFERENCE_FREE:
            assert preference_loss(policy, None, lengths, options).isfinite().all(), name
        else:
            with pytest.raises(AssertionError):
                preference_loss(policy, None, lengths, options)


def test_log1mexp_is_exact_and_its_gradient_finite() -> None:
    """PITFALLS P4: log1p(-exp(x)) is -inf at x = -1e-8, and so is its gradient."""
    x = torch.cat([-torch.logspace(-12, 3, 400), torch.tensor([-0.6931, -0.69315, -0.0])]).requires_grad_()
    got = log1mexp(x)
    gradient = torch.autograd.grad(got.sum(), x)[0]
    exact = np.log(-np.expm1(np.minimum(x.detach().double().numpy(), -1e-12)))
    assert relative(got.detach(), exact) <= 1e-6
    assert got.isfinite().all() and gradient.isfinite().all()
    large = x.detach()[:320]  # from -1e-12 to -0.1; below, e^x / (e^x - 1) is compared absolutely
    assert (gradient[:320].double() * torch.expm1(-large.double()) + 1).abs().max() <= 1e-5
    exact = -1 / np.expm1(-x.detach().double().numpy()[320:400].clip(-500))
    assert np.abs(gradient.numpy()[320:400] - exact).max() <= 1e-6 * np.abs(exact).max()
    certain = torch.zeros(3, requires_grad=True)  # an answer of probability one
    loss = losses.orpo(certain, torch.full((3,), -0.5), 0.1).sum()
    assert torch.autograd.grad(loss, certain)[0].isfinite().all()


def test_kto_is_the_papers() -> None:
    v = random_pairs()
    r, kl = v["w"] - v["ref_w"], 1.7
    desirable = np.random.default_rng(1).random(r.shape) < 0.5
    value = np.where(desirable, 1.2 * sigma(0.1 * (r - kl)), 0.8 * sigma(0.1 * (kl - r)))  # v(x, y) of the paper
    expected = np.where(desirable, 1.2, 0.8) - value
    ratio = (torch.from_numpy(v["w"]).float() - torch.from_numpy(v["ref_w"]).float()).requires_grad_()
    got = losses.kto(ratio, torch.from_numpy(desirable), torch.tensor(kl), 0.1, (1.2, 0.8))
    assert relative(got.detach(), expected) <= 1e-6
    s = sigma(0.1 * (r - kl))
    gradient = torch.autograd.grad(got.sum(), ratio)[0]
    assert relative(gradient, np.where(desirable, -1.2, 0.8) * 0.1 * s * (1 - s)) <= 1e-6


def test_bradley_terry_is_the_papers() -> None:
    rng = np.random.default_rng(2)
    w, l = (rng.normal(0, 5, (BATCHES, PAIRS)).astype(np.float32) for _ in range(2))
    chosen, rejected = torch.from_numpy(w).requires_grad_(), torch.from_numpy(l)
    exact = [x.astype(np.float64) for x in (w, l)]
    got = losses.bradley_terry(chosen, rejected, 0.01)
    assert relative(got.detach(), -log_sigma(exact[0] - exact[1]) + 0.01 * (exact[0] + exact[1]) ** 2) <= 1e-6
    gradient = torch.autograd.grad(got.sum(), chosen)[0]
    assert relative(gradient, -sigma(exact[1] - exact[0]) + 0.02 * (exact[0] + exact[1])) <= 1e-6
