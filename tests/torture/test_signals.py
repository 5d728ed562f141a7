"""SIGTERM to one process of a run, in each phase: saved at the current step, out in time, and the run goes on bit for bit. PITFALLS K8.

While loading there is nothing to save, and the run ends at once. A first step that compiles, a validation and the answers printed
with it are finished first: a validation broken off would have to be repeated after the resume, and its figure decides which
checkpoint is kept as the best; a preemption's grace must cover one.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import STEPS, WAYS, Runs
from scale import random_of, scaled
from tiny_training import hide_cuda

# Phase -> (function of the recipe's module, its call during which the signal comes, the step after which the run is saved).
# Validation is every third step, saving every second; set_lr and batch_loss begin a step.
PHASES = {
    "load": ("load_weights", 1, 0),
    "first step": ("set_lr", 1, 1),
    "step": ("set_lr", 4, 4),
    "validation": ("evaluate", 1, 3),
    "answers": ("answer_examples", 1, 3),
    "save": ("save", 1, 3),  # at step 2; heeded after the next one
}


@pytest.fixture
def runs(
    request: pytest.FixtureRequest, small_model: Path, rows_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runs:
    hide_cuda(monkeypatch)
    return Runs(*request.param, small_model, rows_of(request.param[0]), tmp_path)


def signal_in(module: Any, function: str, call: int) -> None:
    """In this process, SIGTERM at the beginning of the `call`-th call."""
    holder, name = module, function
    if function == "save":
        holder, name = (module.PartsWriter, "save") if hasattr(module, "PartsWriter") else (module, "save_checkpoint")
    original, calls = getattr(holder, name), []

    def signalled(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    setattr(holder, name, signalled)


@pytest.mark.parametrize("runs", WAYS if scaled(0, 1) else [("full_finetune_distributed", 2)], ids=str, indirect=True)
def test_to_one_process_in_any_phase(runs: Runs, tally: Callable) -> None:
    random, slowest = random_of("signal", runs.recipe, runs.processes), 0.0
    # a reward model gives no answers
    others = [phase for phase in PHASES if phase != "validation" and (phase != "answers" or hasattr(runs.module, "answer_examples"))]
    phases = ["validation", *random.sample(others, scaled(1, len(others)))]
    for phase in phases:
        function, call, step = PHASES[phase]
        call += phase == "validation" and any(record["step"] == 0 for record in runs.expected[0])  # the first one, before the first step
        one, began = random.randrange(runs.processes), time.monotonic()
        codes = runs.go("run", lambda module, rank: signal_in(module, function, call) if rank == one else None)  # noqa: B023
        slowest = max(slowest, time.monotonic() - began)
        if phase == "load":
            assert codes[one] == -signal.SIGTERM and 0 not in codes, runs.said
        else:
            assert codes == [128 + signal.SIGTERM] * runs.processes, (phase, codes, runs.said)
            assert "SIGTERM: saving after this step" in runs.said or one > 0
        assert runs.newest("run") == step < STEPS, phase
        runs.finish("run")
    assert slowest < 30
    tally(len(phases), "signals", **{"seconds of the slowest run, from its start to its end": slowest})
