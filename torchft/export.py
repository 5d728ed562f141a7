"""Result directories that exist whole or not at all: written beside the final name, fsynced, renamed last."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from torchft.atomic import fsync
from torchft.errors import UserError


@contextmanager
def export_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `final`; when the block ends well it is fsynced and renamed to `final`.

    With `replace`, a directory that is there already stays until the new one is complete, and steps aside by a rename.
    What a killed export to the same `final` left is removed first: one at a time may write there.
    Unlike a checkpoint (atomic.py) the result holds nothing of ours: it is what other programs read.

    Raises:
        UserError: `final` exists and `replace` is not set, or something cannot be written. `final` is then as it was.
    """
    if final.exists() and not replace:
        raise UserError(f"{final} exists already and is never written over; choose another directory or move it away")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror}") from None
    old, new = work / "old", work / "new"
    try:
        new.mkdir()  # with the usual permissions, where mkdtemp's are the owner's alone
        yield new
        for path in [*new.iterdir(), new]:
            fsync(path)
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        fsync(final.parent)
    except (OSError, SafetensorError) as error:  # disk full, quota, read-only
        raise UserError(f"{final} cannot be written: {error}; free space or choose another directory") from None
    finally:
        if old.exists() and not final.exists():  # it failed between the two renames
            _put_back(old, final)
        shutil.rmtree(work, ignore_errors=True)


def _put_back(old: Path, final: Path) -> None:
    try:
        os.rename(old, final)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error}; what was there before is {old}: move it back") from None


def _remove_leftovers(final: Path) -> None:
    """What an export to the same place left that was killed. Killed between the two renames, the old directory returns first."""
    for work in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
        if (work / "old").exists() and not final.exists():
            os.rename(work / "old", final)
        shutil.rmtree(work, ignore_errors=True)


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file in memory, the same bytes each time: the library writes `metadata` in no particular order."""
    data = save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:8] + _with_sorted_metadata(data[8:end]) + data[end:]


def save_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write the same bytes as `safetensors_bytes` makes, without a second copy of the tensors in memory."""
    save_file(tensors, file, metadata)
    with file.open("r+b") as written:
        header = written.read(int.from_bytes(written.read(8), "little"))
        written.seek(8)
        written.write(_with_sorted_metadata(header))


def _with_sorted_metadata(header: bytes) -> bytes:
    fields = json.loads(header)
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
    assert len(text) == len(header), "only the order changes"
    return text
