"""Secrets in the environment and the config of a run: in none of its files, in nothing that it prints. PITFALLS S6."""

from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_runs import RECIPES, Runs
from scale import scaled
from tiny_training import hide_cuda

CANARIES = {
    "HF_TOKEN": "hf_canarycanarycanarycanarycanary01",
    "WANDB_API_KEY": "c0ffee" * 7,
    "AWS_SECRET_ACCESS_KEY": "canary/in+the/environment",
    "OPENAI_API_KEY": "sk-canary0canary0canary0canary0",
}
WAYS = [(recipe, max(counts)) for recipe, counts in RECIPES.items()]


@pytest.mark.parametrize("recipe, processes", WAYS if scaled(0, 1) else WAYS[:1])
def test_no_secret_leaves_a_run(
    recipe: str, processes: int, small_model: Path, rows_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    hide_cuda(monkeypatch)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / CANARIES["HF_TOKEN"]  # one in an option too, which is printed and written everywhere
    folder.mkdir()
    runs = Runs(recipe, processes, small_model, rows_of(recipe), folder, "run.max_steps=2")
    assert "run: out=" in runs.said and not any(canary in runs.said for canary in CANARIES.values())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert not any(canary.encode() in content for canary in CANARIES.values()), path.name
    tally(1, "runs", f"{len(CANARIES)} canaries")
