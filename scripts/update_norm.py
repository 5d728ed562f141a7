"""How far the recipe moves bf16 weights that are rounded stochastically, against fp32 ones: full fine-tuning, twice from one model.

    python scripts/update_norm.py                          # Llama-3.2-1B's shapes: bench_recipe.py's full_1b cases, on a GPU
    python scripts/update_norm.py --steps 100 --json out/update_norm.json
    python scripts/update_norm.py --tiny                   # tiny shapes, on any device

A model of random weights in bf16 is written once, and both runs load it: optim.name=adamw_bf16 over bf16 weights with updates in
backward, and adamw over fp32 ones, both computing in bf16. From the weights in each one's last checkpoint the start is subtracted:

    norm     |bf16 update| / |fp32 update|        rounded to the nearest, small updates are lost: 0.34 after 100 steps of lr 2e-5
    along    (bf16 update . fp32 update) / |fp32 update|^2       stochastic rounding's own random walk adds to the norm, not to this
    cosine   of the two

Exit code 1 where the norm is below 0.98 or the share along fp32's below 0.9: gradients of the two differ more from step to step, so
that this one is no measure of rounding alone (tests/test_adamw_bf16.py: 0.998 for one sequence of gradients).
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_recipe
import bench_start
from safetensors import safe_open
from torch import Tensor

RUNS = {  # -> the case whose options it has, and more
    "fp32": ("full_1b_fp32master_2048x4_noac", []),
    "bf16": ("full_1b_bf16_2048x4_noac", ["optim.in_backward=true", "optim.max_grad_norm=0"]),
}
NORM, ALONG = 0.98, 0.9


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a model directory, or of a checkpoint, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                if not name.startswith("optimizer/"):
                    yield name.removeprefix("params/"), opened.get_tensor(name)


def compare(start: Path, fp32: Path, bf16: Path) -> dict[str, float]:
    """norm, along and cosine of two updates of one model, over all weights. Raises SystemExit where they are not of one model."""
    squares, along = {"fp32": 0.0, "bf16": 0.0}, 0.0
    others = [dict(tensors(folder)) for folder in (fp32, bf16)]
    count = 0
    for count, (name, before) in enumerate(tensors(start), start=1):
        if any(name not in other or other[name].shape != before.shape for other in others):
            raise SystemExit(f"error: {name} of {start} is not in both results")
        one, two = (other[name].double() - before.double() for other in others)
        squares["fp32"] += one.square().sum().item()
        squares["bf16"] += two.square().sum().item()
        along += (one * two).sum().item()
    if not squares["fp32"]:
        raise SystemExit(f"error: no weight of {fp32} has moved")
    norms = {key: math.sqrt(value) for key, value in squares.items()}
    cosine = along / (norms["fp32"] * norms["bf16"]) if norms["bf16"] else 0.0
    return {"norm": norms["bf16"] / norms["fp32"], "along": along / squares["fp32"], "cosine": cosine, "weights": count}


def run_both(folder: Path, tiny: bool, steps: int, timeout_s: int) -> tuple[dict[str, float], dict[str, dict]]:
    """What `compare` says of two runs from one start, written into `folder` with it, and the figures of each run."""
    config = bench_start.TINY | {"tie_word_embeddings": True} if tiny else bench_recipe.model_config("1b")
    shapes = [f"{key}={value}" for key, value in bench_start.TINY_OPTIONS.items()] if tiny else []
    start, figures = folder / "start/model", {}
    bench_start.prepare(start.parent, config, bench_start.FILE_BYTES, num_tokens=1)
    for run, (case, options) in RUNS.items():
        options = [*options, f"model.path={start}", "model.weights=pretrained", f"run.out={folder / run}"]
        options += [f"run.max_steps={steps}", f"run.save_every={steps}"]
        command = ["-m", "torchft", "run", "full_finetune_distributed"]
        figures[run] = bench_recipe.measure(command, case, timeout_s, 1, options + shapes)
    return compare(start, *(folder / run / f"step_{steps:06d}" for run in RUNS)), figures


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
        update, figures = run_both(Path(name), args.tiny, args.steps, args.timeout)
    print("the update of bf16 weights: {norm:.3f} of fp32's norm, {along:.3f} along it, cosine {cosine:.3f}".format(**update))
    for run, of in figures.items():
        print(f"{run}: {of['tokens_per_s']:,} tokens/s, {of['peak_alloc_gib']} GiB, loss {of['loss_first']:.4f} to {of['loss_last']:.4f}")
    if args.json:
        where = {} if args.tiny else bench_recipe.environment(0)
        args.json.write_text(json.dumps({**where, "steps": args.steps, "update": update, "runs": figures}, indent=1) + "\n")
    sys.exit(0 if update["norm"] >= NORM and update["along"] >= ALONG else 1)


if __name__ == "__main__":
    main()
