"""A process that raises, is killed or stalls in a run under `tune run`: the job ends soon, and says whose fault it was."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import problems, run_processes
from test_lora_single_device import log_records
from tiny_training import hide_cuda

from torchft.parse import parse
from torchft.recipes import full_finetune_distributed

BROKEN = '''
import os, signal, time
from datetime import timedelta

import torchft.distributed
from torchft.parse import parse
from torchft.ranks import rank
from torchft.recipes import full_finetune_distributed as recipe

torchft.distributed.STALLED = timedelta(seconds={patience})


def broken(*args, **kwargs):
    {what}


if rank() == 1:
    {where} = broken
recipe.main(parse(recipe.Config))
'''
PATIENCE = 12  # seconds for which processes wait for a stalled one; on a busy machine one may begin by so many later
RAISE, KILL, STALL = 'raise RuntimeError("the disk is gone")', "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(300)"


def arguments(model: Path, data: Path, out: Path) -> list[str]:
    values = {"model.path": model, "model.dtype": "float32", "data.train": data, "run.out": out, "data.packing": "false"}
    values |= {"data.max_seq_len": 128, "run.max_steps": 2, "run.save_every": 1, "run.sample_rows": 0, "data.valid_fraction": 0.25}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(
    "where, what, last",
    [
        ("recipe.PartsWriter._write_part", RAISE, "RuntimeError: the disk is gone"),
        ("recipe.set_lr", KILL, "it was ended by SIGKILL, which is often the kernel's answer to memory running out"),
        ("recipe.batch_loss", STALL, "    time.sleep(300)"),
    ],
    ids=["raises while saving", "killed", "stalled"],
)
def test_the_job_ends_with_the_cause_last(
    small_model: Path, chat_data: Path, tmp_path: Path, where: str, what: str, last: str
) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(BROKEN.format(where=where, what=what, patience=PATIENCE if what == STALL else 600))
    started = time.monotonic()
    command = [sys.executable, "-m", "torchft", "run", "--nproc_per_node", "2", str(file), *arguments(small_model, chat_data, out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode not in (0, 2), run.stderr
    assert run.stderr.rstrip().splitlines()[-1] == last
    if "time.sleep" in last:
        assert "\nrank 1 had not come; it stood at\n" in run.stderr
    else:
        assert "\nrank 1 failed first" in run.stderr
    assert time.monotonic() - started < 45  # of which the start takes 5 to 15
    for step in out.glob("step_*"):
        assert (step / "manifest.json").exists() or step.suffix == ".tmp"


def test_two_nodes_on_one_host_give_the_curve_of_one(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers that meet by torchrun's own options; one directory for both."""
    hide_cuda(monkeypatch)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path / name for name in ("one", "two")]
    cfg = parse(full_finetune_distributed.Config, arguments(small_model, chat_data, outs[0]))
    assert run_processes(1, lambda _: full_finetune_distributed.main(cfg), tmp_path) == [0], problems(tmp_path)
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    recipe = ["full_finetune_distributed", *arguments(small_model, chat_data, outs[1])]
    command = [sys.executable, "-m", "torchft", "run", *meeting, *recipe]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launchers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    results = [(launcher.communicate(timeout=120)[1], launcher.returncode) for launcher in launchers]
    assert [code for _, code in results] == [0, 0], results
    for record, wanted in zip(log_records(outs[1]), log_records(outs[0]), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5)
    assert len(list((outs[1] / "step_000002").glob("shard-*"))) == 2  # each node wrote its part
