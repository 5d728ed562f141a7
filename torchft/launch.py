"""`tune run`: one process becomes the recipe, several are started by torchrun's own launcher.

One process: `exec python FILE ...`, so that a traceback begins in the user's file. Several: every option of torchrun
stands before the recipe and is read by torchrun's parser; when a rank fails, the first failing rank's traceback is
printed last and the launcher's own is not printed. Leaves out: setting up process groups, which a recipe does itself.
"""

import argparse
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torchft.checks import show
from torchft.crash import GAVE_UP
from torchft.errors import ConfigError, UserError
from torchft.names import RECIPES, find_config, find_recipe, forgotten_config, header_recipes

TORCHRUN_OPTIONS = ("--nproc", "--nnodes", "--node", "--rdzv", "--standalone", "--master", "--max-restarts")
USAGE = "tune run [torchrun's options] RECIPE [--config NAME|FILE] [key=value ...]"
WAITING = os.path.join("torch", "distributed")  # where a process stands that waits for others
LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|Connection refused")
LOST_SECONDS = 30  # after which another failure is no longer what ended a connection
SAVING_SECONDS = "600"  # that a job which is told to stop may take for its last checkpoint; the cluster may grant less
NO_RECIPE = "no recipe is given{}; " + f"{USAGE}; `tune ls` lists the recipes"


class Failure(NamedTuple):
    """What one failed process left behind."""

    rank: int  # over all nodes
    time: float  # seconds since 1970
    text: str  # what to print: its traceback, or its error line
    exit_code: int
    stack: str = ""  # of a process that left because of another: where it stood then


def run(argv: list[str]) -> NoReturn:
    """Runs a recipe and exits with its exit code; the command line after `tune run`."""
    if not argv:
        raise UserError(NO_RECIPE.format(""))
    if not argv[0].startswith("-"):
        check_order(argv[1:])
        path = find_recipe(argv[0])
        check_config(path, argv[1:])
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(path), *argv[1:]])
    sys.exit(run_workers(argv))


def tune_command() -> str:
    """`tune` as the user can type it: by its path where the shell would find none, or another environment's."""
    python = Path(sys.executable)
    tune = python.with_name("tune")
    if not tune.is_file():
        return f"{_typed(python)} -m torchft"
    found = shutil.which("tune")
    return "tune" if found and tune.samefile(found) else _typed(tune)


def _typed(path: Path) -> str:
    if not path.is_relative_to(Path.cwd()):
        return shlex.quote(str(path))
    inner = path.relative_to(Path.cwd())
    return shlex.quote(f"./{inner}" if len(inner.parts) == 1 else str(inner))


def check_order(arguments: list[str]) -> None:
    """torchrun's options belong before the recipe; after it they would reach the recipe, which knows none of them."""
    for argument in arguments:
        if argument.startswith(TORCHRUN_OPTIONS):
            raise UserError(f"{argument} is torchrun's and stands before the recipe: {USAGE}")


def check_config(recipe: Path, arguments: list[str]) -> None:
    """What a shipped recipe's arguments say of its config, before torch is imported: one without `--config` is refused, as the
    recipe would; of one whose header runs another recipe a line warns. Raises ConfigError.
    """
    if recipe.parent != RECIPES or {"--help", "-h"} & set(arguments):
        return
    for before, argument in zip(["", *arguments], arguments, strict=False):
        config = argument if before == "--config" else argument.removeprefix("--config=")
        if before == "--config" or config != argument:
            _warn_of_other_recipe(recipe.stem, config)
        elif advice := forgotten_config(argument):
            raise ConfigError(f"{show(argument)} is not understood; {advice}")


def _warn_of_other_recipe(recipe: str, config: str) -> None:
    named = header_recipes(find_config(config))
    if named and recipe.split("_")[0] not in [other.split("_")[0] for other in named]:  # lora_distributed is a twin
        line = f"WARNING: {config} is for {named[0]}, as its header says; {recipe} runs with its settings"
        print(line, file=sys.stderr, flush=True)


