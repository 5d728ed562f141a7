"""Directories and text files that exist whole or not at all, and directories that can prove it.

A directory is written beside its final name, its files are fsynced and listed with size and sha256 in manifest.json,
and only then does one rename give it the final name. A crash at any byte leaves NAME.tmp, which nothing reads and the
next save removes. `verify` accepts exactly the files of the manifest, byte for byte, the manifest itself included.
Left out: several writers at once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from torchft.errors import UserError

MANIFEST = "manifest.json"
HASHING_THREADS = 8  # one reads and hashes about 1.5 GB/s: a model trained whole has 12 bytes per parameter


@contextmanager
def atomic_directory(final: Path, facts: dict[str, Any], needed_bytes: int) -> Iterator[Path]:
    """Yield an empty directory to write files into; leaving the block makes it `final`, with `facts` in its manifest.

    Raises UserError where `final` exists, the disk lacks `needed_bytes`, or anything cannot be written: then what was
    written is removed and everything else is as it was.
    """
    if final.exists():
        raise UserError(f"{final} exists already: it is never written over; move it away or choose another run.out")
    temporary = final.with_name(final.name + ".tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        _check_free_space(final.parent, needed_bytes)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary, facts)
        os.rename(temporary, final)
        fsync(final.parent)
    except (OSError, SafetensorError) as error:  # disk full, quota, file too large, read-only, I/O error
        shutil.rmtree(temporary, ignore_errors=True)
        raise not_written(final, error) from None


def not_written(final: Path, error: OSError | SafetensorError) -> UserError:
    """What a user reads when the disk fails while `final` is written."""
    return UserError(
        f"could not write {final}: {error}; what was there before is untouched. Free space, mend the disk or "
        "choose another place (run.out), then continue with run.resume=auto"
    )


def _check_free_space(folder: Path, needed_bytes: int) -> None:
    """The whole directory must fit, with 1 MiB for names and tables; a check now costs less than half a save later."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + 2**20:
        raise OSError(f"it needs {needed_bytes / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free on that disk")


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Fsync every file, list them, and write the list last, so that a directory with a manifest is complete."""
    paths = sorted(folder.iterdir())
    for path in paths:
        fsync(path)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(_sha256, paths))
    sizes = [path.stat().st_size for path in paths]
    files = {path.name: {"size": n, "sha256": sha} for path, n, sha in zip(paths, sizes, digests, strict=True)}
    content = facts | {"files": files}
    write_bytes(folder / MANIFEST, _manifest_text(content).encode())
    fsync(folder)


def _manifest_text(content: dict[str, Any]) -> str:
    """The one spelling of a manifest, its own digest included: any other byte in the file is damage."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({"manifest": content, "sha256": digest}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete directory: the facts it was saved with, and `files`. Raises UserError if damaged."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise UserError(f"{path} is not a regular file")
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)["manifest"]
        intact = _manifest_text(content) == text
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}: it is not a finished checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):  # not UTF-8, not JSON, not ours
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: it is not what was written")
    return content


def verify(folder: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest, if the directory is what it says. Raises UserError on a missing, extra or changed file.

    Without `hashes` only names and sizes are compared, which reads no file.
    """
    manifest = read_manifest(folder)
    try:
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        for name in sorted(present ^ set(manifest["files"])):
            raise UserError(f"{folder / name} is {'not in the manifest' if name in present else 'missing'}")
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            for _ in pool.map(lambda item: _verify_file(folder / item[0], item[1], hashes), manifest["files"].items()):
                pass  # the first one that fails raises here
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    return manifest


def _verify_file(path: Path, expected: dict[str, Any], hashes: bool) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if path.stat().st_size != expected["size"]:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, the manifest says {expected['size']:,}")
    if hashes and _sha256(path) != expected["sha256"]:
        raise UserError(f"{path} is damaged: its sha256 is not the manifest's")


def write_bytes(path: Path, content: bytes) -> None:
    """Write and fsync; the error of a full disk is raised here, not lost at close."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, content: bytes) -> None:
    """Give `path` this content in one step: readers and crashes see the old file or the new one, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    write_bytes(temporary, content)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
