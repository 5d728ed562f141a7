"""Several processes of a run on this machine, forked from the test, so that none of them imports torch again."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

PATIENCE = 120  # seconds


def run_processes(count: int, work: Callable[[int], None], folder: Path) -> list[int]:
    """`work(rank)` on `count` processes with torchrun's variables set; their exit codes, by rank.

    Tracebacks go to folder/rank_<n>.txt; all that still run after PATIENCE are killed, and where they stood goes to
    folder/rank_<n>_stacks.txt. The test must not have compiled
    anything before: a fork does not survive the compiler's workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(rank, count, port, work, folder)) for rank in range(count)]
    for child in children:
        child.start()
    deadline = time.monotonic() + PATIENCE
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill() if child.is_alive() else None
        child.join()
    return [child.exitcode for child in children]


def fork(action: Callable[[], int | None]) -> int:
    """Exit code of `action` in a child, which is what it returns; negative for a signal, 1 where it raises."""
    child = os.fork()
    if child == 0:
        _forget_the_parent()
        try:
            os._exit(action() or 0)
        except BaseException as error:  # else the child would go on as a second pytest
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _forget_the_parent() -> None:
    """In a fork: what other tests left in this worker does not act here."""
    gc.freeze()  # not collected: the destructor of a gloo group waits for threads that a fork lacks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, started in this process, leaves handlers of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _child(rank: int, count: int, port: int, work: Callable[[int], None], folder: Path) -> None:
    _forget_the_parent()
    stacks = open(folder / f"rank_{rank}_stacks.txt", "w")  # noqa: SIM115  (open as long as the process)
    faulthandler.dump_traceback_later(PATIENCE - 10, file=stacks)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        work(rank)
    except BaseException:
        (folder / f"rank_{rank}.txt").write_text(traceback.format_exc())
        raise


def problems(folder: Path) -> str:
    """What the processes raised, and where those stood that had to be killed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank_*.txt")))
