"""What a run's directory holds: its checkpoints by step, the best of them, and how old ones make room.

Only files are looked at here, no tensors. A directory is a checkpoint by its name, step_000500, and its manifest.
"""

import errno
import fcntl
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from torchft.atomic import verify
from torchft.distributed import from_main
from torchft.errors import UserError

STEP_NAME = re.compile(r"step_(\d{6,})")
LEFTOVER_NAME = re.compile(r"step_\d{6,}\.tmp")
FORMAT = "torchft checkpoint 2"  # checkpoint.py: whole tensors
FORMAT_OF_PARTS = "torchft checkpoint 2, in parts"  # parts.py
FORMATS = (FORMAT, FORMAT_OF_PARTS)
LOCK = "run.lock"  # of the run that is under way; without one it means nothing
RUN_OUTPUTS = ("log.jsonl", "config.yaml", "adapter", "model", "reward_model", "tensorboard", "profile")  # beside the checkpoints


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lives."""
    return out / f"step_{step:06d}"


def keep_for_this_run(out: Path, say: Callable[[str], None] = print) -> TextIO:
    """Two live runs in one directory would write each other's log and prune each other's checkpoints: this one has it alone.

    As long as the returned file is open, which is at most as long as this process lives, however that ends; `give_up` ends it
    before. A process may ask again. Raises UserError where another process has the directory.
    """
    file = open(out / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fcntl(2): of processes, not of files that are open; forks do not inherit it
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"run.out={out} belongs to a run that has not ended ({holder or 'another process'}): wait for it, stop it, or choose "
                "another directory"
            ) from None
        say(f"run.out={out} lies on a file system without locks ({error.strerror}): start no second run there meanwhile")
        return open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if not (out / LOCK).exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(out / LOCK)):
        file.close()  # of a run that gave it up between the two lines above
        return keep_for_this_run(out, say)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def give_up(out: Path, file: TextIO) -> None:
    """The directory is free for another run; `file`: from `keep_for_this_run`."""
    with suppress(OSError):  # a file that stays means nothing
        (out / LOCK).unlink()
    file.close()


def verify_checkpoint(path: Path, hashes: bool = True, form: str | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole, of the format `form` and bears its own name; see `atomic.verify`.

    Raises UserError. `form` None: any that this version writes.
    """
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {path}: name an existing step_... directory, or use run.resume=auto")
    manifest = verify(path, hashes)
    forms = FORMATS if form is None else (form,)
    if manifest.get("format") not in forms:
        raise UserError(f"{path} has the format {manifest.get('format')!r}, this version reads {forms[0]!r} here")
    if STEP_NAME.fullmatch(path.name) and path != checkpoint_path(path.parent, manifest["step"]):
        raise UserError(f"{path} was saved as step {manifest['step']}: it has been renamed, or swapped with another")
    return manifest


def checkpoints(out: Path) -> dict[int, Path]:
    """Directories named like a checkpoint, verified or not, by step, oldest first."""
    paths = {int(path.name.removeprefix("step_")): path for path in _named(out, STEP_NAME)}
    return dict(sorted(paths.items()))


def leftovers(out: Path) -> list[Path]:
    """What saves and removals left that a crash cut short."""
    return _named(out, LEFTOVER_NAME)


def remove_leftovers(out: Path) -> None:
    """Make room before the next save."""
    for path in leftovers(out):
        shutil.rmtree(path, ignore_errors=True)


def best_checkpoint(out: Path, say: Callable[[str], None] = print) -> tuple[float, Path | None]:
    """The lowest validation loss that a checkpoint in `out` was saved with, and that checkpoint; else (inf, None).

    One that does not verify is skipped, which is said. The same on all processes, which all must ask.
    """
    return from_main(lambda: _best_checkpoint(out, say))


def _best_checkpoint(out: Path, say: Callable[[str], None]) -> tuple[float, Path | None]:
    ranked = sorted(((loss, path) for path, loss in _complete(out) if loss is not None), key=itemgetter(0))
    for loss, path in ranked:  # of equals the earliest first
        try:
            verify_checkpoint(path)
            return loss, path
        except UserError as error:
            say(f"the best checkpoint {path} is skipped: {error}")
    return math.inf, None


def prune(out: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best.

    Damaged ones do not count as kept, and stay for the user to look at. Files are told by their sizes here, not read again.
    """
    complete = _complete(out)
    best = min((pair for pair in complete if pair[1] is not None), key=itemgetter(1), default=(None, None))[0]
    for path, _ in complete[: -max(1, keep_last)]:
        if path == best:
            continue
        try:
            doomed = path.with_name(path.name + ".tmp")  # renamed first: half a checkpoint never bears the full name
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise UserError(f"the old checkpoint {path} cannot be removed: {error}") from None


def set_aside(out: Path, step: int, say: Callable[[str], None] = print) -> None:
    """Move what an earlier run left after `step` into out/earlier_<n>/: nothing is deleted, nothing stands in the way.

    After step 0, a fresh start, that is everything a run writes; else the checkpoints with a higher step, which a later
    `resume=auto` would take for this run's.
    """
    moved = [path for number, path in checkpoints(out).items() if number > step]
    if step == 0:
        moved += [out / name for name in RUN_OUTPUTS if (out / name).exists()]
    if not moved:
        return
    number = 1
    while (out / f"earlier_{number}").exists():
        number += 1
    target = out / f"earlier_{number}"
    target.mkdir()
    for path in moved:
        os.rename(path, target / path.name)
    say(f"moved an earlier run's {', '.join(path.name for path in moved)} to {target}")


def _complete(out: Path) -> list[tuple[Path, float | None]]:
    """Checkpoints with an intact manifest and files of the right sizes, oldest first, with their validation loss."""
    complete = []
    for path in checkpoints(out).values():
        try:
            complete.append((path, verify_checkpoint(path, hashes=False)["valid_loss"]))
        except UserError:
            continue
    return complete


def _named(out: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in out.iterdir() if pattern.fullmatch(path.name)) if out.is_dir() else []
    except OSError as error:
        raise UserError(f"run.out={out} cannot be read: {error}") from None
