"""Causal attention in every way that PyTorch offers, timed at a shape: which one, and of which layout, is the fastest here.

    python scripts/bench_attention.py                                   # 8B: 1 row of 8,192 tokens, 32 heads of 128 on 8
    python scripts/bench_attention.py --tokens 2048 --batch 4 --json out/attention.json
    python scripts/bench_attention.py --tiny                            # checks only, in fp32: runs without a GPU too

The recipes use the first one (modules/attention.py): cuDNN, queries and keys as RoPE's kernel leaves them, (B, T, heads, E). Each
result and gradient must be that one's to bf16's accuracy before it is timed. TFLOP/s count half of the scores: 2 T^2 E a head forward, 5 T^2 E
backward. Left out: packages besides PyTorch.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import TOLERANCE, seconds
from bench_recipe import environment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torchft.modules.attention import _compiled_flex, attend

Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, T, E), k and v (B, K, T, E) -> (B, H, T, E)
SHAPE = {"batch": 1, "tokens": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128}
TINY = {"batch": 2, "tokens": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
FLEX = {
    "flex": {},
    "flex, 128 x 64, 8 warps": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "flex, TMA": {"USE_TMA": True},
}


def with_backend(backend: SDPBackend, repeated: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By one backend of PyTorch's; `repeated`: each key and value head written out for all of its query heads."""
    if repeated:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeated)


def flex(options: dict, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_causal(q.shape[2], q.device), enable_gqa=True, kernel_options=options)


@functools.cache
def _causal(tokens: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=device)


def layouts(q: Tensor, k: Tensor, v: Tensor) -> dict[str, list[Tensor]]:
    """The same values (B, heads, T, E) in other memory: as RoPE's kernel writes them, heads first, and as parts of one projection."""
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    one = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2)  # (B, T, (H + 2 K) E)
    parts = [part.unflatten(2, (-1, q.shape[3])).transpose(1, 2) for part in one.split([x.shape[1] * x.shape[3] for x in (q, k, v)], 2)]
    return {"as RoPE leaves them": apart, "heads first": [q.contiguous(), k.contiguous(), v.contiguous()], "parts of one": parts}


def ways(on_gpu: bool) -> dict[str, tuple[str, Way]]:
    """Name -> layout and function; the first is the recipes'."""
    found: dict[str, tuple[str, Way]] = {"as the recipes": ("as RoPE leaves them", lambda q, k, v: attend(q, k, v, None))}
    if not on_gpu:
        return found | {"math": ("heads first", partial(with_backend, SDPBackend.MATH, False))}
    for layout in ("heads first", "parts of one"):
        found[f"cuDNN, {layout}"] = (layout, partial(with_backend, SDPBackend.CUDNN_ATTENTION, False))
    found["cuDNN, keys and values repeated"] = ("as RoPE leaves them", partial(with_backend, SDPBackend.CUDNN_ATTENTION, True))
    found["flash-2"] = ("as RoPE leaves them", partial(with_backend, SDPBackend.FLASH_ATTENTION, False))
    return found | {name: ("as RoPE leaves them", partial(flex, options)) for name, options in FLEX.items()}


def forward_and_backward(way: Way, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    y = way(*inputs)
    return [y, *torch.autograd.grad(y, inputs, upstream)]


def measure(way: Way, inputs: list[Tensor], upstream: Tensor, expected: list[Tensor] | None, flop: float) -> tuple[dict, list[Tensor]]:
    """The record of one way, and its results. `flop`: of its forward; 0: nothing is timed."""
    got = forward_and_backward(way, inputs, upstream)
    worst = max(((x - y).float().norm() / y.float().norm()).item() for x, y in zip(got, expected or got, strict=True))
    record: dict = {"error": worst}
    if not worst <= TOLERANCE[upstream.dtype]:
        record["refused"] = f"differs by {worst:.1e}"
    elif flop:
        with torch.no_grad():
            forward = seconds(partial(way, *inputs))
        both = seconds(partial(forward_and_backward, way, inputs, upstream))
        record |= {"forward_ms": round(1e3 * forward, 4), "both_ms": round(1e3 * both, 4), "tflops": round(3.5 * flop / both / 1e12)}
    return record, got


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="everything measured is written here")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in fp32, checks only")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.tiny):
        parser.error("no GPU to measure on; --tiny checks without one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    shape = TINY if args.tiny else {name: getattr(args, name) for name in SHAPE}
    batch, tokens, heads, kv_heads, width = shape.values()
    dtype, device = torch.float32 if args.tiny else torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, count, tokens, width, dtype=dtype, device=device) for count in (heads, kv_heads, kv_heads))
    upstream, flop = torch.randn_like(q), 0 if args.tiny else 2 * batch * heads * tokens**2 * width
    given = {name: [x.detach().requires_grad_() for x in values] for name, values in layouts(q, k, v).items()}
    expected, records = None, []
    for name, (layout, way) in ways(device == "cuda" and not args.tiny).items():
        try:
            record, got = measure(way, given[layout], upstream, expected, flop)
            expected = expected or got
        except (RuntimeError, ValueError) as problem:  # a way that cannot be gone here
            record = {"refused": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        records.append({"way": name, **record})
        print(render(records[-1]), flush=True)
        if args.json:  # after each: a later one may bring the process down
            machine = environment(0) if device == "cuda" else {}
            args.json.write_text(json.dumps({**machine, "shape": shape, "records": records}, indent=1) + "\n")
    return int("refused" in records[0])


def render(record: dict) -> str:
    if "refused" in record:
        return f"{record['way']:<34} REFUSED: {record['refused'][:120]}"
    if "both_ms" not in record:
        return f"{record['way']:<34} error {record['error']:.1e}"
    return f"{record['way']:<34} {record['forward_ms']:8.3f} ms forward {record['both_ms']:8.3f} ms with backward {record['tflops']:4d} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main())
