"""Measure the time to the first finished step of 8B LoRA, from real files, and append it to docs/records.jsonl.

    python scripts/bench_start.py                                             # cold and warm compile cache, once each
    python scripts/bench_start.py --baseline hf_peft --repeat 3
    python scripts/bench_start.py --folder /scratch/start --option model.quantize=nf4     # keeps the 16 GB for another call
    python scripts/bench_start.py --dry-run --baseline hf_peft                # tiny, on any device; records nothing

First a model directory of Llama-3.1-8B's shapes is written, random weights in bf16, in files of 5 GB with their index, and
read once: the weights lie in the page cache. Then `python -m torchft run lora_single_device`, with the options of
bench_recipe.py's case lora_8b_bf16_2048x4_noac but weights from the files, is timed from the start of its process to the
arrival of its line on step 1, which it prints when the device is done; there it is killed. "cold": the folders are empty in
which Triton, Inductor and CUDA keep what they have compiled, and we tokens (the very first run also reads the libraries from
the disk); "warm": they are those of the cold run before. The seconds at which other known lines arrive say where the time goes:

    imports   the first line: Python, torch, our modules, the config, the GPU's context (of hf_peft the modules alone)
    model     the model on meta with its adapters, kernels swapped in
    weights   read, on the GPU
    data      tokenised and planned
    step 1    compiled and done

hf_peft: the same from the same files by scripts/baselines/hf_peft.py, which compiles nothing and draws random token ids.
Leaves out: reading from a disk, and several GPUs.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import bench_dpo
import bench_recipe

REPO = bench_recipe.REPO
CASE, RECORD = "lora_8b_bf16_2048x4_noac", "start_8b_lora_bf16"
STEPS = 2  # planned; the second one is never finished
FILE_BYTES, TINY_FILE_BYTES = 5 * 10**9, 10**5
TINY = bench_recipe.LLAMA_3_1_8B | bench_dpo.TINY | {"head_dim": 16, "vocab_size": 1280}
TINY_OPTIONS = {"data.max_seq_len": 64, "run.global_batch_size": 2, "run.micro_batch_size": 2}
# of the recipe's, and of the baseline's output: what a line begins with; the last one ends the run
LINES = {"imports": "model: ", "model": "kernels: ", "weights": "loaded ", "data": r"\d+ rows? per step", "step 1": r"step +1/"}
HF_LINES = {"imports": "imported", "weights": "loaded", "step 1": "step 1/"}


class NoStep(Exception):
    """A run ended before its first step."""


def seconds_until(lines: dict[str, str], command: list[str], environment: dict[str, str], timeout_s: float) -> dict[str, float]:
    """Seconds from the start of the process to the first of its output's lines that begins with each pattern.

    The process is killed, with all that it started, at the last one's line: nothing is saved or exported.
    Raises NoStep with its last line where it ends before that, or takes longer than `timeout_s`.
    """
    command = [sys.executable, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    start = time.perf_counter()
    with subprocess.Popen(command, **pipes, env=environment, cwd=REPO, start_new_session=True) as run:
        timer = threading.Timer(timeout_s, os.killpg, (run.pid, signal.SIGKILL))
        timer.start()
        try:
            seen, last_line = arrivals(run.stdout, lines, start)
        finally:
            timer.cancel()
            os.killpg(run.pid, signal.SIGKILL)  # not waited for yet: the number is still its own
    if list(lines)[-1] in seen:
        return seen
    took = time.perf_counter() - start
    why = f"took more than {timeout_s:.0f} s" if took >= timeout_s else f"ended after {took:.1f} s"
    raise NoStep(f"{' '.join(command[1:5])} {why}, before its first step; its last line: {last_line}")


def arrivals(output: Iterable[str], lines: dict[str, str], start: float) -> tuple[dict[str, float], str]:
    """Seconds from `start` at which each pattern's first line came, up to the last pattern's; and the last line read."""
    seen, last_line = {}, "it printed nothing"
    for line in output:
        now = time.perf_counter() - start
        last_line = line.strip() or last_line
        seen |= {name: round(now, 2) for name, pattern in lines.items() if name not in seen and re.match(pattern, line)}
        if list(lines)[-1] in seen:
            break
    return seen, last_line


def write_weights(folder: Path, file_bytes: int) -> None:
    """Random weights in bf16 for the config.json in `folder`: files and index as the hub has them."""
    import torch

    from torchft.export import save_safetensors
    from torchft.model_dir import plan_shards, write_index
    from torchft.models import build_model, read_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in build_model(read_config(folder)).named_parameters()}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    files, needed, free = plan_shards(sizes, file_bytes), sum(sizes.values()), shutil.disk_usage(folder).free
    if free < 1.01 * needed:
        sizes = f"{needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
        raise SystemExit(f"error: {folder} takes {sizes}: give another --folder")

    def weight(name: str) -> torch.Tensor:
        norm = name.endswith("norm.weight")
        value = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
        return (value.fill_(1) if norm else value.normal_(std=0.02)).cpu()

    for file, names in files.items():
        save_safetensors({name: weight(name) for name in names}, folder / file, {"format": "pt"})
    write_index(folder, files, needed)


def prepare(folder: Path, config: dict, file_bytes: int, num_tokens: int) -> None:
    """model/ and text.jsonl in `folder`; weights that are there already are kept. Raises SystemExit for other things there."""
    model = folder / "model"
    complete = (model / "model.safetensors.index.json").exists()  # it is written last
    if model.exists() and not (complete and json.loads((model / "config.json").read_text()) == config):
        raise SystemExit(f"error: {model} is something else, or not all of it: remove it, or give another --folder")
    if complete:
        return
    bench_recipe.write_inputs(folder, config, num_tokens)
    # in a process of its own: this one keeps no context on the GPU while a run is timed
    child = multiprocessing.get_context("spawn").Process(target=write_weights, args=(model, file_bytes))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)  # it has said why


def read_once(model: Path) -> int:
    """Have all weights in the page cache; their bytes."""
    buffer, total = bytearray(2**24), 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def recipe_command(folder: Path, out: Path, options: dict[str, object]) -> list[str]:
    """`tune run` of the recipe on the prepared folder."""
    fixed = {"model.path": folder / "model", "data.train": folder / "text.jsonl", "run.out": out}
    fixed |= {"lora.rank": 16, "run.max_steps": STEPS, "run.log_every": 1, "run.sample_rows": 0}
    return ["-m", "torchft", "run", "lora_single_device", *(f"{key}={value}" for key, value in {**fixed, **options}.items())]


def caches_in(folder: Path) -> dict[str, str]:
    """The environment of a run that keeps whatever it compiles, and its tokens, in `folder`."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {name: str(folder / name.lower()) for name in names} | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def time_recipe(folder: Path, options: dict[str, object], repeat: int, timeout_s: float) -> dict[str, list[dict[str, float]]]:
    """`repeat` cold runs, each followed by a warm one with the same caches."""
    runs = {"cold": [], "warm": []}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as caches:
            for kind, found in runs.items():
                command = recipe_command(folder, Path(caches) / f"out_{kind}", options)
                found.append(seconds_until(LINES, command, caches_in(Path(caches)), timeout_s))
                print(f"{kind}: {found[-1]}", flush=True)
    return runs


