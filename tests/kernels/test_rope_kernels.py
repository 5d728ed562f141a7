"""RoPE kernels: forward and every gradient against fp64, on odd sizes, strides of all kinds and poisoned memory."""

import pytest
import torch
from rows import DEVICE, assert_rounded_once, distance, poisoned, spread, unchanged
from torch import Tensor

from torchft.kernels.rope import rope, rope_merge, rope_split
from torchft.modules.rope import apply_rope

DTYPES = [torch.float32, torch.float16]
# B, T, H, K, E: head counts that fill no block and several, halves that are no powers of two
SIZES = [
    (1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (1, 37, 3, 2, 64), (3, 2, 20, 20, 80), (2, 3, 9, 3, 96), (1, 3, 33, 8, 128),
    (2, 1, 9, 5, 256),
]  # fmt: skip
REAL = [
    (1, 4095, 32, 8, 128), (2, 1023, 32, 8, 64), (3, 511, 14, 2, 64), (1, 777, 32, 32, 96), (1, 99, 20, 20, 80),
    (2, 99, 8, 4, 256),
]  # fmt: skip
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype)


def tables(B: int, T: int, E: int) -> tuple[Tensor, Tensor]:
    angles = 100 * torch.rand(B, T, E // 2, device=DEVICE)
    return 1.3 * angles.cos(), 1.3 * angles.sin()  # scaled, as YaRN's are


def rotate64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, :, None], sin.double()[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split64(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.double().unflatten(-1, (-1, 2 * cos.shape[-1])).split((H, K, K), dim=2)
    return rotate64(q, cos, sin), rotate64(k, cos, sin), v


def merge64(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = rotate64(dq, cos, -sin), rotate64(dk, cos, -sin), dv.double()
    return torch.cat([part.flatten(2) for part in parts], dim=-1)


def arranged(x: Tensor, kind: str) -> Tensor:
    """The same (B, T, N, E) with heads before tokens, or with gaps between all, as attention backends return it."""
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return spread(x) if kind == "gaps" else x


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_split(size, dtype, eager):
    B, T, H, K, E = size
    cos, sin = tables(B if dtype == torch.float32 else 1, T, E)
    qkv = spread(randn(B, T, (H + 2 * K) * E, dtype=dtype)).requires_grad_()
    grads = [randn(B, T, heads, E, dtype=dtype) for heads in (H, K, K)]
    with unchanged(qkv, cos, sin, *grads):
        if eager:
            parts = rope_split(qkv, cos, sin, H, K, eager=True)
            grad = torch.autograd.grad(parts, qkv, grads)[0]
        else:
            with poisoned():
                parts = rope_split(qkv, cos, sin, H, K)
                grad = torch.autograd.grad(parts, qkv, grads)[0]
    exact = split64(qkv.detach(), cos, sin, H, K)
    for part, reference, heads in zip(parts, exact, (H, K, K), strict=True):
        assert part.shape == (B, T, heads, E) and part.dtype == dtype and part.is_contiguous()
        assert_rounded_once(part, reference)
    assert torch.equal(parts[2].double(), exact[2])
    assert_rounded_once(grad, merge64(*grads, cos, sin))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", ["each its own", "heads first", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_merge(size, dtype, kind, eager):
    B, T, H, K, E = size
    cos, sin = tables(1 if kind == "gaps" else B, T, E)
    kinds = ("heads first", "gaps", "rows") if kind == "each its own" else (kind,) * 3
    grads = [arranged(randn(B, T, n, E, dtype=dtype), each) for n, each in zip((H, K, K), kinds, strict=True)]
    with unchanged(*grads, cos, sin):
        if eager:
            grad = rope_merge(*grads, cos, sin, eager=True)
        else:
            with poisoned():
                grad = rope_merge(*grads, cos, sin)
    assert grad.shape == (B, T, (H + 2 * K) * E) and grad.dtype == dtype and grad.is_contiguous()
    exact = merge64(*grads, cos, sin)
    assert_rounded_once(grad, exact)
    assert torch.equal(grad[..., (H + K) * E :].double(), exact[..., (H + K) * E :])


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", ["rows", "heads first", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rope(size, dtype, kind, eager):
    B, T, H, _, E = size
    cos, sin = tables(1 if kind == "gaps" else B, T, E)
    x, grad_out = (arranged(randn(B, T, H, E, dtype=dtype), kind) for _ in range(2))
    x.requires_grad_()
    with unchanged(x, grad_out, cos, sin):
        if eager:
            y = rope(x, cos, sin, eager=True)
            grad = torch.autograd.grad(y, x, grad_out)[0]
        else:
            with poisoned():
                y = rope(x, cos, sin)
                grad = torch.autograd.grad(y, x, grad_out)[0]
    assert y.dtype == dtype and y.is_contiguous()
    assert_rounded_once(y, rotate64(x.detach(), cos, sin))
    assert_rounded_once(grad, rotate64(grad_out, cos, -sin))


def test_v_is_copied_even_where_it_is_not_finite():
    cos, sin = tables(1, 2, 4)
    qkv = randn(1, 2, 12)
    qkv[..., 8] = torch.inf
    assert torch.equal(rope_split(qkv, cos, sin, 1, 1)[2][:, :, 0], qkv[..., 8:])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_gradients_that_are_none_or_expanded(used):
    B, T, H, K, E = 2, 3, 5, 2, 6
    cos, sin = tables(1, T, E)
    qkv = randn(B, T, (H + 2 * K) * E).requires_grad_()
    parts = rope_split(qkv, cos, sin, H, K)
    sum(parts[i].sum() for i in used).backward()  # expanded from one number, and None for the others
    ones = [torch.full_like(part, float(i in used)) for i, part in enumerate(parts)]
    assert_rounded_once(qkv.grad, merge64(*ones, cos, sin))
    x = randn(B, T, H, E).requires_grad_()
    rope(x, cos, sin).sum().backward()
    assert_rounded_once(x.grad, rotate64(torch.ones_like(x), cos, -sin))


def test_no_tokens():
    cos, sin = tables(1, 0, 8)
    qkv, x = randn(2, 0, 32).requires_grad_(), randn(2, 0, 3, 8)
    assert [part.shape for part in rope_split(qkv, cos, sin, 2, 1)] == [(2, 0, 2, 8), (2, 0, 1, 8), (2, 0, 1, 8)]
    assert rope(x, cos, sin).shape == x.shape


def test_torch_library_agrees():
    B, T, H, K, E = 2, 3, 4, 2, 6
    cos, sin = tables(1, T, E)
    qkv, x = randn(B, T, (H + 2 * K) * E).requires_grad_(), randn(B, T, H, E).requires_grad_()
    torch.library.opcheck(torch.ops.torchft.rope_split.default, (qkv, cos, sin, H, K))
    torch.library.opcheck(torch.ops.torchft.rope.default, (x, cos, sin, False))
    grads = [randn(B, T, heads, E) for heads in (H, K, K)]
    torch.library.opcheck(torch.ops.torchft.rope_merge.default, (*grads, cos, sin))


@pytest.mark.parametrize("kind", ["squares", "sum", "v alone", "heads first"])
def test_compiled_it_is_one_node(kind):
    B, T, H, K, E = 2, 3, 4, 2, 6
    cos, sin = tables(1, T, E)
    qkv = randn(B, T, (H + 2 * K) * E).requires_grad_()

    def loss(qkv: Tensor) -> Tensor:
        q, k, v = rope_split(qkv * 1.0, cos, sin, H, K)
        q = rope(q, cos, sin)
        if kind == "heads first":
            return (q.transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1)).sin().sum() + v.square().sum()
        if kind == "v alone":
            return v.square().sum()
        return sum(part.sum() if kind == "sum" else part.square().sum() for part in (q, k, v))

    expected = torch.autograd.grad(loss(qkv), qkv)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(qkv), qkv)[0], expected)


