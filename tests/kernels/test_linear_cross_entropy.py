"""Both head ops against fp64 and against modules/loss.py: odd vocabularies, chunks, ignored rows, every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from rows import poison_empty

from torchft.kernels import linear_cross_entropy as kernel
from torchft.kernels.linear_cross_entropy import default_chunk_size, linear_cross_entropy, linear_logprobs
from torchft.modules import loss as plain
from torchft.modules.int8_head import quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARIES = [1, 7, 100, 1000, 5001]
OPS = [linear_cross_entropy, linear_logprobs]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    poison_empty(monkeypatch)


@pytest.fixture(params=[False, True], ids=["triton", "eager"])
def eager(request):
    return request.param


def problem(
    num_tokens: int = 37, vocabulary: int = 100, dtype: torch.dtype = torch.float32, width: int = 12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (N, D), weight (V, D), labels (N,) with a third of them ignored; the first and the last word occur."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (num_tokens,), device=DEVICE)
    labels[1:2], labels[2:3] = 0, vocabulary - 1
    labels[3::3] = plain.IGNORE_INDEX
    return hidden, weight, labels


def exact(op, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=plain.IGNORE_INDEX)
    return losses.sum() if op is linear_cross_entropy else -losses


def assert_same(got: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...], bound: float) -> None:
    """The results, and the gradients at a random upstream one (PITFALLS G3)."""
    assert got.dtype == torch.float32 and (got - expected).norm() <= bound * (1.0 + expected.norm())
    upstream = torch.rand_like(got) - 2.0
    grads = torch.autograd.grad(got, inputs, upstream)
    for one, other in zip(grads, torch.autograd.grad(expected, inputs, upstream.to(expected.dtype)), strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= bound * (other.norm() + 1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk_size", [16, 0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equals_fp64(op, vocabulary, chunk_size, dtype, eager):
    hidden, weight, labels = problem(vocabulary=vocabulary, dtype=dtype)
    copies = [x.detach().clone() for x in (hidden, weight, labels)]
    got = op(hidden, weight, labels, chunk_size=chunk_size, eager=eager)
    assert_same(got, exact(op, hidden, weight, labels), (hidden, weight), BOUNDS[dtype])
    assert all(torch.equal(x, copy) for x, copy in zip((hidden, weight, labels), copies, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_tokens", [1, 3, 37])
@pytest.mark.parametrize("vocabulary", [63, 1024, 2500])
def test_equals_the_plain_module_with_rows_of_several_blocks(op, vocabulary, num_tokens, eager, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_BLOCK", 1024)
    hidden, weight, labels = problem(num_tokens, vocabulary)
    got = op(hidden, weight, labels, chunk_size=16, eager=eager)
    expected = getattr(plain, op.__name__)(hidden, weight, labels)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert_same(got, expected, (hidden, weight), 2e-6)


@pytest.mark.parametrize("op", OPS)
def test_chunks_of_any_size_are_the_same(op, eager):
    hidden, weight, labels = problem()
    for chunk_size in (1, 3, 37, 100):
        got = op(hidden, weight, labels, chunk_size=chunk_size, eager=eager)
        assert_same(got, exact(op, hidden, weight, labels), (hidden, weight), 2e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_tokens", [5, 0])
def test_nothing_supervised_is_a_zero_connected_to_the_graph(op, num_tokens, eager):
    hidden, weight, _ = problem(num_tokens)
    labels = torch.full((num_tokens,), plain.IGNORE_INDEX, device=DEVICE)
    value = op(hidden, weight, labels, eager=eager)
    assert (value == 0).all() and not torch.signbit(value).any()
    value.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("op", OPS)
def test_what_an_ignored_row_holds_does_not_matter(op, eager):
    hidden, weight, labels = problem()
    poisoned = hidden.detach().clone()
    poisoned[3::3] = math.nan
    poisoned.requires_grad_()
    results = []
    for given in (hidden, poisoned):
        value = op(given, weight, labels, chunk_size=16, eager=eager)
        # An upstream gradient of an ignored token goes nowhere either.
        upstream = torch.ones_like(value).masked_fill_(labels == plain.IGNORE_INDEX, math.nan) if value.dim() else None
        results.append((value, *torch.autograd.grad(value, (given, weight), upstream)))
    assert all(torch.equal(clean, other) for clean, other in zip(*results, strict=True))
    assert torch.equal(results[0][1][3::3], torch.zeros_like(hidden[3::3]))


def test_the_kernel_keeps_nan_of_an_ignored_row_out_by_itself(eager):
    logits = torch.full((3, 70), math.nan, device=DEVICE)
    logits[1] = torch.randn(70, device=DEVICE)
    labels = torch.tensor([plain.IGNORE_INDEX, 4, plain.IGNORE_INDEX], device=DEVICE)
    expected = F.log_softmax(logits[1], dim=0)
    out = torch.full((3,), math.nan, device=DEVICE)
    kernel._logprobs(logits, labels, None, out, True, eager)
    torch.testing.assert_close(out, F.pad(expected[4:5], (1, 1)))
    gradient = expected.exp()
    gradient[4] -= 1.0
    torch.testing.assert_close(logits, torch.stack([gradient * 0.0, gradient, gradient * 0.0]))


def test_a_chunk_writes_only_its_own_rows_and_columns(eager):
    wide = torch.full((6, 90), 7.0, device=DEVICE)
    labels, out = torch.tensor([5, -100, 69, 0], device=DEVICE), torch.full((6,), 7.0, device=DEVICE)
    kernel._logprobs(wide[1:5, :70], labels, None, out[1:5], True, eager)
    assert (wide[[0, 5]] == 7.0).all() and (wide[:, 70:] == 7.0).all() and (out[[0, 5]] == 7.0).all()
    torch.testing.assert_close(wide[1:5, :70].sum(dim=1), torch.zeros(4, device=DEVICE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_wanted_gradients_are_made(op, frozen, eager):
    hidden, weight, labels = problem()
    both = torch.autograd.grad(op(hidden, weight, labels, eager=eager).sum(), (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = op(hidden, weight, labels, eager=eager).sum()
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert torch.equal(hidden.grad, both[0]) if frozen == "weight" else torch.equal(weight.grad, both[1])
        assert (weight if frozen == "weight" else hidden).grad is None


def test_no_gradient_is_computed_where_none_is_wanted(eager, monkeypatch):
    hidden, weight, labels = problem()
    expected = linear_cross_entropy(hidden, weight, labels, eager=eager)
    inner, asked = kernel._logprobs, []

    def spied(logits, labels, upstream, out, write_gradient, eager):
        asked.append(write_gradient)
        inner(logits, labels, upstream, out, write_gradient, eager)

    monkeypatch.setattr(kernel, "_logprobs", spied)
    assert torch.equal(linear_cross_entropy(hidden.detach(), weight.detach(), labels, eager=eager), expected)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, eager=eager), expected)
    assert asked == [False, False]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_below_a_frozen_weight_the_logits_are_made_once(vocabulary, dtype, eager, monkeypatch):
    hidden, weight, labels = problem(vocabulary=vocabulary, dtype=dtype)
    weight = weight.detach()
    inner, rows = kernel._logprobs, []
    monkeypatch.setattr(kernel, "_logprobs", lambda *args: rows.append(len(args[0])) or inner(*args))
    got = linear_logprobs(hidden, weight, labels, chunk_size=16, eager=eager)
    assert_same(got, exact(linear_logprobs, hidden, weight, labels), (hidden,), BOUNDS[dtype])
    assert sum(rows) == len(labels)  # backward included
    with torch.no_grad():
        assert torch.equal(linear_logprobs(hidden, weight, labels, chunk_size=16, eager=eager), got)


@pytest.mark.parametrize("op", OPS)
def test_backward_can_run_twice_and_refuses_a_second_order(op, eager):
    hidden, weight, labels = problem()
    loss = (op(hidden, weight, labels, eager=eager) * 3.0).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        grads = torch.autograd.grad((op(hidden, weight, labels, eager=eager) ** 2).sum(), hidden, create_graph=True)
        grads[0].sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_a_tied_weight_gets_both_gradients(op, eager):
    _, weight, labels = problem()
    ids = torch.arange(37, device=DEVICE) % 5
    got = op(weight[ids], weight, labels, chunk_size=16, eager=eager)
    assert_same(got, exact(op, weight[ids], weight, labels), (weight,), 2e-6)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_32_bit_labels(op, eager):
    hidden, weight, labels = problem()
    columns = hidden.detach().T.contiguous().T.requires_grad_()
    spread = torch.stack([labels.int(), labels.int() * 0], dim=1)[:, 0]
    got = op(columns, weight.T.contiguous().T, spread, eager=eager)
    expected = op(hidden, weight, labels, eager=eager)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x.sum(), h)[0] for x, h in ((got, columns), (expected, hidden))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", OPS)
def test_extreme_logits_stay_finite(op, eager):
    hidden = torch.tensor([[200.0, -200.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=DEVICE, requires_grad=True)
    loss = op(hidden, weight, torch.tensor([2], device=DEVICE), eager=eager).sum()
    assert loss.abs() == 400.0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))
    low = op(-hidden.abs(), weight.abs(), torch.tensor([2], device=DEVICE), eager=eager).sum()  # all of them are -200
    torch.testing.assert_close(low.abs(), torch.tensor(math.log(3), device=DEVICE))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_confident_tokens_gradient_survives(op, dtype, eager):
    """p - 1 where the dtype's nearest probability is 1 and the gradient would be lost."""
    hidden = torch.ones(1, 1, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[9.5], [0.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0], device=DEVICE)
    gradient = torch.autograd.grad(op(hidden, weight, labels, eager=eager).sum(), weight)[0]
    expected = torch.autograd.grad(exact(op, hidden, weight, labels).sum(), weight)[0]
    # The kernel's is as exact as fp32 allows; that of PyTorch's fp32 log-probability, 1 - 7.5e-5 rounded, to 1e-3.
    bound = 1e-5 if dtype == torch.float32 and not eager else 1e-2
    torch.testing.assert_close(gradient, expected, rtol=bound, atol=0)
    assert 0 < expected[0].abs() < 1e-4


