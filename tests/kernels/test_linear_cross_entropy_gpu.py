"""Both head ops at real vocabularies on a GPU: bf16, memory, offsets beyond 32 bits."""

import math

import pytest
import torch
from test_linear_cross_entropy import DEVICE, OPS, exact, problem

from torchft.kernels import linear_cross_entropy as kernel
from torchft.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from torchft.modules import loss as plain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 151_936, 262_144, 262_143])
def test_real_vocabularies_lose_no_more_than_torch(op, vocabulary, dtype):
    hidden, weight, labels = problem(700, vocabulary, width=256)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight * 0.1))
    results = []
    upstream = torch.rand(700, device=DEVICE) - 2.0 if op is linear_logprobs else torch.tensor(0.3, device=DEVICE)
    for one in (op, getattr(plain, op.__name__)):
        value = one(hidden, weight, labels, chunk_size=256)  # the same products in both
        results.append((value, *torch.autograd.grad(value, (hidden, weight), upstream)))
    value = exact(op, hidden, weight, labels)
    expected = (value, *(x.double() for x in torch.autograd.grad(value, (hidden, weight), upstream.double())))
    for got, torchs, other in zip(*results, expected, strict=True):
        bound = max(1.2 * ((torchs - other).norm() / other.norm()).item(), 2e-6)
        assert (got - other).norm() <= bound * other.norm()


def test_the_weights_gradient_in_bf16_is_summed_in_fp32_within_the_product():
    """torch.addmm(out_dtype=) takes a fp32 sum and writes it in place."""
    gradient, x = (torch.randn(64, n, dtype=torch.bfloat16, device=DEVICE) for n in (1000, 96))
    start = torch.randn(1000, 96, device=DEVICE)
    total = start.clone()
    kernel._add_product(total, gradient, x)
    torch.testing.assert_close(total, (start + gradient.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("whole_gpu")
def test_offsets_beyond_32_bits():
    """PITFALLS G1: a chunk of 8,300 x 262,144 logits, 2.18e9 elements."""
    rows, vocabulary = 8_300, 262_144
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    assert logits.numel() > 2**31
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[::7] = plain.IGNORE_INDEX
    before, out = logits.clone(), torch.full((rows,), math.nan, device=DEVICE)
    kernel._logprobs(logits, labels, None, out, True, False)
    for start in range(0, rows, 100):
        part = slice(start, start + 100)
        value = torch.full_like(out[part], math.nan)
        expected = before[part].float()
        kernel._logprobs(expected, labels[part], None, value, True, True)
        torch.testing.assert_close(out[part], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[part].float(), expected, rtol=8e-3, atol=1e-9)


def test_neither_pass_holds_all_logits_nor_a_second_copy_of_the_heads_gradient():
    hidden, weight, labels = problem(16_384, 128_256, width=1024)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    head = weight.numel() * 4  # bytes of its gradient in fp32
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.cuda.max_memory_allocated() - before <= head + 4 * kernel.LOGITS_BYTES + 64 * 2**20  # of 4 GiB of logits
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= 0.5 * head + 64 * 2**20  # in bf16, and the hidden states'
