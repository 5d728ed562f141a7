"""The gated activation, forward and every gradient, against fp64: odd sizes, strides, unwritten memory, inputs kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from rows import poison_empty

from torchft.kernels.swiglu import ACTIVATIONS, gated, swiglu, swiglu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 63), (37, 100), (3, 257), (1, 1000), (3, 2100)]  # 2100: a program each for 1024, 1024 and 52
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4}  # of the relative error; half of fp16's epsilon is 4.9e-4


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    poison_empty(monkeypatch)


def act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def problem(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up (T, 2F), dact (T, F)."""
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).mul_(3.0).to(dtype)
    return gate_up, torch.randn(rows, width, device=DEVICE).to(dtype)


def exact(
    gate_up: torch.Tensor, dact: torch.Tensor, activation: str, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(gate) up and d gate_up by autograd, in `dtype`."""
    inputs = gate_up.detach().to(dtype).requires_grad_()
    gate, up = inputs.chunk(2, dim=-1)
    out = act(gate, activation) * up
    return out.detach(), torch.autograd.grad(out, inputs, dact.to(dtype))[0]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def spread(tensor: torch.Tensor, gap: int = 5) -> torch.Tensor:
    """The same values, with `gap` NaNs behind each row."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + gap), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_equals_fp64(rows, width, dtype, activation, eager):
    gate_up, dact = problem(rows, width, dtype)
    copies = gate_up.clone(), dact.clone()
    out = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    again = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    assert swiglu(gate_up, out, activation=activation, eager=eager) is None
    grad = swiglu_backward(dact, gate_up, again, activation=activation, eager=eager)
    expected, expected_grad = exact(gate_up, dact, activation)
    assert error(out, expected) <= BOUNDS[dtype]
    assert error(grad, expected_grad) <= BOUNDS[dtype]
    assert grad.dtype == dtype and grad.is_contiguous()
    torch.testing.assert_close(again, out)
    assert torch.equal(gate_up, copies[0]) and torch.equal(dact, copies[1])


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_rows_are_read_and_written_within_themselves(activation, eager):
    gate_up, dact = problem(7, 130)
    expected = torch.empty(7, 130, device=DEVICE)
    swiglu(gate_up, expected, activation=activation, eager=eager)
    expected_grad = swiglu_backward(dact, gate_up, None, activation=activation, eager=eager)
    out, again = spread(expected * math.nan), spread(expected * math.nan)
    swiglu(gate_up, out, activation=activation, eager=eager)
    grad = swiglu_backward(spread(dact), gate_up, again, activation=activation, eager=eager)
    assert torch.equal(out, expected) and torch.equal(again, expected) and torch.equal(grad, expected_grad)
    for written in (out, again):
        assert written._base[:, 130:].isnan().all()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_gradient_may_take_the_place_of_the_inputs(dtype, eager):
    """Each element is read before it is written, in either twin: bit for bit what it is elsewhere."""
    gate_up, dact = problem(37, 1100, dtype)
    again = torch.empty(37, 1100, dtype=dtype, device=DEVICE)
    expected = swiglu_backward(dact, gate_up, again, eager=eager)
    grad = swiglu_backward(dact, gate_up, dact, inplace=True, eager=eager)
    assert grad is gate_up and torch.equal(grad, expected) and torch.equal(dact, again)


@pytest.mark.parametrize("eager", [False, True])
def test_extreme_gates_stay_finite(eager):
    for activation in ACTIVATIONS:
        gate = torch.tensor([[-65504.0, -200.0, -90.0, 0.0, 90.0, 200.0, 65504.0]], device=DEVICE)
        gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)
        out = torch.empty(1, 7, device=DEVICE)
        swiglu(gate_up, out, activation=activation, eager=eager)
        grad = swiglu_backward(torch.ones_like(gate), gate_up, None, activation=activation, eager=eager)
        expected, expected_grad = exact(gate_up, torch.ones_like(gate), activation)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("eager", [False, True])
def test_no_rows_and_no_columns(eager):
    for rows, width in ((0, 5), (5, 0)):
        gate_up, dact = problem(rows, width)
        swiglu(gate_up, torch.empty(rows, width, device=DEVICE), eager=eager)
        assert swiglu_backward(dact, gate_up, None, eager=eager).shape == (rows, 2 * width)
        gate, up = (dact.clone().requires_grad_() for _ in range(2))
        gated(gate, up, eager=eager).sum().backward()
        assert gate.grad.shape == up.grad.shape == (rows, width)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 100), (2, 3, 257), (63,)])
def test_the_leaf_and_both_gradients(shape, activation, eager):
    torch.manual_seed(0)
    gate, up = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    upstream = torch.randn(shape, device=DEVICE)
    got = gated(gate, up, activation=activation, eager=eager)
    exact_inputs = [x.detach().double().requires_grad_() for x in (gate, up)]
    expected = act(exact_inputs[0], activation) * exact_inputs[1]
    assert got.dtype == gate.dtype and got.is_contiguous()
    assert error(got, expected) <= 1e-6
    expected_grads = torch.autograd.grad(expected, exact_inputs, upstream.double())
    for one, other in zip(torch.autograd.grad(got, (gate, up), upstream, retain_graph=True), expected_grads, strict=True):
        assert error(one, other) <= 1e-6
    # Behind a sum the upstream gradient has strides of 0.
    summed = torch.autograd.grad(got.sum(), (gate, up))
    expected_grads = torch.autograd.grad((act(exact_inputs[0], activation) * exact_inputs[1]).sum(), exact_inputs)
    for one, other in zip(summed, expected_grads, strict=True):
        assert error(one, other) <= 1e-6


