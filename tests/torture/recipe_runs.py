"""The recipes themselves, as users start them, in forked children: short runs that are attacked and must end as if never.

A recipe that is added is one more entry of RECIPES (and of rows_of in conftest.py, where it needs other data).
"""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from test_lora_single_device import log_records
from tiny_loop import in_children
from tiny_training import assert_same

from torchft.parse import parse
from torchft.run_dir import checkpoints, verify_checkpoint

RECIPES = {  # -> numbers of processes
    "lora_single_device": (1,), "lora_distributed": (1, 2), "full_finetune_distributed": (1, 2),
    "dpo_distributed": (1, 2), "dpo_distributed, all weights": (2,), "kto_distributed": (2,), "reward_distributed": (2,),
}  # fmt: skip
WAYS = [(recipe, processes) for recipe, counts in RECIPES.items() for processes in counts]
STEPS, SAVE_EVERY = 6, 2
Arm = Callable[[Any, int], None]  # (the recipe's module, rank), called in the child


def module_of(recipe: str) -> Any:
    return importlib.import_module(f"torchft.recipes.{recipe.partition(',')[0]}")


def options(recipe: str, model: Path, data: Path, out: Path, *more: str) -> Any:
    """Six steps of four rows, validated every third, saved every second; dropout where the recipe has it."""
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "run.epochs": 9, "run.max_steps": STEPS, "run.global_batch_size": 4, "optim.lr": 0.003}
    values |= {"optim.warmup_steps": 2, "run.micro_batch_size": 2, "run.max_new_tokens": 3, "run.sample_rows": 1}
    values |= {"data.valid_fraction": 0.25, "run.eval_every": 3, "run.save_every": SAVE_EVERY, "run.keep_best": "true"}
    values |= {"run.resume": "auto"}
    if not recipe.startswith("full"):
        values |= {"lora.rank": 4, "lora.dropout": 0.1 if recipe.startswith("lora") else 0}
    if recipe.endswith("all weights"):
        values |= {"lora.rank": 0, "optim.lr": 0.001}
    values |= dict(text.split("=", 1) for text in more)
    return parse(module_of(recipe).Config, [f"{key}={value}" for key, value in values.items()])


class Runs:
    """Runs of one recipe on a number of processes, and what the one that was never stopped left."""

    def __init__(self, recipe: str, processes: int, model: Path, data: Path, folder: Path, *more: str) -> None:
        self.recipe, self.processes, self.folder = recipe, processes, folder
        self.module = module_of(recipe)
        self.cfg = options(recipe, model, data, folder / "any", *more)
        codes = self.go("straight", lambda module, rank: None)
        assert codes == [0] * processes, self.said
        self.expected = self.result("straight")

    def out(self, name: str) -> Path:
        return self.folder / name

    def go(self, name: str, arm: Arm) -> list[int]:
        """One life of the run `name`; exit codes."""
        cfg = replace(self.cfg, run=replace(self.cfg.run, out=str(self.out(name))))

        def live(rank: int) -> None:
            arm(self.module, rank)
            self.module.main(cfg)

        life = self.folder / f"{name}_life"
        shutil.rmtree(life, ignore_errors=True)
        codes, self.said = in_children(live, self.processes, life)
        return codes

    def finish(self, name: str) -> None:
        """The run goes on without help, and ends bit for bit as the one that was never stopped."""
        codes = self.go(name, lambda module, rank: None)
        assert codes == [0] * self.processes, self.said
        log, tensors = self.result(name)
        assert log == self.expected[0]
        # Killed while the last save pruned, a run has no later save to remove an older checkpoint that was to go.
        last = f"step_{STEPS:06d}"
        assert all(key.startswith("step_") and key < last for key in tensors.keys() - self.expected[1].keys())
        assert_same({key: tensors[key] for key in tensors.keys() & self.expected[1].keys()}, self.expected[1])
        shutil.rmtree(self.out(name))

    def result(self, name: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """The log, and every tensor of the checkpoints that are left (weights, moments, generators) and of what was exported."""
        out, tensors = self.out(name), {}
        for file in sorted(out.glob("*/*.safetensors")):
            held = load_file(file)
            tensors |= {f"{file.relative_to(out)}/{name}": tensor for name, tensor in held.items()}
        assert any(name.startswith(("adapter", "model")) for name in tensors)
        return log_records(out), {name: tensor for name, tensor in tensors.items() if not name.startswith("earlier")}

    def newest(self, name: str) -> int:
        """Step of the newest checkpoint, all of which verify; 0 if there is none."""
        steps = checkpoints(self.out(name))
        for path in steps.values():
            verify_checkpoint(path)
        return max(steps, default=0)

    def lost(self, name: str) -> int:
        """Steps that the log has and the newest checkpoint has not."""
        file = self.out(name) / "log.jsonl"
        text = file.read_text() if file.exists() else ""
        return len([line for line in text.splitlines() if '"lr"' in line]) - self.newest(name)
