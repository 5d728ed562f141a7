"""Behind `tune check`: which rows, how much of the model, and the table of torchft/invariances.py.

A model that fits into half of the free memory, in fp32 with its gradients, is checked as it is; of a larger one the first layers that
fit, with random weights, which is said. What is compared is one step, so a minute or two tell.
"""

from dataclasses import replace

import torch

from torchft.checks import counted
from torchft.config import resolve_path
from torchft.dry_run import Options, WholeOptions, build, load_data, load_text, options_for
from torchft.errors import UserError
from torchft.invariances import TOLERANCE, Check, Subject, difference, list_checks
from torchft.model_dir import available_memory
from torchft.models import build_model
from torchft.models import read_config as read_model_config
from torchft.parse import read_config

BYTES_PER_WEIGHT = 16  # weights and gradients in fp32, of two models at once
MARKS = {True: "equal", False: "DIFFERS"}


def check(config: str, overrides: list[str], rows: int, layers: int, recipe: str = "") -> bool:
    """Prints the table; True if nothing differs. Raises UserError for a config or data that cannot be used.

    rows: of the data's first step; layers: of the model, 0 for as many as fit; recipe: as in dry_run.options_for.
    """
    recipe, options, kind = options_for(config, overrides, recipe)
    if kind != "sft":
        raise UserError(f"tune check computes steps of cross entropy, and {recipe} has a loss of {kind}: check the same model with a lora or a full config")
    cfg = read_config(options, config, overrides, training=False)
    subject = choose(cfg, rows, layers)
    print(f"{'check':<24} {'difference':>10}  verdict", flush=True)
    first, *others = list_checks(subject)
    expected = first.compute()
    failed = []
    for one in (first, *others):
        if one.skipped:
            print(f"{one.name:<24} {'':>10}  skipped: {one.skipped}", flush=True)
            continue
        distance, worst = difference(one.compute(), expected)
        equal = distance <= (0.0 if one is first and subject.device.type == "cpu" else TOLERANCE)
        where = "" if equal else f": {one.option}, most of all in {worst}"
        print(f"{one.name:<24} {distance:>10.1e}  {MARKS[equal]}{where}", flush=True)
        failed += [] if equal else [one]
    print(verdict(failed))
    return not failed


def choose(cfg: WholeOptions, rows: int, layers: int) -> Subject:
    """The subject of the checks, which is said in lines."""
    tokenizer, template = load_text(cfg)
    build(cfg, tokenizer.added_ids)  # what cannot be trained is said without a traceback, and before the data is read
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    total, fitting = _layers(cfg, tokenizer.added_ids, device)
    if layers > total:
        raise UserError(f"--layers is {layers}, the model has {total}")
    layers = layers or fitting
    loader, _ = load_data(cfg, "sft", tokenizer, template)
    samples = loader.step_samples(0)[:rows]
    random = cfg.model.weights == "random" or layers < total
    what = f"{layers} of {total} layers, " * (layers < total) + ("random weights" if random else "its own weights")
    tokens = int(loader.dataset.lengths[samples].sum())
    print(f"model: {cfg.model.path}, {what}, in fp32 on {device}")
    print(f"data:  {counted(len(samples), 'row')} of the first step, {tokens:,} tokens; tolerance {TOLERANCE:.0e}, relative, of every gradient")
    if isinstance(cfg, Options) and cfg.lora.dropout:
        print(f"exempt: lora.dropout={cfg.lora.dropout} draws other masks for another cut of a step, and is 0 here")
        cfg = replace(cfg, lora=replace(cfg.lora, dropout=0.0))
    if cfg.model.quantize == "fp8":
        print("exempt: model.quantize=fp8 rounds activations by each token's own scale, and is none here")
        cfg = replace(cfg, model=replace(cfg.model, quantize="none"))
    return Subject(cfg, loader.dataset, samples, layers, random, tokenizer.added_ids, device)


def _layers(cfg: WholeOptions, new_ids: range, device: torch.device) -> tuple[int, int]:
    """(layers of the model, how many of them fit into half of the free memory)."""
    with torch.device("meta"):
        model = build_model(read_model_config(resolve_path(cfg.model.path)))
    blocks = model.model.layers
    of_a_block = sum(param.numel() for param in blocks[0].parameters())
    rest = sum(param.numel() for param in model.parameters()) - of_a_block * len(blocks)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    fitting = int(free / 2 / BYTES_PER_WEIGHT - rest) // of_a_block
    return len(blocks), max(1, min(len(blocks), fitting))


def verdict(failed: list[Check]) -> str:
    """The last line."""
    if not failed:
        return "nothing differs: a step on this machine does not depend on how it is computed"
    return f"{counted(len(failed), 'check')} of this machine and config differ: " + "; ".join(f"{one.name} ({one.option})" for one in failed)
