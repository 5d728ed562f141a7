"""Faults of the disk and sudden death, at an exact byte or file operation. Each is armed in a forked child, for its whole life.

A file operation is an audited event of Python's own (open, rename, remove, ...) or a safetensors file about to be
written, of a path below one directory. A child cannot be disarmed: what it leaves is looked at from outside.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import safetensors.torch

IO_EVENTS = ("open", "os.", "shutil.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folder: Path, act: Callable[[int, str, str], None]) -> None:
    """From now on `act(number, event, path)`, numbers from 1, before each file operation below `folder`.

    event: `write` for a file that is opened to be written, else Python's name of it.
    """
    numbers, inside = count(1), str(folder)

    def tell(event: str, path: str) -> None:
        if path.startswith(inside):
            act(next(numbers), event, path)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(IO_EVENTS):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            paths = [os.fspath(item) for item in arguments if isinstance(item, str | os.PathLike)]
            for path in paths[:1]:
                tell("write" if writes else event, path)

    original = safetensors.torch.serialize_file  # below every save_file, and written in Rust: no audited event

    def serialize_file(tensors: object, filename: object, *more: object, **named: object) -> None:
        tell("write", os.fspath(filename))
        original(tensors, filename, *more, **named)

    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(hook)


def list_operations(folder: Path, file: Path) -> None:
    """Write `<event> <path below folder>` lines to `file`, outside `folder`."""
    lines = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(folder, lambda number, event, path: os.write(lines, f"{event} {os.path.relpath(path, folder)}\n".encode()))


def die_at_operation(folder: Path, number: int) -> None:
    """SIGKILL before the `number`-th file operation."""
    watch(folder, lambda n, event, path: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def die_at_byte(folder: Path, file: str, limit: int) -> None:
    """The kernel kills inside the write that makes `file`, the end of a path below `folder`, longer than `limit` bytes."""
    _limit_at(folder, file, limit, signal.SIG_DFL)


def no_room_at_byte(folder: Path, file: str, limit: int) -> None:
    """The same write fails with EFBIG instead, as on a full disk, and so does every later one at that length."""
    _limit_at(folder, file, limit, signal.SIG_IGN)


def _limit_at(folder: Path, file: str, limit: int, action: signal.Handlers) -> None:
    def act(number: int, event: str, path: str) -> None:
        if event == "write" and path.endswith(f"/{file}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    signal.signal(signal.SIGXFSZ, action)  # here: only the main thread may, and a save may run in another one
    watch(folder, act)


def fail_at_operation(folder: Path, number: int, code: int) -> None:
    """The `number`-th file operation, and all later ones that write or rename, raise OSError(code)."""

    def act(n: int, event: str, path: str) -> None:
        if event.startswith("shutil."):
            return  # announces operations that follow
        if n == number or (n > number and event in ("write", "os.rename", "os.mkdir")):
            raise OSError(code, os.strerror(code))

    watch(folder, act)
