"""How far the recipe moves bf16 weights that are rounded stochastically, against fp32 ones: full fine-tuning from one model.

    python scripts/update_norm.py                          # Llama-3.2-1B's shapes: bench_recipe.py's full_1b cases, on a GPU
    python scripts/update_norm.py --steps 100 --json out/update_norm.json
    python scripts/update_norm.py --tiny                   # tiny shapes, on any device

A model of random weights in bf16 is written once, and three runs load it, none of which clips gradients:

    fp32           fp32 weights, and fp32 in all that is computed: the others are held against it
    fp32_master    fp32 weights, which forward and backward see rounded to bf16: the recipe's default
    bf16           bf16 weights, rounded stochastically: optim.name=adamw_bf16 with optim.in_backward=true

From the weights in each one's last checkpoint the start is subtracted:

    norm     |update| / |fp32's update|        rounded to the nearest, small updates are lost: 0.34 after 100 steps of lr 2e-5
    along    (update . fp32's update) / |fp32's update|^2       stochastic rounding's own random walk adds to the norm, not to this
    cosine   of the two

Exit code 1 where bf16's norm is below 0.98 or its share along fp32's below 0.9: gradients of the runs differ more from step to
step, so that this one is no measure of rounding alone (tests/test_adamw_bf16.py: 0.998 for one sequence of gradients).
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_recipe
import bench_start
from safetensors import safe_open
from torch import Tensor

RUNS = {  # -> the case whose options it has, and more
    "fp32": ("full_1b_fp32master_2048x4_noac", ["model.dtype=float32"]),
    "fp32_master": ("full_1b_fp32master_2048x4_noac", []),
    "bf16": ("full_1b_bf16_2048x4_noac", ["optim.in_backward=true"]),
}
NORM, ALONG = 0.98, 0.9


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a model directory, or of a checkpoint, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in (name for name in opened.keys() if not name.startswith("optimizer/")):  # noqa: SIM118  (it is no dict)
                yield name.removeprefix("params/"), opened.get_tensor(name)


def compare(start: Path, fp32: Path, other: Path) -> dict[str, float]:
    """norm, along and cosine of two updates of one model, over all weights. Raises SystemExit where they are not of one model."""
    squares, along = [0.0, 0.0], 0.0
    ends = [dict(tensors(folder)) for folder in (fp32, other)]
    count = 0
    for count, (name, before) in enumerate(tensors(start), start=1):
        if any(name not in end or end[name].shape != before.shape for end in ends):
            raise SystemExit(f"error: {name} of {start} is not in both results")
        one, two = (end[name].double() - before.double() for end in ends)
        squares[0] += one.square().sum().item()
        squares[1] += two.square().sum().item()
        along += (one * two).sum().item()
    if not squares[0]:
        raise SystemExit(f"error: no weight of {fp32} has moved")
    cosine = along / math.sqrt(squares[0] * squares[1]) if squares[1] else 0.0
    return {"norm": math.sqrt(squares[1] / squares[0]), "along": along / squares[0], "cosine": cosine, "weights": count}


def run_all(folder: Path, tiny: bool, steps: int, timeout_s: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """What `compare` says of each run but fp32's, from one start; and the figures of each. All is written into `folder`."""
    config = bench_start.TINY | {"tie_word_embeddings": True} if tiny else bench_recipe.model_config("1b")
    shapes = [f"{key}={value}" for key, value in bench_start.TINY_OPTIONS.items()] if tiny else []
    start, figures = folder / "start/model", {}
    bench_start.prepare(start.parent, config, bench_start.FILE_BYTES, num_tokens=1)
    for run, (case, options) in RUNS.items():
        options = [*options, "optim.max_grad_norm=0", f"model.path={start}", "model.weights=pretrained", f"run.out={folder / run}"]
        options += [f"run.max_steps={steps}", f"run.save_every={steps}"]
        command = ["-m", "torchft", "run", "full_finetune_distributed"]
        figures[run] = bench_recipe.measure(command, case, timeout_s, 1, options + shapes)
        shutil.rmtree(folder / run / "model")  # the disk is needed for checkpoints
    ends = {run: folder / run / f"step_{steps:06d}" for run in RUNS}
    return {run: compare(start, ends["fp32"], end) for run, end in ends.items() if run != "fp32"}, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each run; the first 10 are warm-up of the learning rate, to 2e-5")
    parser.add_argument("--timeout", type=int, default=240, help="seconds per run")
    parser.add_argument("--json", type=Path, help="everything measured is written here")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args()
    if not args.tiny:
        bench_recipe.check([case for case, _ in RUNS.values()], [], 0)
    with tempfile.TemporaryDirectory() as name:
        updates, figures = run_all(Path(name), args.tiny, args.steps, args.timeout)
    for run, of in figures.items():
        print(f"{run}: {of['tokens_per_s']:,} tokens/s, {of['peak_alloc_gib']} GiB, loss {of['loss_first']:.4f} to {of['loss_last']:.4f}")
    for run, update in updates.items():
        print(f"{run}'s update: {{norm:.3f}} of fp32's norm, {{along:.3f}} along it, cosine {{cosine:.3f}}".format(**update))
    if args.json:
        where = {} if args.tiny else bench_recipe.environment(0)
        args.json.write_text(json.dumps({**where, "steps": args.steps, "updates": updates, "runs": figures}, indent=1) + "\n")
    sys.exit(0 if updates["bf16"]["norm"] >= NORM and updates["bf16"]["along"] >= ALONG else 1)


if __name__ == "__main__":
    main()