@pytest.mark.parametrize("op", OPS)
def test_a_head_trained_in_fp32_above_a_16_bit_model(op, eager):
    hidden, weight, labels = problem()
    low = hidden.detach().half().requires_grad_()
    got = op(low, weight, labels, chunk_size=16, eager=eager)
    assert torch.equal(got, op(low, weight.detach().half(), labels, chunk_size=16, eager=eager))
    got.sum().backward()
    assert weight.grad.dtype == torch.float32 and low.grad.dtype == torch.float16


def test_the_weights_gradient_of_many_chunks_is_as_good_as_of_one(eager):
    """PITFALLS G4: summed in 16 bits it would lose more with each chunk."""
    torch.manual_seed(0)
    hidden = (torch.randn(256, 16, device=DEVICE) + 1.0).half()
    weight = (torch.randn(31, 16, device=DEVICE) * 0.1).half().float().requires_grad_()
    labels = torch.randint(31, (256,), device=DEVICE)
    expected = torch.autograd.grad(exact(linear_cross_entropy, hidden, weight, labels), weight)[0]

    losses = [linear_cross_entropy(hidden, weight, labels, chunk_size=size, eager=eager) for size in (4, 256)]
    many, one = ((torch.autograd.grad(loss, weight)[0] - expected).norm() for loss in losses)
    assert many <= 1.5 * one