def time_baseline(folder: Path, options: dict[str, object], repeat: int, timeout_s: float) -> list[dict[str, float]]:
    """`repeat` runs of transformers + peft on the same files and shapes."""
    names = ("data.max_seq_len", "run.global_batch_size", "run.micro_batch_size", "model.activation_checkpointing")
    args = [f"--{name.split('.')[1]}={options[name]}" for name in names if name in options]
    command = [str(REPO / "scripts/baselines/hf_peft.py"), f"--config={folder / 'model'}", "--first_step", *args]
    runs = []
    with tempfile.TemporaryDirectory() as caches:
        for _ in range(repeat):
            runs.append(seconds_until(HF_LINES, command, caches_in(Path(caches)), timeout_s))
            print(f"hf_peft: {runs[-1]}", flush=True)
    return runs


def reduce_runs(runs: list[dict[str, float]]) -> dict:
    """The run of median time (of an even number the faster of the middle two), and the seconds of all."""
    ordered = sorted(runs, key=lambda run: run["step 1"])
    median = ordered[(len(runs) - 1) // 2]
    return {"seconds": median["step 1"], "until": median, "all_seconds": [run["step 1"] for run in runs]}


def table(columns: dict[str, dict]) -> str:
    """Seconds from the start of the process to each line, of the median runs."""
    lines = ["seconds until" + "".join(f"{name:>10}" for name in columns)]
    for name in LINES:
        cells = [column["until"].get(name) for column in columns.values()]
        lines.append(f"{name:<13}" + "".join(f"{'-' if cell is None else format(cell, '.2f'):>10}" for cell in cells))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", choices=["hf_peft"], help="transformers + peft in the same call; needs them on the path")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each kind; the median counts (default: 1)")
    more = "one more of the recipe's; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=more)
    parser.add_argument("--folder", type=Path, help="where the model is written and stays (default: a temporary one, removed)")
    parser.add_argument("--timeout", type=float, default=240, metavar="S", help="seconds, of one run (default: 240)")
    parser.add_argument("--records", type=Path, default=REPO / "docs/records.jsonl", help="a JSON line is appended here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on the CPU too; records nothing")
    args = parser.parse_args()
    if args.repeat < 1:
        raise SystemExit(f"error: --repeat is {args.repeat}; write 1 or more")
    if wrong := [option for option in args.option if "=" not in option]:
        raise SystemExit(f"error: --option {wrong[0]} is not KEY=VALUE, such as model.quantize=nf4")
    return args


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Everything but where and with what it was measured: the record's cold, warm and baselines."""
    config, options = (TINY, TINY_OPTIONS) if args.dry_run else bench_recipe.case_overrides(CASE)
    options = options | ({"model.dtype": "float32"} if args.dry_run else {})
    start = time.perf_counter()
    num_tokens = 8 * STEPS * int(options["run.global_batch_size"]) * int(options["data.max_seq_len"])
    prepare(folder, config, TINY_FILE_BYTES if args.dry_run else FILE_BYTES, num_tokens)
    written = time.perf_counter() - start
    start = time.perf_counter()
    size = read_once(folder / "model")
    rate = size / (time.perf_counter() - start) / 1e9
    print(f"{size / 2**30:.2f} GiB of weights: there after {written:.1f} s, then read at {rate:.1f} GB/s", flush=True)
    more = dict(option.split("=", 1) for option in args.option)
    runs = time_recipe(folder, options | more, args.repeat, args.timeout)
    record = {kind: reduce_runs(found) for kind, found in runs.items()} | {"baselines": {}}
    if args.baseline:
        try:
            record["baselines"][args.baseline] = reduce_runs(time_baseline(folder, options, args.repeat, args.timeout))
        except NoStep as error:
            print(f"FAILED, and the record is without it: {error}", flush=True)
    return record


def main() -> None:
    args = parse_arguments()
    sys.path.insert(0, str(REPO))  # for the process that writes the weights; the timed ones are told in caches_in
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here; --dry-run shows on any machine what is done")
    try:
        with ExitStack() as stack:
            if args.folder:
                args.folder.mkdir(parents=True, exist_ok=True)
            folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = measure(folder.resolve(), args)
    except (NoStep, OSError) as error:
        raise SystemExit(f"error: {error}; nothing is recorded") from None
    print(table({"cold": found["cold"], "warm": found["warm"], **found["baselines"]}))
    if args.dry_run:
        return
    options = [f"--baseline {name}" for name in filter(None, [args.baseline])] + [f"--option {option}" for option in args.option]
    command = " ".join(["python scripts/bench_start.py", *[f"--repeat {args.repeat}"] * (args.repeat > 1), *options])
    with args.records.open("a") as out:
        out.write(json.dumps({"case": RECORD, **bench_recipe.environment(1), "command": command, **found}) + "\n")


if __name__ == "__main__":
    main()
