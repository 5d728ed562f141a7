"""Where a step's time goes: a case of bench_recipe.py under torch.profiler, as a table of kinds of GPU work.

    python scripts/profile_step.py lora_8b_fp8_2048x4_noac
    python scripts/profile_step.py full_1b_bf16_2048x4_noac --option optim.in_backward=true --option optim.max_grad_norm=0
    python scripts/profile_step.py lora_8b_bf16_2048x4_noac --gpus 2 --option model.shard=all
    python scripts/profile_step.py --trace out/profile/trace.json          # of a run with run.profile_steps=8

The last STEPS of the recorded steps are looked at, in which a CUDA graph is replayed if there is one. Times are of the GPU, in ms per
step, from the beginning of the first step to the end of the last one, as the CPU sees them (the GPU is a step behind where the log
is read late, see torchft/metrics.py): products, attention, what is left of the kernels (bound by memory, mostly), copies,
communication, and what no stream works in. Where streams work side by side the kinds' sum is larger than the step by what stands as
overlapped. The profiler slows the CPU: the step without it stands below, from the steps behind the window. So does the clock at which
the multiprocessors ran, and the power that they took (nvidia-smi, median of the moments at which the GPU had work for all of the last
interval): at the power limit a GPU lowers its clock, and time that is won beside the products in part returns as a lower one.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_recipe

STEPS = 4
RECORDED = 8  # the first ones launch kernel by kernel, and record the graph
KINDS = (  # the first pattern found in a kernel's name decides
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|sdpa|cudnn|flex|attention"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|_mm_|scaled_mm"),
    ("copies", r"^Memcpy|^Memset"),
)
TOP = 25
ASKED = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "utilization.gpu")  # MHz, W, %
INTERVAL_MS = 100


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other kernels")


def busy_us(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def read_events(file: Path) -> list[dict]:
    """What a trace holds with a beginning and a duration. Raises SystemExit where the file is none."""
    try:
        return [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    except OSError as error:
        hint = "a run with run.profile_steps=8 writes profile/trace.json below its run.out"
        raise SystemExit(f"error: --trace {file}: {error.strerror}; {hint}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SystemExit(f"error: --trace {file} is not what torch.profiler writes, a JSON object with traceEvents") from None


def read_trace(file: Path, steps: int) -> dict:
    """ms per step by kind and by kernel, over the last `steps` of a trace.

    Raises SystemExit where the file is no trace, or one of fewer steps, or of none on a GPU.
    """
    events = read_events(file)
    marks = [e for e in events if e["name"].startswith("ProfilerStep#") and e.get("cat") == "user_annotation"]
    marks.sort(key=lambda e: e["ts"])
    if len(marks) < steps:
        raise SystemExit(f"error: {file} holds {len(marks)} steps, and the last {steps} are wanted: see run.profile_steps")
    begin, end = marks[-steps]["ts"], marks[-1]["ts"] + marks[-1]["dur"]
    kinds, kernels, counts, intervals = defaultdict(float), defaultdict(float), defaultdict(int), []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        first, last = max(begin, event["ts"]), min(end, event["ts"] + event["dur"])
        if first < last:
            intervals.append((first, last))
            kinds[kind_of(event["name"])] += last - first
            kernels[event["name"]] += last - first
            counts[event["name"]] += 1
    if not intervals:
        raise SystemExit(f"error: {file} shows nothing on a GPU in its last {steps} steps")
    busy, ms = busy_us(intervals), 1 / 1000 / steps
    table = {kind: round(us * ms, 2) for kind, us in sorted(kinds.items(), key=lambda item: -item[1])}
    table |= {"idle": round((end - begin - busy) * ms, 2), "overlapped": round((busy - sum(kinds.values())) * ms, 2)}
    top = sorted(kernels, key=kernels.get, reverse=True)[:TOP]
    return {
        "step_ms": round((end - begin) * ms, 2),
        "kinds_ms": table,
        "kernels": [{"name": n, "ms": round(kernels[n] * ms, 3), "launches": round(counts[n] / steps, 1)} for n in top],
    }


@contextmanager
def watched(file: Path) -> Iterator[None]:
    """nvidia-smi writes into `file` what the first visible GPU does meanwhile; nothing where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"]
    with file.open("w") as out:
        watcher = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            watcher.terminate()
            watcher.wait()


