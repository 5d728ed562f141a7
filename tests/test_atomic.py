"""Faults while a checkpoint is written, and damage afterwards: PITFALLS K1, K2, K7 and section 2b.

Each kill happens in a child forked after the imports, so that a point costs milliseconds. Random kills would find
nothing: saving takes a few ms of a run.
"""

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from processes import fork
from tiny_training import CONFIG, TinyRun, assert_same, hide_cuda

from torchft import atomic, checkpoint
from torchft.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from torchft.errors import UserError
from torchft.run_dir import checkpoints, verify_checkpoint

FILES = ["params.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]  # as written
IO_EVENTS = ("open", "os.", "shutil.")  # audit events of Python's own file operations


def save(run: TinyRun, out: Path, step: int, keep_last: int = 1) -> Path:
    return save_checkpoint(
        out, step, params=run.params, optimizer=run.optimizer, state={}, config=CONFIG, keep_last=keep_last
    )


@pytest.fixture
def two_runs(monkeypatch: pytest.MonkeyPatch) -> dict[int, TinyRun]:
    """The run after step 1, which is on the disk, and after step 2, which is being saved."""
    hide_cuda(monkeypatch)
    return {1: TinyRun().train(0, 1), 2: TinyRun().train(0, 2)}


def assert_resumable(out: Path, runs: dict[int, TinyRun]) -> int:
    """`auto` finds a checkpoint without help, its bits are those of the run at that step, and no other is torn."""
    for path in checkpoints(out).values():
        verify_checkpoint(path)
    path = find_checkpoint(out, "auto", CONFIG, lambda text: None)
    assert path is not None
    resumed = TinyRun(seed=7)
    step = load_checkpoint(path, params=resumed.params, optimizer=resumed.optimizer, unchanged={})["step"]
    saved, expected = resumed.snapshot(), runs[step].snapshot()
    generators = {"torch", "numpy", "numpy position", "python"}  # those of the moment of saving, which has passed
    trained = saved.keys() - generators
    assert_same({name: saved[name] for name in trained}, {name: expected[name] for name in trained})
    return step


@pytest.mark.parametrize("file", FILES)
def test_killed_at_any_byte(file: str, two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    """The kernel kills the child inside the write that crosses byte n of `file` (SIGXFSZ). 12 points each."""
    save(two_runs[1], tmp_path / "sizes", 1)
    size = (tmp_path / "sizes" / "step_000001" / file).stat().st_size
    save(two_runs[1], tmp_path / "out", 1)

    def limited(original: Callable, path_of: Callable, limit: int) -> Callable:
        def write(*arguments: object) -> None:
            if Path(path_of(arguments)).name == file:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            original(*arguments)

        return write

    def save_and_die(limit: int) -> None:
        checkpoint.save_file = limited(checkpoint.save_file, lambda arguments: arguments[1], limit)
        checkpoint.write_bytes = limited(checkpoint.write_bytes, lambda arguments: arguments[0], limit)
        atomic.write_bytes = limited(atomic.write_bytes, lambda arguments: arguments[0], limit)
        save(two_runs[2], tmp_path / "out", 2)

    for limit in [0, 1, 7, 8, 9, *(size * part // 7 for part in range(1, 7)), size - 1]:
        assert fork(partial(save_and_die, limit)) == -signal.SIGXFSZ
        assert assert_resumable(tmp_path / "out", two_runs) == 1
    save(two_runs[2], tmp_path / "out", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step_000002"]  # no leftover


def die_at_event(number: int) -> None:
    """From now on this process is killed at its `number`-th file operation."""
    events = count(1)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(IO_EVENTS) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("leftovers", [False, True])
def test_killed_at_any_file_operation(leftovers: bool, two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    """SIGKILL at each audited event of a save that also prunes, each time anew or on top of what the last kill left."""

    def save_and_die(at: int) -> None:
        die_at_event(at)
        save(two_runs[2], tmp_path / "out", 2)

    save(two_runs[1], tmp_path / "before", 1)
    outcomes: list[int] = []
    while True:
        if not leftovers or outcomes[-1:] in ([], [2]):  # 2: killed after the rename, there is nothing left to save
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.copytree(tmp_path / "before", tmp_path / "out")
        exit_code = fork(partial(save_and_die, len(outcomes) + 1))
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        outcomes.append(assert_resumable(tmp_path / "out", two_runs))
    assert len(outcomes) >= 36 and set(outcomes) == {1, 2}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.95])
def test_a_full_disk_loses_nothing(share: float, two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    """EFBIG in place of ENOSPC, which needs no small disk; afterwards, with room again, the same run saves."""
    old = save(two_runs[1], tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * 33_000), limits[1]))  # bytes of the largest file
    try:
        with pytest.raises(UserError, match=r"could not write .*step_000002: .*(File too large|error 27).*untouched"):
            save(two_runs[2], tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [old]
    assert assert_resumable(tmp_path, two_runs) == 1
    save(two_runs[2], tmp_path, 2)
    assert assert_resumable(tmp_path, two_runs) == 2


def test_free_space_is_checked_before(
    two_runs: dict[int, TinyRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(two_runs[1], tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 + 40_000))
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: pytest.fail("wrote although it cannot fit"))
    with pytest.raises(UserError, match=r"could not write .*it needs 0.1 MiB, 1.0 MiB are free on that disk"):
        save(two_runs[2], tmp_path, 2)
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("kind", ["file", "proc"])
def test_an_unwritable_place_is_a_clear_error(kind: str, two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" if kind == "file" else Path("/proc/torchft")
    with pytest.raises(UserError, match="could not write .*another place"):
        save(two_runs[1], out, 1)


def test_an_existing_checkpoint_is_never_written_over(two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    save(two_runs[1], tmp_path, 1)
    with pytest.raises(UserError, match="step_000001 exists already"):
        save(two_runs[2], tmp_path, 1)
    assert assert_resumable(tmp_path, two_runs) == 1


def test_everything_is_on_the_disk_before_the_rename(
    two_runs: dict[int, TinyRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps only what was fsynced: every file, then the manifest, then the directory; then the new name."""
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        calls.append("fsync " + os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        calls.append(f"rename {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    final = save(two_runs[1], tmp_path, 1)
    temporary = f"{final}.tmp"
    renamed = calls.index(f"rename {final}")
    assert {f"fsync {temporary}/{file}" for file in FILES} <= set(calls[:renamed])
    assert calls[renamed - 2 : renamed] == [f"fsync {temporary}/manifest.json", f"fsync {temporary}"]
    assert calls[renamed + 1] == f"fsync {tmp_path}"


def test_any_flipped_byte_is_refused(two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    """200 of them, a fifth in each file, the manifest included."""
    folder = save(two_runs[1], tmp_path, 1)
    random = Random(0)
    for number in range(200):
        path = folder / FILES[number % len(FILES)]
        content = path.read_bytes()
        offset = random.randrange(len(content))
        flipped = bytearray(content)
        flipped[offset] ^= random.randrange(1, 256)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            verify_checkpoint(folder)
        path.write_bytes(content)
    verify_checkpoint(folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda d: os.truncate(d / "params.safetensors", 1000),
    "emptied": lambda d: os.truncate(d / "optimizer.safetensors", 0),
    "lengthened": lambda d: (d / "state.json").write_bytes((d / "state.json").read_bytes() + b" "),
    "file missing": lambda d: (d / "rng.safetensors").unlink(),
    "file extra": lambda d: (d / "params2.safetensors").touch(),
    "file renamed": lambda d: os.rename(d / "state.json", d / "State.json"),
    "files swapped": lambda d: swap(d / "params.safetensors", d / "optimizer.safetensors"),
    "link instead of file": lambda d: link(d / "params.safetensors"),
    "link instead of the manifest": lambda d: link(d / "manifest.json"),
    "directory instead of file": lambda d: ((d / "state.json").unlink(), (d / "state.json").mkdir()),
    "manifest missing": lambda d: (d / "manifest.json").unlink(),
    "manifest emptied": lambda d: os.truncate(d / "manifest.json", 0),
    "manifest torn": lambda d: os.truncate(d / "manifest.json", 300),
    "manifest of zeros": lambda d: (d / "manifest.json").write_bytes(bytes(600)),
    "manifest a list": lambda d: (d / "manifest.json").write_text("[1]"),
    "manifest nested deeply": lambda d: (d / "manifest.json").write_text("[" * 100_000),
    "manifest key twice": lambda d: edit(d, b'"manifest": {', b'"manifest": {}, "manifest": {'),
    "manifest respaced": lambda d: edit(d, b'"step": 1', b'"step":  1'),
    "manifest edited": lambda d: edit(d, b'"valid_loss": null', b'"valid_loss": 0.25'),
    "manifest NaN": lambda d: edit(d, b'"valid_loss": null', b'"valid_loss": NaN'),
    "directory renamed": lambda d: os.rename(d, d.with_name("step_000005")),
}


def swap(first: Path, second: Path) -> None:
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    os.rename(path, target)
    path.symlink_to(target)


def edit(folder: Path, old: bytes, new: bytes) -> None:
    content = (folder / "manifest.json").read_bytes()
    assert content.count(old) == 1
    (folder / "manifest.json").write_bytes(content.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGE)
def test_structural_damage_is_refused(damage: str, two_runs: dict[int, TinyRun], tmp_path: Path) -> None:
    DAMAGE[damage](save(two_runs[1], tmp_path, 1))
    (folder,) = checkpoints(tmp_path).values()
    with pytest.raises(UserError, match=f"{folder}"):
        verify_checkpoint(folder)
    assert find_checkpoint(tmp_path, "auto", CONFIG, lambda text: None) is None


def test_errors_while_reading_are_refusals(
    two_runs: dict[int, TinyRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(two_runs[1], tmp_path, 1)

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic.hashlib, "file_digest", broken)
    with pytest.raises(UserError, match="cannot be read: .*Input/output error"):
        verify_checkpoint(folder)


def test_replaced_files_are_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            atomic.replace_bytes(path, b"new and longer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    atomic.replace_bytes(path, b"new and longer")
    assert path.read_bytes() == b"new and longer" and list(tmp_path.iterdir()) == [path]