def test_a_label_beyond_the_vocabulary_is_loud_and_reads_nothing():
    hidden, weight, labels = problem()
    labels[0], labels[1] = 100, -7
    logprobs = linear_logprobs(hidden, weight, labels)
    assert logprobs[:2].isnan().all() and not logprobs[2:].isnan().any()


def test_the_chunk_is_chosen_by_vocabulary_and_dtype_alone():
    bf16 = {7: 2048, 32_000: 2048, 128_256: 512, 262_144: 256, 1_000_000: 128}
    assert {size: default_chunk_size(size, torch.bfloat16) for size in bf16} == bf16
    assert default_chunk_size(262_144, torch.float32) == 128


def test_wrong_arguments_are_refused_by_name(eager):
    hidden, weight, labels = problem()
    refused = [
        ("hidden, weight", (hidden, weight[:, :5], labels), {}),
        ("hidden, weight", (hidden[None], weight, labels), {}),
        ("labels", (hidden, weight, labels[:5]), {}),
        ("labels", (hidden, weight, labels.float()), {}),
        ("hidden", (hidden.double(), weight, labels), {}),
        ("chunk_size", (hidden, weight, labels), {"chunk_size": -1}),
    ]
    for op in OPS:
        for name, inputs, options in refused:
            with pytest.raises(ValueError, match=f"^{name}:"):
                op(*inputs, **options, eager=eager)


def test_without_triton_only_the_eager_twin_runs(monkeypatch):
    monkeypatch.setattr("torchft.kernels.launch.can_run", lambda tensor: False)
    for op in OPS:
        op(*problem(), eager=True).sum().backward()
        with pytest.raises(ValueError, match="eager=True"):
            op(*problem())


def test_the_ops_are_registered_whole(eager, monkeypatch):
    monkeypatch.undo()  # NaNs in their fake tensors would be unlike
    ops, inputs = torch.ops.torchft, problem(5, 10)
    for wanted in ([True, True], [False, True], [True, False]):
        given = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=False)]
        torch.library.opcheck(ops.linear_cross_entropy.default, (*given, None, inputs[2], 3, wanted, eager))
        assert not any(x.requires_grad for x in ops.linear_cross_entropy(*given, None, inputs[2], 3, wanted, eager)[1:])
    torch.library.opcheck(ops.linear_logprobs.default, (*inputs[:2], None, inputs[2], 3, False, eager))
    torch.library.opcheck(ops.linear_logprobs.default, (inputs[0], inputs[1].detach(), None, inputs[2], 3, True, eager))
    in_8_bits = (inputs[0], *quantize_rows(inputs[1].detach()), inputs[2], 3)
    torch.library.opcheck(ops.linear_cross_entropy.default, (*in_8_bits, [True, False], eager))
    torch.library.opcheck(ops.linear_logprobs.default, (*in_8_bits, True, eager))