@pytest.mark.parametrize("eager", [False, True])
def test_the_leaf_takes_slices_of_one_tensor(eager):
    both = torch.randn(2, 5, 60, device=DEVICE, requires_grad=True)
    got = gated(both[..., :30], both[..., 30:], eager=eager)
    expected = F.silu(both[..., :30]) * both[..., 30:]
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(5, 2, 30, device=DEVICE).transpose(0, 1)
    torch.testing.assert_close(
        torch.autograd.grad(got, both, upstream)[0], torch.autograd.grad(expected, both, upstream)[0]
    )


def test_the_twins_agree_to_rounding():
    gate_up, dact = problem(37, 1000)
    for activation in ACTIVATIONS:
        results = []
        for eager in (False, True):
            out = torch.empty(37, 1000, device=DEVICE)
            swiglu(gate_up, out, activation=activation, eager=eager)
            results.append((out, swiglu_backward(dact, gate_up, None, activation=activation, eager=eager)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
def test_what_a_kernel_cannot_take_is_refused_by_name(eager):
    gate_up, dact = problem(4, 6)
    out = torch.empty(4, 6, device=DEVICE)
    refused = [
        ("gate_up", lambda: swiglu(gate_up[:, ::2], out[:, :3], eager=eager)),
        ("gate_up", lambda: swiglu(gate_up[:, :5], out, eager=eager)),
        ("gate_up", lambda: swiglu(gate_up.double(), out.double(), eager=eager)),
        ("out", lambda: swiglu(gate_up, out.T.contiguous().T, eager=eager)),
        ("out", lambda: swiglu(gate_up, out.half(), eager=eager)),
        ("out", lambda: swiglu(gate_up, out[:1].expand(4, 6), eager=eager)),
        ("out", lambda: swiglu(gate_up, out[:3], eager=eager)),
        ("dact", lambda: swiglu_backward(dact.T.contiguous().T, gate_up, None, eager=eager)),
        ("act_out", lambda: swiglu_backward(dact, gate_up, out[:, ::2], eager=eager)),
        ("activation", lambda: swiglu(gate_up, out, activation="relu", eager=eager)),
        ("up", lambda: gated(dact, dact.T.contiguous().T, eager=eager)),
        ("gate", lambda: gated(torch.randn(2, 3, 8, device=DEVICE).transpose(0, 1), gate_up, eager=eager)),
        ("up", lambda: gated(dact, dact.half(), eager=eager)),
    ]
    for name, call in refused:
        with pytest.raises(ValueError, match=f"^{name}( |:)"):
            call()


def test_without_triton_only_the_eager_twin_runs(monkeypatch):
    monkeypatch.setattr("torchft.kernels.launch.can_run", lambda tensor: False)
    gate_up, dact = problem(3, 8)
    for call in (lambda eager: swiglu_backward(dact, gate_up, None, eager=eager), lambda eager: gated(dact, dact, eager=eager)):
        call(True)
        with pytest.raises(ValueError, match="eager=True"):
            call(False)


@pytest.mark.parametrize("eager", [False, True])
def test_the_op_is_registered_whole(eager, monkeypatch):
    monkeypatch.undo()  # NaNs in its fake tensors would be unlike
    both = torch.randn(2, 3, 20, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.torchft.gated.default, (both[..., :10], both[..., 10:], "silu", eager))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [100, 8192, 14336, 28672, 53248])
def test_real_widths_lose_no_more_than_torch(width, dtype, activation):
    gate_up, dact = problem(128, width, dtype)
    out = torch.empty(128, width, dtype=dtype, device=DEVICE)
    swiglu(gate_up, out, activation=activation)
    got = (out, swiglu_backward(dact, gate_up, None, activation=activation))
    expected = exact(gate_up, dact, activation)
    for one, other, torchs in zip(got, expected, exact(gate_up, dact, activation, dtype), strict=True):
        assert error(one, other) <= max(1.2 * error(torchs, other), 1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_offsets_beyond_32_bits():
    """PITFALLS G1: 41,000 x 53,248 are 2.18e9 elements in each of the three tensors, gate_up has twice as many."""
    rows, width = 41_000, 53_248
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * width, dtype=torch.bfloat16, device=DEVICE)
    dact = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    assert out.numel() > 2**31
    swiglu(gate_up, out)
    again = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    grad = swiglu_backward(dact, gate_up, again)
    assert torch.equal(out, again)
    for start in range(0, rows, 1000):
        part = slice(start, start + 1000)
        expected, expected_grad = exact(gate_up[part], dact[part], "silu", torch.float32)
        assert error(out[part], expected.double()) <= 4e-3
        assert error(grad[part], expected_grad.double()) <= 4e-3
