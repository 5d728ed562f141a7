"""A recipe's loop in milliseconds, over each way to save: what is killed hundreds of times and must end as if never.

    whole  torchft/checkpoint.py: LoRA, and every recipe that trains few parameters, on one or several processes
    parts  torchft/parts.py: models trained whole, written in a thread while the next steps run

A recipe with another saver is one more entry of SAVERS. Log, resume, keep-best and pruning are those of the recipes.
"""

import fcntl
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import fork, problems, run_processes
from safetensors.torch import load_file, save_file
from tiny_training import assert_same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from torchft.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.distributed import join_processes, leave_processes, sum_over_processes
from torchft.metrics import DETERMINISTIC_FIELDS, RunLogger
from torchft.modules.sharding import whole
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer
from torchft.parts import PartsWriter, load_parts
from torchft.ranks import rank, world_size

SAVERS = {"whole": (1, 2), "parts": (1, 2)}  # saver -> numbers of processes
STEPS = 5
OPTIM = OptimConfig(lr=0.01, warmup_steps=2)


class _Whole:
    """save_checkpoint under PartsWriter's names."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def save(self, step: int, **what: Any) -> None:
        save_checkpoint(self.out, step, **what)

    def check(self) -> None:
        """Nothing runs in the background."""

    wait = check


def train(out: Path, saver: str, state_file: Path) -> None:
    """The whole run, from wherever `out` allows it to go on; weights, moments and random states of its end go to `state_file`."""
    run = RunConfig(out=str(out), log_every=2, keep_last=1, keep_best=True, resume="auto", global_batch_size=2)
    joined = saver == "parts" or world_size() > 1
    if joined:
        join_processes(ModelConfig(), OPTIM, run)
    config = {"run": vars(run)}
    log = RunLogger(run, config, torch.device("cpu"))
    checkpoint = find_checkpoint(run.out, run.resume, config, log.print)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 23, bias=False), nn.Dropout(0.3), nn.RMSNorm(23))  # 23 rows on 2 processes
    if joined:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    params = dict(model.named_parameters())
    optimizer = build_optimizer(params, OPTIM)
    torch.manual_seed(100 + rank())
    start, log_state = 0, None
    if checkpoint:
        load = load_parts if saver == "parts" else load_checkpoint
        state = load(checkpoint, params=params, optimizer=optimizer, unchanged={"data": "d"})
        start, log_state = state["step"], state["log"]
    log.begin(total_steps=STEPS, steps_per_epoch=STEPS, start_step=start, state=log_state)
    writer = PartsWriter(out) if saver == "parts" else _Whole(out)
    for step in range(start + 1, STEPS + 1):
        loss = model(torch.randn(4, 24)).square().sum()
        (loss / 8).backward()
        loss = sum_over_processes(loss.detach().clone())
        norm, found_inf = clip_and_check(params, 1.0, loss)
        lr = lr_at(step - 1, STEPS, OPTIM)
        set_lr(optimizer, lr)
        step_optimizer(optimizer, found_inf)
        optimizer.zero_grad()
        log.step(step, loss=loss, supervised=8, tokens=8, lr=lr, grad_norm=norm, found_inf=found_inf)
        writer.check()
        valid_loss = None
        if step % 2 == 1:
            valid_loss = [3.0, 1.0, 2.0][step // 2]  # the best is step 3, which pruning must spare
            log.validation(step, valid_loss=valid_loss)
        if step != 4:  # saved after steps 1, 2, 3 and 5
            state = {"data": "d", "log": log.state()}
            kept = {"keep_last": run.keep_last, "valid_loss": valid_loss}
            writer.save(step, params=params, optimizer=optimizer, state=state, config=config, **kept)
    writer.wait()
    log.close()
    final = _state(params, optimizer)
    if rank() == 0:
        save_file(final, state_file)
    if joined:
        leave_processes()


def _state(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and this process's random state, whole."""
    tensors = {name: whole(param.detach()).clone() for name, param in params.items()}
    for name, param in params.items():
        tensors |= {f"{name}/{key}": whole(value).clone() for key, value in optimizer.state[param].items()}
    return tensors | {"torch": torch.get_rng_state()}


def in_children(work: Callable[[int], None], processes: int, folder: Path) -> tuple[list[int], str]:
    """`work(rank)` in forked children, one alone or several that meet: their exit codes, and all that they printed.

    They print into a pipe: a file would be under the same limits as those that they write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)

    def speak(rank: int) -> None:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  (as long as the process)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and stays locked when one is killed while it prints
        work(rank)

    def alone() -> int:
        try:
            speak(0)
        except SystemExit as left:
            return left.code
        return 0

    codes = [fork(alone)] if processes == 1 else run_processes(processes, speak, folder)
    os.close(writing)
    with open(reading, errors="replace") as said:
        return codes, said.read() + problems(folder)


def result(out: Path, state_file: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """The log's deterministic fields, and the tensors of the end."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in DETERMINISTIC_FIELDS if name in line} for line in lines], load_file(state_file)


def assert_same_end(ours: tuple[list[dict], dict], expected: tuple[list[dict], dict]) -> None:
    """Log, weights, moments and random states, bit for bit."""
    assert ours[0] == expected[0]
    assert_same(ours[1], expected[1])
