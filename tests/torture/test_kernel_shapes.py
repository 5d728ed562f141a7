"""Every kernel on hundreds of random shapes and dtypes: forward and backward against fp64 or the twin's bits. PITFALLS G5 and 2d.

The checks are those of tests/kernels, with their poisoned memory and untouched inputs; here they meet sizes that nobody
chose. On a CPU the kernels run in Triton's interpreter.
"""

import math
from collections.abc import Callable
from random import Random

import pytest
import test_adamw
import test_linear_cross_entropy
import test_lora_kernels
import test_nf4_kernel
import test_rms_norm
import test_rope_kernels
import test_swiglu
import torch
from rows import poison_empty
from scale import random_of, scaled

DTYPES = (torch.float32, torch.float16)


def size(random: Random, largest: int) -> int:
    """1 to `largest`, small ones as often as large ones, and often next to a power of two."""
    if random.random() < 0.3:
        return max(1, min(largest, 2 ** random.randint(0, largest.bit_length() - 1) + random.choice((-1, 0, 1))))
    return round(math.exp(random.uniform(0, math.log(largest))))


def norm(random: Random, _: pytest.MonkeyPatch) -> None:
    shape = size(random, 60), size(random, 5000)
    test_rms_norm.test_forward(*shape, random.choice(DTYPES), random.random() < 0.5, False)
    test_rms_norm.test_backward(*shape, random.choice(DTYPES), random.random() < 0.5, random.random() < 0.5, False)


def gate(random: Random, poison: pytest.MonkeyPatch) -> None:
    poison_empty(poison)
    poison.setitem(test_swiglu.BOUNDS, torch.float32, 1e-5)  # a few elements alone show the error of exp itself, 1.2e-6
    test_swiglu.test_equals_fp64(size(random, 40), size(random, 3000), random.choice(DTYPES), random.choice(test_swiglu.ACTIVATIONS), False)


def rope(random: Random, _: pytest.MonkeyPatch) -> None:
    kv_heads = size(random, 6)
    shape = size(random, 3), size(random, 7), kv_heads * size(random, 4), kv_heads, 2 * size(random, 128)
    test_rope_kernels.test_split(shape, random.choice(DTYPES), False)
    test_rope_kernels.test_merge(shape, random.choice(DTYPES), random.choice(("each its own", "heads first", "gaps")), False)
    test_rope_kernels.test_rope(shape, random.choice(DTYPES), random.choice(("rows", "heads first", "gaps")), False)


def loss(random: Random, poison: pytest.MonkeyPatch) -> None:
    poison_empty(poison)
    op, dtype = random.choice(test_linear_cross_entropy.OPS), random.choice(DTYPES)
    test_linear_cross_entropy.test_equals_fp64(op, size(random, 6000), random.choice((0, size(random, 40))), dtype, False)


def nf4(random: Random, _: pytest.MonkeyPatch) -> None:
    columns = 2 ** random.randint(0, 14)
    shape = (test_nf4_kernel.DIVISOR // columns * random.randint(1, 4), columns)
    test_nf4_kernel.test_it_is_torchao_bit_for_bit(shape, random.choice(DTYPES), random.choice((0, 3, 16, 100)), False)


def adamw(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tuple(size(random, 60) for _ in range(random.randint(1, 3)))
    test_adamw.test_kernel_and_twin_give_the_same_bits(shape, random.choice((torch.bfloat16, torch.float32)), monkeypatch)


def adapters(random: Random, _: pytest.MonkeyPatch) -> None:
    parts = random.randint(1, 3)
    rows, ranks = (tuple(draw() for _ in range(parts)) for draw in (lambda: size(random, 150), lambda: size(random, 70) - 1))
    test_lora_kernels.test_adapters_in_the_folded_matrix(size(random, 1100), rows, ranks, random.choice(DTYPES), False)


@pytest.mark.parametrize("check", [norm, gate, rope, loss, nf4, adamw, adapters], ids=lambda check: check.__name__)
def test_random_shapes(check: Callable, tally: Callable) -> None:
    random, number = random_of("shapes", check.__name__), scaled(3, 80)
    for _ in range(number):
        torch.manual_seed(random.randrange(2**31))
        with pytest.MonkeyPatch.context() as monkeypatch:
            check(random, monkeypatch)
    tally(number, "random shapes")
