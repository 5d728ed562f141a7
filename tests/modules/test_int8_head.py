"""A head in 8 bits is the dense matrix of its codes times scales: codes, loss, log-probabilities, gradients, answers, memory."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import adapted, assert_equal, batch, fused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchft.fuse import swap
from torchft.generate import generate
from torchft.kernels import int8_rows
from torchft.kernels import linear_cross_entropy as kernel
from torchft.modules import int8_head
from torchft.modules import loss as plain
from torchft.modules.int8_head import Int8Head, quantize_head, quantize_rows, row_slices
from torchft.modules.transformer import CausalLM

IGNORE = plain.IGNORE_INDEX
OPS: dict[str, Callable[..., Tensor]] = {
    "plain": plain.linear_cross_entropy,
    "plain per token": plain.linear_logprobs,
    "kernel": kernel.linear_cross_entropy,
    "kernel per token": kernel.linear_logprobs,
    "twin": partial(kernel.linear_cross_entropy, eager=True),
    "twin per token": partial(kernel.linear_logprobs, eager=True),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels; on the CPU they run in Triton's interpreter


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows of width 12 to 128 a slice, so that every vocabulary below has several and a shorter last one."""
    for module in (int8_head, int8_rows):
        monkeypatch.setattr(module, "SLICE_BYTES", 4 * 16 * 12)


def problem(num_tokens: int = 37, vocabulary: int = 61) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, 12), codes (V, 12), scale (V,), labels (N,) with a third of them ignored; the first and the last word occur."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 12, device=DEVICE, requires_grad=True)
    labels = torch.randint(vocabulary, (num_tokens,), device=DEVICE)
    labels[1:2], labels[2:3] = 0, vocabulary - 1
    labels[3::3] = IGNORE
    return hidden, *quantize_rows(torch.randn(vocabulary, 12, device=DEVICE)), labels


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double()[:, None]


# ---- Codes


def test_codes_are_rounded_to_nearest_even_and_fill_the_range() -> None:
    codes, scale = quantize_rows(torch.tensor([[-127.0, 0.5, 1.5, 2.5, -0.5, -3.4], [0.0] * 6, [2.54, -1.27, 0, 0, 0, 0.0]]))
    assert codes.dtype == torch.int8 and codes.tolist() == [[-127, 0, 2, 2, 0, -3], [0] * 6, [127, -64, 0, 0, 0, 0]]
    assert scale[0] == 1.0 and scale[2] == pytest.approx(0.02) and scale.dtype == torch.float32


def test_scales_are_the_quotient_rounded_once() -> None:
    """On every device, so that the codes are everywhere the same: a GPU would multiply by the rounded inverse of a number."""
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes, scale = quantize_rows(rows)
    assert torch.equal(scale, (rows.abs().amax(1).double() / 127).float())  # fp64 has digits enough to round twice
    assert torch.equal(codes.cpu(), quantize_rows(rows.cpu())[0])