def read_clock(text: str) -> dict[str, float]:
    """Medians of `watched`'s lines at which the GPU was busy throughout; empty without any. The last one may be cut off anywhere."""
    whole = re.compile(", ".join([r"\d+(?:\.\d+)?"] * len(ASKED)))
    rows = [[float(cell) for cell in line.split(", ")] for line in text.splitlines() if whole.fullmatch(line)]
    busy = [row for row in rows if row[-1] >= 99]
    if not busy:
        return {}
    medians = [statistics.median(column) for column in zip(*busy, strict=True)]
    return dict(zip(("sm_mhz", "max_sm_mhz", "watts", "limit_watts"), medians, strict=False)) | {"samples": len(busy)}


def render(profile: dict) -> str:
    """The table, with each kind's share of the step, and the kernels that take longest."""
    step = profile["step_ms"]
    lines = [f"{step:9.2f} ms  a step under the profiler"]
    lines += [f"{ms:9.2f} ms  {ms / step:6.1%}  {kind}" for kind, ms in profile["kinds_ms"].items()]
    lines += ["", "       ms  launches  kernel"]
    lines += [f"{k['ms']:9.3f}  {k['launches']:8.1f}  {k['name'][:120]}" for k in profile["kernels"]]
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict:
    """Run a case with the profiler on. Raises SystemExit where it cannot run, or is too short."""
    bench_recipe.check([args.case], args.option, args.gpus)
    with tempfile.TemporaryDirectory() as name:
        options = [*args.option, f"run.out={name}/out", f"run.profile_steps={RECORDED}"]
        try:
            with watched(Path(name, "clock")):
                bench_recipe.run_recipe(args.case, args.timeout, args.gpus, options)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"error: the run failed: {error}") from None
        log = [json.loads(line) for line in Path(name, "out/log.jsonl").read_text().splitlines()]
        rates = [record["tokens_per_s"] for record in log if "tokens_per_s" in record][2 + RECORDED :]
        if not rates:
            raise SystemExit(f"error: the run has no step behind the window: give it more than {2 + RECORDED} (run.max_steps)")
        profile = {"case": args.case, "options": args.option, "tokens_per_s": round(statistics.median(rates))}
        profile |= read_trace(Path(name, "out/profile/trace.json"), args.steps)
        return profile | {"clock": read_clock(Path(name, "clock").read_text()) if Path(name, "clock").exists() else {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", help="see bench_recipe.py --list")
    parser.add_argument("--gpus", type=int, default=0, help="a distributed recipe on so many GPUs; the first one's work is shown")
    parser.add_argument("--option", action="append", default=[], help="one more of the recipe's")
    parser.add_argument("--trace", type=Path, help="of a run made before, instead of a case")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many, the last ones of the trace")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for the run")
    parser.add_argument("--json", type=Path, help="the table goes here too")
    args = parser.parse_args()
    if bool(args.case) == bool(args.trace):
        parser.error("give either a case or --trace FILE")
    if args.trace:
        profile = read_trace(args.trace, args.steps)
    else:
        profile = measure(args)
    print(render(profile))
    if "tokens_per_s" in profile:
        print(f"\n{profile['tokens_per_s']:,} tokens/s in the steps behind the window")
    if clock := profile.get("clock"):
        print("{sm_mhz:,.0f} of {max_sm_mhz:,.0f} MHz, {watts:.0f} of {limit_watts:.0f} W ({samples} moments)".format(**clock))
    if args.json:
        args.json.write_text(json.dumps(profile, indent=1) + "\n")


if __name__ == "__main__":
    main()