def run_workers(argv: list[str]) -> int:
    """Starts one process per rank with torchrun's launcher, waits for all of them, and returns the exit code."""
    # Read once, when torch is loaded. Of a node that is not up yet its C++ would print traces, as often as it tries again.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ and os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the processes speak as they always do
    args = parse_torchrun_options(argv)
    # torchrun's own lines about a failure (pid, "binary: python") or a signal say less than what is printed below.
    for name in ("torch.distributed.elastic", *logging.root.manager.loggerDict):  # modules set levels of their own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tune_run_") as log_dir:
        args.log_dir = args.log_dir or log_dir
        config, command, command_args = launch_config(args)
        if config.max_nodes > 1:
            waiting = f"waiting at {config.rdzv_endpoint} for the launchers of --nnodes={args.nnodes} nodes"
            print(waiting, file=sys.stderr, flush=True)
        try:
            elastic_launch(config=config, entrypoint=command)(*command_args)
        except ChildFailedError as error:
            return print_failure(error.failures, args.log_dir)
        except SignalException as error:
            print(f"stopped by {error.sigval.name}", file=sys.stderr)
            return 128 + error.sigval
        except (RendezvousError, DistError) as error:  # of the launcher's own store: the ranks are other processes
            fix = "check --rdzv-endpoint, --master-addr, --master-port and --nnodes"
            raise UserError(f"the processes could not find each other: {_why_alone(error, args.nnodes)}; {fix}") from None
    return 0


def _why_alone(error: Exception, nnodes: str) -> str:
    """What torch's error of a launcher that found no others means; its own text may be empty, or refer to its cause's."""
    if "Timeout" in type(error).__name__:
        return f"the launchers of --nnodes={nnodes} nodes were not there in time"
    return str(error.__cause__ or error).partition("\n")[0].rstrip(".")


class _TorchrunParser(argparse.ArgumentParser):
    """torchrun's options, with our words for what it refuses."""

    def error(self, message: str) -> NoReturn:
        missing = "training_script" in message or "--config" in message  # what follows --config was taken for the recipe
        where = " before --config" if "--config" in message else ""
        raise UserError(NO_RECIPE.format(where) if missing else f"{message}; {USAGE}")


def parse_torchrun_options(argv: list[str]) -> argparse.Namespace:
    """torchrun's parsed options, with the recipe's file in place of its name."""
    from torch.distributed.run import get_args_parser

    parser = _TorchrunParser(prog="tune run", usage=USAGE, parents=[get_args_parser()], add_help=False)
    args = parser.parse_args(argv)
    check_order(args.training_script_args)
    if not args.module and not args.no_python:
        recipe = find_recipe(args.training_script)
        check_config(recipe, args.training_script_args)
        args.training_script = str(recipe)
    chosen = {option.split("=")[0].replace("_", "-") for option in argv if option.startswith("--")}
    if args.nnodes in ("1", "1:1") and not any(option.startswith(("--rdzv", "--master")) for option in chosen):
        args.standalone = True  # a free port of this machine: two runs side by side do not meet on 29500
    return args


def launch_config(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """torchrun's launch configuration, the command and its arguments."""
    from torch.distributed.run import config_from_args, determine_local_world_size

    try:
        processes = determine_local_world_size(args.nproc_per_node)
        if args.standalone:
            args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
        if processes < 1:  # torchrun fails an assertion without a word
            raise ValueError(f"--nproc_per_node={args.nproc_per_node} starts no process; write 1 or more, or gpu for one on each GPU")
        if processes > 1:  # without it torchrun takes 1 and prints a box about it
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)  # before torch 2.13 it is always 30 s
        return config_from_args(args)
    except (ValueError, RuntimeError, AssertionError) as error:  # what torchrun raises for impossible option values
        raise UserError(f"torchrun refuses these options: {error}") from None