def test_the_error_is_nine_tenths_of_a_percent() -> None:
    weight = 0.02 * torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    error = dense(*quantize_rows(weight)) - weight
    assert 0.008 < error.norm() / weight.norm() < 0.01
    codes, scale = quantize_rows(weight.bfloat16())
    assert (dense(codes, scale) - weight.bfloat16()).abs().le(0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so(value: float) -> None:
    codes, scale = quantize_rows(torch.tensor([[1.0, value], [1.0, 2.0]]))
    assert dense(codes, scale)[0].isnan().all() and dense(codes, scale)[1].isfinite().all()


@pytest.mark.parametrize(
    "num_rows, width, itemsize", [(128256, 4096, 2), (61, 12, 4), (1, 1, 4), (262144, 3840, 2), (50257, 768, 2)]
)
@pytest.mark.parametrize("module", [int8_head, int8_rows])
def test_slices_are_of_one_size_and_hold_every_row_once(module: Any, num_rows: int, width: int, itemsize: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 64 * 2**20)
    slices = module.row_slices(num_rows, width, itemsize)
    assert slices[0].start == 0 and slices[-1].stop == num_rows
    assert all(one.stop == other.start and one.stop % 16 == 0 for one, other in zip(slices, slices[1:], strict=False))
    assert all((one.stop - one.start) * width * itemsize <= 1.01 * 64 * 2**20 for one in slices)
    if num_rows == 128256:
        assert [one.stop - one.start for one in slices] == [8016] * 16


# ---- The loss


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("vocabulary", [1, 16, 61])
def test_it_is_that_of_the_dense_matrix(op: str, vocabulary: int, chunk_size: int) -> None:
    hidden, codes, scale, labels = problem(vocabulary=vocabulary)
    copies = [tensor.detach().clone() for tensor in (hidden, codes, scale, labels)]
    got = OPS[op](hidden, codes, labels, scale=scale, chunk_size=chunk_size)
    expected = -F.cross_entropy(hidden.double() @ dense(codes, scale).T, labels, reduction="none", ignore_index=IGNORE)
    expected = expected if "token" in op else -expected.sum()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(got)
    found, wanted = (torch.autograd.grad(x, hidden, upstream.to(x.dtype))[0] for x in (got, expected))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9
    assert not found[3::3].any()
    assert all(torch.equal(one, other) for one, other in zip((hidden, codes, scale, labels), copies, strict=True))


@pytest.mark.parametrize("op", ["plain", "plain per token"])
def test_capped_logits(op: str) -> None:
    hidden, codes, scale, labels = problem()
    got = OPS[op](hidden, codes, labels, scale=scale, chunk_size=5, softcap=2.5).sum()
    logits = 2.5 * torch.tanh(hidden.double() @ dense(codes, scale).T / 2.5)
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE) * (1 if op == "plain" else -1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    found, wanted = (torch.autograd.grad(x, hidden)[0] for x in (got, expected))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_tokens", [7, 0])
def test_nothing_supervised_is_a_zero_whatever_the_rows_hold(op: str, num_tokens: int) -> None:
    hidden, codes, scale, labels = problem(num_tokens)
    hidden = torch.full_like(hidden, torch.nan).requires_grad_()
    loss = OPS[op](hidden, codes, torch.full_like(labels, IGNORE), scale=scale, chunk_size=3).sum()
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_a_weight_and_scales_that_do_not_belong_together_are_refused() -> None:
    hidden, codes, scale, labels = problem()
    for weight, given in ((codes, None), (codes.float(), scale)):
        with pytest.raises(ValueError, match="scale: an int8 weight needs one"):
            kernel.linear_cross_entropy(hidden, weight, labels, scale=given)


# ---- The kernel that decodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("width", [1, 12, 100, 5000])
def test_decoding_rounds_once(width: int, eager: bool, dtype: torch.dtype) -> None:
    codes, scale = quantize_rows(torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    out = torch.full((7, width), torch.nan, dtype=dtype, device=DEVICE)
    int8_rows.decode_rows(codes, scale, out[:5], eager=eager)
    assert torch.equal(out[:5], (codes.float() * scale[:, None]).to(dtype)) and out[5:].isnan().all()


def test_decoding_refuses_what_it_would_misread() -> None:
    codes, scale, out = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), torch.empty(4, 8)
    for wrong in ((codes.float(), scale, out), (codes, scale.half(), out), (codes, scale[:3], out), (codes, scale, out[:, :4])):
        with pytest.raises(ValueError, match="need"):
            int8_rows.decode_rows(*wrong)
    with pytest.raises(ValueError, match="contiguous"):
        int8_rows.decode_rows(codes.T.contiguous().T, scale, out)


# ---- The model


def in_8_bits(model: CausalLM) -> tuple[CausalLM, CausalLM]:
    """The model with such a head, and one with the dense matrix of the same numbers."""
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    quantize_head(model)
    dtype = twin.lm_head.weight.dtype
    twin.lm_head.weight = nn.Parameter(dense(model.lm_head.weight, model.lm_head.weight_scale).to(dtype), requires_grad=False)
    return model, twin


@pytest.mark.parametrize("variant", ["untied", "tied", "capped", "scaled"])
def test_a_models_loss_and_gradients_are_those_of_the_dense_head(variant: str) -> None:
    more = {"tied": {"tie_word_embeddings": True}, "capped": {"final_logit_softcapping": 3.0}, "scaled": {"logits_scaling": 4.0}}
    base = adapted(**more.get(variant, {}))
    model, twin = in_8_bits(base)
    assert_equal(twin, model)
    logits, wanted = (each(batch()["input_ids"]) for each in (model, twin))
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    tokens = {"per_token": True, **batch()}
    torch.testing.assert_close(model(**tokens), twin(**tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)


@pytest.mark.parametrize("kernels", ["twins", "interpreter"])
def test_a_fused_model_too(kernels: str) -> None:
    if kernels == "interpreter" and DEVICE == "cuda":
        pytest.skip("the model is on the CPU, and Triton is not")
    model, twin = in_8_bits(adapted())
    if kernels == "twins":
        assert_equal(twin, fused(model))
        return
    swapped = copy.deepcopy(model)
    report = swap(swapped, ("lora",))
    assert report.loss and swapped.head_loss is kernel.linear_cross_entropy
    assert_equal(twin, swapped)


def test_the_logits_of_a_head_in_8_bits_can_be_trained_through() -> None:
    model, twin = in_8_bits(adapted())
    found, wanted = ((each.zero_grad(), each(batch()["input_ids"]).square().sum().backward()) and each for each in (model, twin))
    grads = [{name: param.grad for name, param in each.named_parameters() if param.grad is not None} for each in (found, wanted)]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 42
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_answers_are_those_of_the_dense_head() -> None:
    model, twin = in_8_bits(adapted())
    prompts = [[5, 17, 3], [44], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    answers = [generate(each, prompts, max_new_tokens=9, stop_ids=set()) for each in (model, twin)]
    assert answers[0] == answers[1]


def test_bf16_is_as_close_to_fp64_as_the_dense_head() -> None:
    model, twin = in_8_bits(adapted(dtype=torch.bfloat16))
    loss, wanted = model(**batch()).item(), twin(**batch()).item()
    exact = copy.deepcopy(twin).double()(**batch()).item()
    assert abs(loss - exact) <= 1.5 * abs(wanted - exact) + 1e-4 * exact


def test_names_stay_and_the_scales_are_in_no_state_dict() -> None:
    base = adapted()
    model, _ = in_8_bits(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert isinstance(model.lm_head, Int8Head) and model.lm_head.weight.dtype == torch.int8
    assert not model.lm_head.weight.requires_grad


def test_a_trained_head_is_refused() -> None:
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head is trained here"):
        quantize_head(model)


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor that any op made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("op", [name for name in OPS if not name.startswith("kernel")])
def test_neither_the_dense_head_nor_all_logits_are_ever_made(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, width, chunk, rows = 96, 1000, 128, 16, 64
    for module in (int8_head, int8_rows):
        monkeypatch.setattr(module, "SLICE_BYTES", rows * width * 4)
    hidden = torch.randn(tokens, width, requires_grad=True)
    codes, scale = quantize_rows(torch.randn(vocabulary, width))
    labels = torch.randint(vocabulary, (tokens,))
    with Largest() as largest:
        if "twin" in op:  # what a library op does is hidden from such a mode
            upstream = torch.ones(tokens) if "token" in op else None
            kernel._walk((hidden.detach(), codes, scale, labels), upstream, chunk, [True, False], eager=True)
        else:
            OPS[op](hidden, codes, labels, scale=scale, chunk_size=chunk).sum().backward()
    assert largest.elements == max(chunk * vocabulary, tokens * width)  # of one chunk, and what comes in
    head = Int8Head(width, vocabulary, bias=False, device="meta")
    head.weight, head.weight_scale = nn.Parameter(codes, requires_grad=False), scale
    with Largest() as largest, torch.no_grad():
        head(hidden[:1])
    assert largest.elements <= rows * width
    assert max(one.stop - one.start for one in row_slices(vocabulary, width, 4)) <= rows
