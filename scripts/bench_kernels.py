"""Time each Triton kernel beside its eager twin and torch.compile of the plain formula, at the shapes of an 8B model.

    python scripts/bench_kernels.py                                  # every kernel there is, on this GPU
    python scripts/bench_kernels.py --only nf4 --only rope --json out/kernels.json
    python scripts/bench_kernels.py --tiny                           # tiny shapes, checks only: runs without a GPU too

8,192 tokens in bf16; forward alone without a graph, and forward with backward. A result must equal the eager twin's, to
bf16's accuracy in every row (NF4: in every bit), before it is timed; the exit code is 1 where one did not. Time is that of
the GPU, the median of several runs whose launches were queued before; what a run leaves in the L2 cache the next one may
find there. The share is that of the least possible traffic in the bandwidth of a large copy (of the least possible
multiplications of the loss in the throughput of a large bf16 product), both measured in the same call. "(trained)": the
weight gets a gradient too, as it does not beside LoRA. adamw_'s compiled variant is its eager twin; it may contract products and
sums, and so round a few values the other way.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from bench_recipe import environment
from kernel_cases import CASES, Case, Size, tiny_size
from torch import Tensor

CALLS, REPEATS = 5, 7
QUEUE_CYCLES = 20_000_000  # about 10 ms of an idle kernel, in which the CPU queues the launches that are timed
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the worst row, see `error`


def forward(run: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    outputs = run(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def both(run: Callable, inputs: tuple, upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of all inputs that want one."""
    outputs = forward(run, inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return (*outputs, *(torch.autograd.grad(outputs, leaves, upstream) if leaves else ()))


def error(got: Tensor, expected: Tensor) -> float:
    """Of the worst row, relative to its own norm (at least 1/1000 of a usual row's); infinite where shape or dtype differ.

    A mean over all rows, or the norm of the largest, would hide a wrong row: of a weight's gradient under a loss, those of
    the labels are 1000 times as long as the rest.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    got, expected = (x.detach().reshape(-1, x.shape[-1] if x.ndim else 1).float() for x in (got, expected))
    usual = expected.norm().item() / math.sqrt(len(expected))
    return ((got - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(usual / 1000)).max().item()


def seconds(run: Callable[[], object]) -> float:
    """Of the GPU for one run, the median of REPEATS means."""
    samples = []
    for _ in range(1 + REPEATS):  # the first is the warm-up, and compiles
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / CALLS / 1e3)
    return statistics.median(samples[1:])


def measured_peaks() -> dict[str, float]:
    """Per second: bytes read and written by a copy of 2 GiB, operations of a bf16 matrix product."""
    memory = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {"bytes": 2**32 / seconds(lambda: memory[0].copy_(memory[1])), "flop": 2 * 8192**3 / seconds(lambda: a @ b)}


def measure(case: Case, tolerance: float, peaks: dict[str, float]) -> Iterator[dict]:
    """A record of each variant: its error, and times in ms and shares unless it is refused or there are no peaks."""
    upstream = tuple(torch.randn_like(y) for y in forward(case.eager, case.inputs)) if case.least[1] else ()
    expected = both(case.eager, case.inputs, upstream)  # kept, so that no variant is given memory with the right result
    for name, run in {"triton": case.triton, "eager": case.eager, "compile": case.plain}.items():
        record: dict = {"case": case.name, "variant": name}
        try:
            got = both(run, case.inputs, upstream)
            errors = [error(x, y) for x, y in zip(got, expected, strict=True)]
            record["error"] = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
            if not record["error"] <= tolerance:
                record["refused"] = f"differs from the eager twin by {record['error']:.1e}, more than {tolerance:.0e}"
            elif peaks:
                record |= times(case, run, upstream, peaks[case.unit])
        except Exception as problem:  # noqa: BLE001 a variant that fails must not lose the others' times
            record["refused"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        yield record


def times(case: Case, run: Callable, upstream: tuple[Tensor, ...], peak: float) -> dict[str, float]:
    """forward_ms, forward_share and, where there is a backward, both_ms and both_share."""
    with torch.no_grad():
        took = {"forward": seconds(lambda: run(*case.inputs))}
    if case.least[1]:
        took["both"] = seconds(lambda: both(run, case.inputs, upstream))
    shares = {f"{k}_share": round(least / took[k] / peak, 3) for k, least in zip(took, case.least, strict=False)}
    return {f"{k}_ms": round(1e3 * s, 4) for k, s in took.items()} | shares


def line(record: dict) -> str:
    row = f"{record['case']:<31} {record['variant']:<8}"
    if "refused" in record:
        return f"{row} REFUSED: {record['refused']}"
    for key in ("forward", "both"):
        row += f" {record[f'{key}_ms']:9.3f} ms {record[f'{key}_share']:5.0%}" if f"{key}_ms" in record else ""
    return f"{row}  error {record['error']:.1e}"


def kernel_module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"torchft.kernels.{name}")
    except ModuleNotFoundError as problem:
        if problem.name != f"torchft.kernels.{name}":  # something that the kernel imports
            raise
        return None


def records_of(name: str, module: ModuleType, size: Size, peaks: dict[str, float]) -> Iterator[dict]:
    function, cases = CASES[name]
    for case in cases(getattr(module, function), size):
        usual = TOLERANCE[size.dtype] if case.least[1] else 0.0
        yield from measure(case, usual if case.tolerance is None else case.tolerance, peaks)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="may be repeated")
    parser.add_argument("--json", type=Path, help="everything measured is written here")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in fp32, checks only")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        if not args.tiny:
            parser.error("no GPU to measure on; --tiny checks without one")
        os.environ["TRITON_INTERPRET"] = "1"  # triton is not imported yet
    return args


def set_up(tiny: bool) -> tuple[Size, dict[str, float], dict]:
    """The shapes, the peaks, and what is known of this machine; the last two are empty where nothing is timed."""
    torch.manual_seed(0)
    if tiny:
        return tiny_size("cuda" if torch.cuda.is_available() else "cpu"), {}, {}
    peaks = measured_peaks()
    print(f"copy {peaks['bytes'] / 1e12:.2f} TB/s, bf16 product {peaks['flop'] / 1e12:.0f} TFLOP/s, shares are of these")
    print(f"{'':<40}{'forward':>13} share{'and backward':>13} share")
    return Size("cuda"), peaks, environment(0)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size, peaks, machine = set_up(args.tiny)
    found: dict = {**machine, "peaks": peaks, "records": [], "missing": []}
    for name in args.only or CASES:
        module = kernel_module(name)
        if module is None:
            print(f"{name}: skipped, there is no kernels/{name}.py")
            found["missing"].append(name)
        else:
            for record in records_of(name, module, size, peaks):
                print(line(record), flush=True)
                found["records"].append(record)
        if args.json:  # after each kernel: a later one may bring the process down
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("refused" in record for record in found["records"]))


if __name__ == "__main__":
    sys.exit(main())
