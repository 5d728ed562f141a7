"""Both head ops against fp64 autograd over the whole logits: chunks, dtypes, nothing supervised, inputs unwritten."""

import pytest
import torch
import torch.nn.functional as F

from torchft.modules.loss import IGNORE_INDEX, linear_cross_entropy, linear_logprobs

CHUNK_SIZES = [1, 3, 16, 37, 100]


def problem(
    num_tokens: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (N, 12), weight (29, 12), labels (N,) with a third of them ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(29, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(29, (num_tokens,))
    labels[::3] = IGNORE_INDEX
    return hidden, weight, labels


def exact_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-cross entropy per token, (N,) fp64, zero where ignored."""
    return -F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none", ignore_index=IGNORE_INDEX)


def assert_same_gradients(
    got: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...], bound: float
) -> None:
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (one - other).norm() <= bound * other.norm()


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_cross_entropy_equals_fp64_autograd(chunk_size):
    hidden, weight, labels = problem()
    got = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    expected = -exact_logprobs(hidden, weight, labels).sum()
    assert got.dtype == torch.float32 and got.shape == ()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    upstream = 0.37  # as a division by the number of supervised tokens brings it
    assert_same_gradients(got * upstream, expected * upstream, (hidden, weight), 1e-6)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_logprobs_equal_fp64_autograd(chunk_size):
    hidden, weight, labels = problem()
    got = linear_logprobs(hidden, weight, labels, chunk_size=chunk_size)
    expected = exact_logprobs(hidden, weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[::3], torch.zeros_like(got[::3]))
    upstream = torch.randn(37)  # G3: every token's own upstream gradient counts
    assert_same_gradients((got * upstream).sum(), (expected * upstream).sum(), (hidden, weight), 1e-6)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_capped_logits_equal_fp64_autograd(op, chunk_size):
    """Caps that logits of size 3.5 run into, so that the slope of the tanh matters."""
    hidden, weight, labels = problem()
    got = op(hidden, weight, labels, chunk_size=chunk_size, softcap=2.5).sum()
    logits = 2.5 * torch.tanh(hidden.double() @ weight.double().T / 2.5)
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    expected = expected if op is linear_cross_entropy else -expected
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    assert_same_gradients(got * 0.37, expected * 0.37, (hidden, weight), 1e-6)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_upstream_gradients_of_ignored_tokens_go_nowhere(op):
    hidden, weight, labels = problem()
    gradient = torch.autograd.grad(op(hidden, weight, labels).sum(), hidden)[0]
    assert torch.equal(gradient[::3], torch.zeros_like(gradient[::3]))
    assert (gradient[1] != 0).any()


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
@pytest.mark.parametrize("num_tokens", [5, 0])
def test_nothing_supervised_is_a_zero_connected_to_the_graph(op, num_tokens):
    """PITFALLS L3: a constant would make `backward` raise on one rank while the others wait."""
    hidden, weight, _ = problem(num_tokens)
    loss = op(hidden, weight, torch.full((num_tokens,), IGNORE_INDEX)).sum()
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_what_an_ignored_row_holds_does_not_matter(op):
    hidden, weight, labels = problem()
    clean = op(hidden, weight, labels).sum()
    clean_gradients = torch.autograd.grad(clean, (hidden, weight))
    poisoned = hidden.detach().clone()
    poisoned[::3] = float("nan")
    poisoned.requires_grad_()
    loss = op(poisoned, weight, labels).sum()
    assert torch.equal(loss, clean)
    for one, other in zip(torch.autograd.grad(loss, (poisoned, weight)), clean_gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_wanted_gradients_are_made(op, frozen):
    hidden, weight, labels = problem()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = op(hidden, weight, labels).sum()
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        wanted, other = (hidden, weight) if frozen == "weight" else (weight, hidden)
        assert wanted.grad is not None and other.grad is None


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hidden, weight, labels = problem()
    expected = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(torch, "expm1", None)  # a step of the gradient
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_inputs_are_not_written_and_backward_can_run_twice(op):
    hidden, weight, labels = problem()
    copies = [x.detach().clone() for x in (hidden, weight, labels)]
    loss = (op(hidden, weight, labels) * 3.0).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for tensor, copy in zip((hidden, weight, labels), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_weight_gradient_of_many_chunks_is_as_good_as_of_one(op):
    """PITFALLS G4: summed in bf16, 256 chunks lost 15 times as much as one."""
    torch.manual_seed(0)
    hidden = (torch.randn(1024, 16) + 1.0).bfloat16().requires_grad_()
    weight = (torch.randn(31, 16) * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(31, (1024,))
    exact = torch.autograd.grad(exact_logprobs(hidden, weight, labels).sum(), weight)[0].double()

    def error(chunk_size: int) -> float:
        loss = op(hidden, weight, labels, chunk_size=chunk_size).sum()
        gradient = torch.autograd.grad(loss, weight)[0].double()
        return (gradient.abs() - exact.abs()).norm().item()

    assert error(4) <= 1.5 * error(1024)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_a_head_trained_in_fp32_above_a_bf16_model(op):
    hidden, weight, labels = problem(dtype=torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = op(low, weight, labels).sum()
    expected = op(low, weight.detach().bfloat16(), labels).sum()
    assert torch.equal(loss, expected)
    loss.backward()
    assert weight.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_extreme_logits_stay_finite(op):
    hidden = torch.tensor([[200.0, -200.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    loss = op(hidden, weight, torch.tensor([2])).sum()
    assert loss.abs() == 400.0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_strided_inputs_and_32_bit_labels(op):
    hidden, weight, labels = problem()
    expected = op(hidden, weight, labels).sum()
    got = op(hidden.detach().T.contiguous().T.requires_grad_(), weight.T.contiguous().T, labels.int()).sum()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprobs])
def test_a_confident_tokens_gradient_survives_bf16(op):
    """p - 1 at p = 0.9995, where bf16's nearest probability is 1 and the gradient would be lost."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.625], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.autograd.grad(op(hidden, weight, torch.tensor([0])).sum(), weight)[0]
    expected = torch.autograd.grad(exact_logprobs(hidden, weight, torch.tensor([0])).sum(), weight)[0]
    torch.testing.assert_close(gradient.abs(), expected.abs(), rtol=1e-2, atol=0)
    assert expected[0].abs() < 1e-3
