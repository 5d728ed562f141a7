"""What scripts/bench_kernels.py measures: each kernel's inputs, its plain formula, and the least work there is.

A case is made by a function of the kernel and of the shapes: of an 8B model, or tiny ones that are only checked.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Shapes to measure, and where. `compiled` is torch.compile, or the identity where only checks are wanted."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    compiled: Callable = torch.compile
    batch: int = 4
    seq: int = 2048
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    nf4: tuple[tuple[int, int], ...] = ((14336, 4096), (4096, 4096), (1024, 4096))

    def random(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """One row of the table. `least`: bytes, or multiplications and additions, of forward and of forward + backward."""

    name: str
    inputs: tuple
    triton: Callable
    eager: Callable
    plain: Callable
    least: tuple[float, float | None]  # None: there is no backward
    unit: str = "bytes"  # or "flop"
    tolerance: float | None = None  # None: that of the dtype, or exact where there is no backward


def tiny_size(device: str) -> Size:
    shapes = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocabulary": 130}
    return Size(device, torch.float32, lambda f: f, batch=2, seq=6, nf4=((64, 256), (128, 384)), **shapes)


def rms_norm(op: Callable, size: Size) -> Iterator[Case]:
    for trained in (False, True):
        x = size.random(size.batch * size.seq, size.hidden)
        weight, eps = size.random(size.hidden, grad=trained), 1e-5
        plain = size.compiled(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))
        name = "rms_norm" + " (trained)" * trained
        yield Case(name, (x, weight, eps), op, functools.partial(op, eager=True), plain, (2 * x.nbytes, 5 * x.nbytes))


def rope(op: Callable, size: Size) -> Iterator[Case]:
    heads, kv_heads, width = size.heads, size.kv_heads, size.head_dim
    qkv = size.random(size.batch, size.seq, (heads + 2 * kv_heads) * width)
    angles = 100 * torch.rand(size.batch, size.seq, width // 2, device=size.device)

    def plain(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
        def rotate(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

        c, s = cos[:, :, None], sin[:, :, None]
        q, k, v = qkv.unflatten(-1, (-1, 2 * cos.shape[-1])).split((heads, kv_heads, kv_heads), dim=2)
        return rotate(q), rotate(k), v  # v is a view, and not written again as the kernel's is

    least = 2 * qkv.nbytes + 2 * angles.nbytes
    inputs = (qkv, angles.cos(), angles.sin(), heads, kv_heads)
    yield Case("rope_split", inputs, op, functools.partial(op, eager=True), size.compiled(plain), (least, 2 * least))


def swiglu(op: Callable, size: Size) -> Iterator[Case]:
    gate, up = (size.random(size.batch * size.seq, size.intermediate) for _ in range(2))
    plain = size.compiled(lambda gate, up: F.silu(gate) * up)
    yield Case("gated", (gate, up), op, functools.partial(op, eager=True), plain, (3 * gate.nbytes, 8 * gate.nbytes))


def linear_cross_entropy(op: Callable, size: Size) -> Iterator[Case]:
    for trained in (False, True):
        hidden = size.random(size.batch * size.seq, size.hidden)
        weight = size.random(size.vocabulary, size.hidden, scale=size.hidden**-0.5, grad=trained)
        labels = torch.randint(size.vocabulary, (len(hidden),), device=size.device)
        labels[::8] = -100
        plain = size.compiled(
            lambda hidden, weight, labels: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
        )
        product = 2 * (labels >= 0).sum().item() * weight.numel()
        least = (product, (3 if trained else 2) * product)
        name = "linear_cross_entropy" + " (trained)" * trained
        yield Case(name, (hidden, weight, labels), op, functools.partial(op, eager=True), plain, least, "flop")


def nf4(op: Callable, size: Size) -> Iterator[Case]:
    lookup = size.compiled(lambda pairs, scales, table: table[torch.stack((pairs >> 4, pairs & 15), -1).int()] * scales)
    for rows, columns in size.nf4:
        count, on = rows * columns, {"device": size.device}
        codes = torch.randint(256, (count // 2,), dtype=torch.uint8, **on)
        scalers = torch.randint(-128, 128, (count // 64,), dtype=torch.int8, **on)
        factor = (1000 + 5000 * torch.rand(count // 16384, **on)).to(size.dtype)
        mean, table = torch.tensor(0.05, **on).to(size.dtype), torch.linspace(-1, 1, 16, **on).to(size.dtype)

        def into(eager: bool, shape: tuple[int, int] = (rows, columns)) -> Callable:
            out = torch.full(shape, float("nan"), dtype=size.dtype, device=size.device)
            return lambda *storage: op(*storage, out, eager=eager) or out

        def plain(codes: Tensor, scalers: Tensor, factor: Tensor, mean: Tensor, table: Tensor, rows: int = rows) -> Tensor:
            scales = (scalers.view(-1, 256) / factor[:, None]).flatten() + mean  # not compiled, which would round less
            return lookup(codes.view(-1, 32), scales.view(-1, 1, 1), table).view(rows, -1)

        least = codes.nbytes + scalers.nbytes + factor.nbytes + count * size.dtype.itemsize
        inputs = (codes, scalers, factor, mean, table)
        yield Case(f"nf4 {rows} x {columns}", inputs, into(False), into(True), plain, (least, None), tolerance=0.0)


def adamw(op: Callable, size: Size) -> Iterator[Case]:
    from torchft.kernels.adamw import Rule

    rows, columns = size.intermediate, size.hidden
    on = {"device": size.device}
    param, grad, exp_avg, noise = (torch.randn(rows, columns, **on).bfloat16() for _ in range(4))
    step, found_inf, rule = torch.tensor(3.0, **on), torch.zeros((), **on), Rule(1e-3, (0.9, 0.999), 1e-8, 0.1)

    def in_place(update: Callable, eager: bool) -> Callable:
        """Updates a copy of its own again and again; what is compared are the results of the first call."""
        held: list[Tensor] = []
        first: list[Tensor] = []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            held.extend([] if held else [tensor.clone() for tensor in tensors])
            update(tuple(held), step, rule, (0, 1, 0), found_inf=found_inf, eager=eager)
            first.extend([] if first else [held[i].clone() for i in (0, 2, 3)])
            return tuple(first)

        return run

    inputs = (param, grad, exp_avg, noise.square())
    runs = in_place(op, False), in_place(op, True), in_place(size.compiled(op), True)
    yield Case(f"adamw_ {rows} x {columns}", inputs, *runs, (7 * param.nbytes, None), tolerance=0.02)


# In Triton's interpreter the cast to e4m3 is wrong: what quantises is measured on a GPU, and tested with fp32 in e4m3's place.


def fp8_quantize(op: Callable, size: Size) -> Iterator[Case]:
    if size.device == "cpu":
        return

    @size.compiled
    def plain(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.float() if factor is None else x.float() * factor
        largest = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        return (x * (448 / largest)).to(torch.float8_e4m3fn), largest[:, 0] / 448

    for width, with_factor in ((size.hidden, False), (size.intermediate, False), (2 * size.intermediate, True)):
        x = size.random(size.batch * size.seq, width, grad=False)
        factor = 1e-4 * torch.rand(width, device=size.device) if with_factor else None
        name = f"quantize_rows {width}" + " times W's scales" * with_factor
        eager = functools.partial(op, eager=True)
        yield Case(name, (x, factor), op, eager, plain, (x.nbytes + x.numel(), None), tolerance=0.02)


def fp8_transpose(op: Callable, size: Size) -> Iterator[Case]:
    for rows, columns in ((2 * size.intermediate, size.hidden), (size.hidden, size.intermediate)):
        x = torch.randint(256, (rows, columns), dtype=torch.uint8, device=size.device)
        plain = size.compiled(lambda x: x.T.contiguous())
        yield Case(f"transpose {rows} x {columns}", (x,), op, functools.partial(op, eager=True), plain, (2 * x.nbytes, None))


def fp8_rms_norm(op: Callable, size: Size) -> Iterator[Case]:
    if size.device == "cpu":
        return
    h, delta = (size.random(size.batch * size.seq, size.hidden, grad=False) for _ in range(2))
    weight = size.random(size.hidden, grad=False)

    @size.compiled
    def plain(h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        total = h + delta
        rstd = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
        x = (total.float() * rstd * weight.float()).to(h.dtype)
        largest = x.float().abs().amax(dim=1, keepdim=True)
        return total, rstd[:, 0], x, (x.float() * (448 / largest)).to(torch.float8_e4m3fn), largest[:, 0] / 448

    inputs, eager = (h, delta, weight, 1e-5), functools.partial(op, eager=True)
    yield Case("fp8_add_rms_norm", inputs, op, eager, plain, (4 * h.nbytes + h.numel(), None), tolerance=0.02)


def lora_gate(op: Callable, size: Size) -> Iterator[Case]:
    """16 ranks each. The plain formulas add the terms to the base first, as `addmm_` does, and round there."""
    from torchft.kernels.lora_gate import Term, lora_gate_backward

    rows, width, rank = size.batch * size.seq, size.intermediate, 16
    gate_up, dact = size.random(rows, 2 * width, grad=False), size.random(rows, width, grad=False)
    xa, q = size.random(rows, 2 * rank, grad=False), size.random(rows, rank, grad=False)
    shapes = (width, rank), (width, rank), (rank, width)
    weights = [size.random(*shape, scale=0.01, grad=False) for shape in shapes]
    gate, up, down = Term(xa[:, :rank], weights[0]), Term(xa[:, rank:], weights[1]), Term(q, weights[2])
    wide = torch.block_diag(*weights[:2])  # (2F, 2R)

    def plain(gate_up: Tensor, gate: Term, up: Term, scale: float) -> Tensor:
        g, u = torch.addmm(gate_up, xa, wide.T, alpha=scale).float().chunk(2, dim=1)
        return (F.silu(g) * u).to(gate_up.dtype)

    def plain_backward(
        dact: Tensor, down: Term, gate_up: Tensor, gate: Term, up: Term, scale: float
    ) -> tuple[Tensor, Tensor]:
        g, u = torch.addmm(gate_up, xa, wide.T, alpha=scale).float().chunk(2, dim=1)
        da, s = torch.addmm(dact, down.x, down.w, alpha=scale).float(), torch.sigmoid(g)
        grad = torch.cat([da * u * (s + g * s * (1 - s)), da * g * s], dim=1)
        return grad.to(dact.dtype), (g * s * u).to(dact.dtype)

    tolerance = 2e-2 if size.dtype == torch.bfloat16 else 1e-4
    least, both = gate_up.nbytes + dact.nbytes, 2 * gate_up.nbytes + 2 * dact.nbytes
    eager = functools.partial(op, eager=True)
    yield Case("lora_gate", (gate_up, gate, up, 2.0), op, eager, size.compiled(plain), (least, None), tolerance=tolerance)
    op, eager = lora_gate_backward, functools.partial(lora_gate_backward, eager=True)
    inputs, plain = (dact, down, gate_up, gate, up, 2.0), size.compiled(plain_backward)
    yield Case("lora_gate backward", inputs, op, eager, plain, (both, None), tolerance=tolerance)


def scaled_cast(op: Callable, size: Size) -> Iterator[Case]:
    x, scale = torch.randn(size.vocabulary, size.hidden // 2, device=size.device), torch.tensor(1 / 8191, device=size.device)
    plain = size.compiled(lambda x, scale: (x * scale).to(size.dtype))
    run, eager = (lambda x, scale: op(x, scale, size.dtype)), (lambda x, scale: op(x, scale, size.dtype, True))
    yield Case("scaled_cast", (x, scale), run, eager, plain, (x.nbytes + x.numel() * size.dtype.itemsize, None))


def fp8_linear(op: Callable, size: Size) -> Iterator[Case]:
    """The products of an 8B block, forward and of dX; in shares of a bf16 product's throughput. Compiled: the same in bf16."""
    from torchft.kernels.fp8_quantize import quantize_rows

    qkv, hidden, wide = (size.heads + 2 * size.kv_heads) * size.head_dim, size.hidden, size.intermediate
    forward = (hidden, qkv), (hidden, hidden), (hidden, 2 * wide), (wide, hidden)
    for inner, out in (*forward, (qkv, hidden), (2 * wide, hidden), (hidden, wide)):
        x, w = (quantize_rows(size.random(n, inner, grad=False), eager=True) for n in (size.batch * size.seq, out))
        dense = [(codes.float() * scale[:, None]).to(size.dtype) for codes, scale in (x, w)]
        least = 2.0 * size.batch * size.seq * inner * out

        def eager(*inputs: Tensor) -> Tensor:
            codes, scale, w, w_scale = inputs
            return (codes.float() @ w.float().T * scale[:, None] * w_scale).to(size.dtype)

        def plain(*inputs: Tensor, dense: list[Tensor] = dense) -> Tensor:
            return dense[0] @ dense[1].T

        def ours(*inputs: Tensor) -> Tensor:
            return op(*inputs, None, size.dtype)

        yield Case(f"scaled_product {inner} to {out}", (*x, *w), ours, eager, plain, (least, None), "flop", tolerance=2e-2)


# Module of torchft.kernels: its function, and the cases of that.
CASES = {
    "rms_norm": ("rms_norm", rms_norm),
    "rope": ("rope_split", rope),
    "swiglu": ("gated", swiglu),
    "linear_cross_entropy": ("linear_cross_entropy", linear_cross_entropy),
    "nf4": ("dequantize_into", nf4),
    "adamw": ("adamw_", adamw),
    "fp8_quantize": ("quantize_rows", fp8_quantize),
    "fp8_transpose": ("transpose", fp8_transpose),
    "fp8_rms_norm": ("fp8_add_rms_norm", fp8_rms_norm),
    "fp8_linear": ("scaled_product", fp8_linear),
    "lora_gate": ("lora_gate", lora_gate),
    "scaled_cast": ("scaled_cast", scaled_cast),
}