def print_failure(failures: dict[int, Any], log_dir: str) -> int:
    """Prints the first failing rank's traceback as the last thing on the screen, and returns its exit code."""
    # Error files first: a rank that was stopped after it wrote one is among `failures` as ended by SIGTERM.
    written = read_error_files(log_dir)
    if not written and (told := _told_to_stop(failures)):
        print(f"stopped by {told.name}", file=sys.stderr, flush=True)
        return 128 + told
    followers = {failure.rank: failure for failure in written if failure.stack}
    known = {failure.rank: failure for failure in written if not failure.stack}
    for rank, failure in failures.items():
        if rank not in followers:
            known.setdefault(rank, describe_failure(rank, failure))
    first = _first(list((known or followers).values()))
    others = sorted(rank for rank, failure in known.items() if rank != first.rank and failure.time < math.inf)
    more = f" (after it: rank {', '.join(map(str, others))})" if others else ""
    head = "" if first.text.startswith("error: ") else f"\nrank {first.rank} failed first{more}:\n"
    print(head + first.text + _who_was_missing(first, followers), file=sys.stderr, flush=True)
    return first.exit_code


def _told_to_stop(failures: dict[int, Any]) -> signal.Signals | None:
    """The signal that one process was sent, and not the launcher, and that all left with after they had saved."""
    codes = {failure.exitcode for failure in failures.values()}
    for number in (signal.SIGINT, signal.SIGTERM):
        if 128 + number in codes and codes <= {128 + number, 128 + signal.SIGTERM, -signal.SIGTERM}:
            return number
    return None


def _first(failures: list[Failure]) -> Failure:
    """The earliest; but one that lost its connection lost it to another, which the launcher may have seen die a moment later."""
    first = min(failures, key=lambda failure: failure.time)
    others = [failure for failure in failures if not LOST.search(failure.text) and failure.time < first.time + LOST_SECONDS]
    return min(others, key=lambda failure: failure.time) if LOST.search(first.text) and others else first


def _who_was_missing(first: Failure, followers: dict[int, Failure]) -> str:
    """Where those stood that the first failure had waited for in vain, if it is one of waiting; "" if it is not."""
    if not GAVE_UP.search(first.text):
        return ""
    missing = [failure for failure in followers.values() if WAITING not in failure.stack.rpartition("  File ")[2]]
    return "".join(f"\n\nrank {failure.rank} had not come; it stood at\n{failure.stack}" for failure in missing)


def describe_failure(rank: int, failure: Any) -> Failure:
    """A process that ended without an error file, from torch's ProcessFailure (exitcode below 0: a signal's number).

    The launcher stops the other ranks with SIGTERM once one has failed: a rank that this ended, or that left because of it,
    was never first. Its time, a whole second, may be earlier than the failure's.
    """
    if failure.exitcode > 0:
        text = f"it left with exit code {failure.exitcode}; what it printed stands above"
        told = failure.exitcode == 128 + signal.SIGTERM  # checkpoint.StopSignal's
        return Failure(rank, math.inf if told else failure.timestamp, text, failure.exitcode)
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-failure.exitcode, f"signal {-failure.exitcode}")
    hint = ", which is often the kernel's answer to memory running out" if name == "SIGKILL" else ""
    time = math.inf if name == "SIGTERM" else failure.timestamp
    return Failure(rank, time, f"it was ended by {name}{hint}", 128 - failure.exitcode)


def read_error_files(log_dir: str) -> list[Failure]:
    """The failures in the error files that torchft/crash.py wrote below torchrun's log directory."""
    found = []
    files = sorted(Path(log_dir).rglob("error.json"))  # <run>/attempt_<n>/<local rank>/error.json
    attempt = max((path.parent.parent for path in files), key=lambda folder: folder.stat().st_mtime, default=None)
    for path in files:
        if path.parent.parent != attempt:  # of an attempt that torchrun's --max-restarts has repeated since
            continue
        try:
            extra = json.loads(path.read_text(encoding="utf-8"))["message"]["extraInfo"]
            found.append(
                Failure(extra["rank"], extra["time"], extra["py_callstack"], extra["exit_code"], extra.get("stack", ""))
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written by a process that was being stopped: its rank did not fail first
    return found
