"""The same seed twice: 100 steps of every recipe give the same log, digit for digit, and the same weights. PITFALLS 2d."""

from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_runs import RECIPES, Runs
from scale import SEED, scaled
from tiny_training import hide_cuda

WAYS = [(recipe, max(counts)) for recipe, counts in RECIPES.items()]


@pytest.mark.parametrize("recipe, processes", WAYS if scaled(0, 1) else WAYS[:1])
def test_bit_for_bit(
    recipe: str, processes: int, small_model: Path, rows_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    hide_cuda(monkeypatch)
    steps = scaled(10, 100)
    more = [f"run.seed={SEED}", f"run.max_steps={steps}", "run.epochs=40", "run.eval_every=20", "run.save_every=0"]
    runs = Runs(recipe, processes, small_model, rows_of(recipe), tmp_path, *more)
    assert len([record for record in runs.expected[0] if "loss" in record]) == steps
    runs.finish("again")
    tally(1, "pairs of runs", f"{steps} steps each")


def test_another_seed_is_another_run(small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)
    logs = []
    for seed in (SEED, SEED + 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        runs = Runs("lora_single_device", 1, small_model, chat_data, folder, f"run.seed={seed}", "run.max_steps=3")
        logs.append([record["loss"] for record in runs.expected[0] if "loss" in record])
    assert all(one != other for one, other in zip(*logs, strict=True))
