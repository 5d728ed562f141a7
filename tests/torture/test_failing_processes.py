"""One process of a run under `tune run` raises, runs out of memory, is killed or stalls: all are gone in time, the cause is printed last.

PITFALLS D2 and 2b. A process that waits for another in torch's collectives gives up after torchft.distributed.STALLED, one that waits on
the host (for data, a checkpoint, an export) after HOST_TIMEOUT, which is a day because tokenising may take hours; both are
seconds here.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_runs import module_of
from scale import random_of, scaled
from test_faults import KILL, RAISE, STALL, arguments

BROKEN = '''
import os, signal, time
from datetime import timedelta
from pathlib import Path

import torchft.distributed
from torchft.parse import parse
from torchft.ranks import rank
from torchft.recipes import {recipe} as recipe

torchft.distributed.STALLED = torchft.distributed.HOST_TIMEOUT = timedelta(seconds={patience})


def broken(*args, **kwargs):
    Path({mark!r}).touch()
    {what}


if rank() == {rank}:
    recipe.{where} = broken
recipe.main(parse(recipe.Config))
'''
MEMORY = 'raise MemoryError("no memory is left")'
LAST = {
    RAISE: "RuntimeError: the disk is gone",
    MEMORY: "MemoryError: no memory is left",
    KILL: "it was ended by SIGKILL, which is often the kernel's answer to memory running out",
    STALL: "    time.sleep(300)",
}
LORA, FULL = "lora_distributed", "full_finetune_distributed"
PLACES = {"load": "load_weights", "data": "build_datasets", "step": "batch_loss", "validation": "evaluate"}
ENDS = {LORA: {"save": "save_checkpoint", "export": "save_adapter"}, FULL: {"save": "PartsWriter._write_part", "export": "save_model"}}
PATIENCE = 12  # seconds for which processes wait for a stalled one; on a busy machine one may begin by so many later
RUNS = [
    (FULL, 2, "load", STALL), (LORA, 2, "validation", RAISE), (FULL, 2, "data", MEMORY), (LORA, 2, "data", KILL),
    (LORA, 2, "step", STALL), (FULL, 2, "step", KILL), (LORA, 2, "load", RAISE), (FULL, 2, "validation", MEMORY),
    (FULL, 2, "save", KILL), (LORA, 2, "save", STALL), (FULL, 2, "export", RAISE), (LORA, 2, "export", STALL),
    (LORA, 4, "load", KILL), (FULL, 4, "data", STALL), (LORA, 4, "step", MEMORY), (FULL, 4, "validation", KILL),
    (LORA, 4, "save", RAISE), (FULL, 4, "export", MEMORY),
]  # fmt: skip


@pytest.mark.parametrize("recipe, processes, place, what", RUNS[: scaled(1, len(RUNS))])
def test_all_are_gone_and_the_cause_is_last(
    recipe: str, processes: int, place: str, what: str, small_model: Path, chat_data: Path, tmp_path: Path, tally: Callable
) -> None:
    where = PLACES.get(place) or ENDS[recipe][place]
    assert getattr(module_of(recipe), where.partition(".")[0])
    failing = random_of("failing", recipe, place).randrange(processes)
    file, mark = tmp_path / "mine.py", tmp_path / "mark"
    waiting = PATIENCE if what == STALL else 600
    file.write_text(BROKEN.format(recipe=recipe, patience=waiting, mark=str(mark), what=what, rank=failing, where=where))
    args = [*arguments(small_model, chat_data, tmp_path / "out"), f"run.global_batch_size={2 * processes}"]
    command = [sys.executable, "-m", "torchft", "run", "--nproc_per_node", str(processes), str(file), *args]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    seconds = time.time() - mark.stat().st_mtime
    assert run.returncode not in (0, 2), run.stderr
    assert run.stderr.rstrip().splitlines()[-1] == LAST[what], run.stderr
    assert f"\nrank {failing} {'had not come' if what == STALL else 'failed first'}" in run.stderr
    assert seconds < 30 + PATIENCE * (what == STALL)
    tally(1, "failures")
