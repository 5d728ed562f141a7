"""The recipes, killed at any file operation and at any time: on 1 and 2 processes they go on bit for bit. PITFALLS K1, K5 and 2b."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import die_at_operation, list_operations
from recipe_runs import SAVE_EVERY, WAYS, Runs
from scale import random_of, scaled, spread
from tiny_training import hide_cuda


@pytest.fixture
def runs(
    request: pytest.FixtureRequest, small_model: Path, rows_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runs:
    hide_cuda(monkeypatch)
    return Runs(*request.param, small_model, rows_of(request.param[0]), tmp_path)


def check_and_finish(runs: Runs, name: str) -> None:
    # Written in parts, a step may still be on its way to the disk when the next one that is to be saved comes.
    at_most = SAVE_EVERY * (2 if hasattr(runs.module, "PartsWriter") else 1)
    assert runs.lost(name) <= at_most
    runs.finish(name)


FEW = [("lora_single_device", 1), ("full_finetune_distributed", 1)]


@pytest.mark.parametrize("runs", WAYS if scaled(0, 1) else FEW, ids=str, indirect=True)
def test_at_any_file_operation(runs: Runs, tmp_path: Path, tally: Callable) -> None:
    """Of the first process, from the log's first line to the export's last name."""
    listed, killed = tmp_path / "operations", 0
    runs.go("listed", lambda module, rank: list_operations(runs.out("listed"), listed) if rank == 0 else None)
    total = len(listed.read_text().splitlines())
    for number in spread(total - 1, scaled(1, 14 // runs.processes)):
        codes = runs.go("run", lambda module, rank: die_at_operation(runs.out("run"), number) if rank == 0 else None)  # noqa: B023
        killed += codes[0] == -signal.SIGKILL
        check_and_finish(runs, "run")
    tally(killed, "file operations")


@pytest.mark.parametrize("runs", WAYS if scaled(0, 1) else [("lora_distributed", 2)], ids=str, indirect=True)
def test_at_a_random_time(runs: Runs, tally: Callable) -> None:
    """kill -9 from outside the code's order: one process, drawn anew; each second life is killed again."""
    random, killed, asked = random_of("time", runs.recipe, runs.processes), 0, time.monotonic()
    runs.go("timed", lambda module, rank: None)
    lasts = time.monotonic() - asked
    for turn in range(scaled(1, 20 if runs.processes == 1 else 16)):
        for _ in range(1 + turn % 2):
            victim, moment = random.randrange(runs.processes), random.uniform(0, lasts)
            codes = runs.go("run", lambda module, rank: die_in(moment) if rank == victim else None)  # noqa: B023
            assert codes[victim] in (0, -signal.SIGKILL), runs.said
            killed += codes[victim] == -signal.SIGKILL
        check_and_finish(runs, "run")
    tally(killed, f"random kills on {runs.processes}")


def die_in(seconds: float) -> Any:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