def test_it_is_the_rotation_of_the_plain_module():
    x = randn(2, 5, 3, 16)
    cos, sin = tables(2, 5, 16)
    torch.testing.assert_close(rope(x, cos, sin), apply_rope(x, cos, sin))
    assert torch.equal(rope(x, cos, sin, eager=True), apply_rope(x, cos, sin))


B, T, H, K, E = 2, 3, 4, 2, 6


def mistakes() -> list[tuple[str, dict[str, Tensor]]]:
    table = torch.zeros(1, T, E // 2)
    return [
        ("qkv", {"qkv": torch.zeros(B, T, (H + 2 * K) * E + 1)}),
        ("qkv", {"qkv": torch.zeros(B, T, 2 * (H + 2 * K) * E)[..., ::2]}),
        ("cos", {"cos": table.double()}),
        ("cos", {"cos": torch.zeros(T, 1, E // 2)}),
        ("cos", {"cos": torch.zeros(B + 1, T, E // 2), "sin": torch.zeros(B + 1, T, E // 2)}),
        ("sin", {"sin": torch.zeros(B, T, E // 2)}),
        ("sin", {"sin": torch.zeros(1, T, E)[..., : E // 2]}),
        ("dq", {"dq": torch.zeros(B, T, H, 2 * E)[..., ::2]}),
        ("dk", {"dk": torch.zeros(B, T, K, E).half()}),
        ("dk", {"dk": torch.zeros(B, T, K, E + 2)}),
        ("dv", {"dv": torch.zeros(B, T, K + 1, E)}),
        ("x", {"x": torch.zeros(B, T, H, 2 * E)[..., ::2]}),
        ("x", {"x": torch.zeros(B, T, H, E + 2)}),
    ]


@pytest.mark.parametrize(("name", "wrong"), mistakes())
def test_a_wrong_argument_is_named(name, wrong):
    both = {"cos": torch.zeros(1, T, E // 2), "sin": torch.zeros(1, T, E // 2)}
    split = {"qkv": torch.zeros(B, T, (H + 2 * K) * E), **both, "num_heads": H, "num_kv_heads": K}
    merge = {"dq": torch.zeros(B, T, H, E), "dk": torch.zeros(B, T, K, E), "dv": torch.zeros(B, T, K, E), **both}
    for function, arguments in ((rope_split, split), (rope_merge, merge), (rope, {"x": torch.zeros(B, T, H, E), **both})):
        if wrong.keys() <= arguments.keys():
            with pytest.raises(ValueError, match=f"^{name}: "):
                function(**(arguments | wrong))


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    table, x = torch.zeros(1, T, E // 2), torch.zeros(B, T, H, E)
    qkv = torch.zeros(B, T, 3 * H * E)
    both = table, table
    for function, args in ((rope, (x, *both)), (rope_split, (qkv, *both, H, H)), (rope_merge, (x, x, x, *both))):
        with pytest.raises(ValueError, match="eager=True"):
            function(*args)
        function(*args, eager=True)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", REAL)
def test_as_exact_as_pytorch(size, dtype):
    B, T, H, K, E = size
    cos, sin = tables(B, T, E)
    qkv = randn(B, T, (H + 2 * K) * E, dtype=dtype).requires_grad_()
    grads = [arranged(randn(B, T, heads, E, dtype=dtype), "heads first") for heads in (H, K, K)]
    parts, plain = rope_split(qkv, cos, sin, H, K), rope_split(qkv, cos, sin, H, K, eager=True)
    exact = split64(qkv.detach(), cos, sin, H, K)
    results = [*parts, torch.autograd.grad(parts, qkv, grads)[0], rope(grads[0], cos, sin)]
    others = [*plain, torch.autograd.grad(plain, qkv, grads)[0], apply_rope(grads[0], cos, sin)]
    references = [*exact, merge64(*grads, cos, sin), rotate64(grads[0], cos, sin)]
    small = 1e-7 if dtype == torch.float32 else 0.0
    for result, other, reference in zip(results, others, references, strict=True):
        assert distance(result, reference) <= 1.2 * distance(other, reference) + small


@gpu
@pytest.mark.parametrize("kind", ["rows", "heads first"])
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_31_elements(kind):
    T, H, K, E, chunk = 2**19 + 3, 32, 2, 128, 2**14
    cos, sin = tables(1, T, E)
    qkv = torch.empty(1, T, (H + 2 * K) * E, dtype=torch.bfloat16, device="cuda").normal_()
    parts = rope_split(qkv, cos, sin, H, K)
    grad = rope_merge(*(arranged(part, kind) for part in parts), cos, sin)
    turned = rope(arranged(parts[0], kind), cos, sin)
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        c, s = cos[:, rows], sin[:, rows]
        for part, reference in zip(parts, split64(qkv[:, rows], c, s, H, K), strict=True):
            assert_rounded_once(part[:, rows], reference)
        assert_rounded_once(grad[:, rows], merge64(*(part[:, rows] for part in parts), c, s))
        assert_rounded_once(turned[:, rows], rotate64(parts[0][:, rows], c, s))
