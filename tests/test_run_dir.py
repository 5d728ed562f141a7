"""Which checkpoints are kept, which is best, and what becomes of an earlier run's files."""

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import fork
from tiny_training import CONFIG, TinyRun

from torchft.checkpoint import find_checkpoint, save_checkpoint
from torchft.errors import UserError
from torchft.run_dir import LOCK, best_checkpoint, give_up, keep_for_this_run, set_aside


def save(out: Path, step: int, keep_last: int = 2, valid_loss: float | None = None) -> Path:
    run = TinyRun()
    return save_checkpoint(
        out,
        step,
        params=run.params,
        optimizer=run.optimizer,
        state={},
        config=CONFIG,
        keep_last=keep_last,
        valid_loss=valid_loss,
    )


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_the_last_n_and_the_best_are_kept(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) == (float("inf"), None)
    save(tmp_path, 1, valid_loss=3.0)
    best = save(tmp_path, 2, valid_loss=1.0)
    save(tmp_path, 3, valid_loss=float("nan"))  # a validation that failed is never the best
    save(tmp_path, 4)
    save(tmp_path, 5, valid_loss=2.0)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert best_checkpoint(tmp_path) == (1.0, best)
    save(tmp_path, 6, valid_loss=0.5)  # the new best; the old one has no privilege left
    assert names(tmp_path) == ["step_000005", "step_000006"]
    save(tmp_path, 7, valid_loss=0.5)  # of equals the earlier
    save(tmp_path, 8, keep_last=1)
    assert names(tmp_path) == ["step_000006", "step_000008"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    """PITFALLS K7: with it counted, keep_last=2 would leave one usable."""
    save(tmp_path, 1)
    os.truncate(save(tmp_path, 2) / "params.safetensors", 100)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]


def test_nothing_is_removed_before_the_new_one_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def damage(source: Path, target: Path) -> None:
        content = (Path(source) / "params.safetensors").read_bytes()
        (Path(source) / "params.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", damage)
    with pytest.raises(UserError, match="step_000003/params.safetensors is damaged"):
        save(tmp_path, 3)
    assert {"step_000001", "step_000002"} <= set(names(tmp_path))


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.checkpoint.FORMAT", "torchft checkpoint 1")
    with pytest.raises(UserError, match="has the format 'torchft checkpoint 1', this version reads"):
        save(tmp_path, 1)


def test_a_fresh_start_moves_an_earlier_run_aside(tmp_path: Path) -> None:
    for attempt in (1, 2):
        save(tmp_path, 3)
        (tmp_path / "log.jsonl").write_text(f"run {attempt}")
        (tmp_path / "notes.txt").write_text("the user's")
        said: list[str] = []
        set_aside(tmp_path, 0, said.append)
        assert said == [f"moved an earlier run's step_000003, log.jsonl to {tmp_path}/earlier_{attempt}"]
        assert names(tmp_path / f"earlier_{attempt}") == ["log.jsonl", "step_000003"]
        assert (tmp_path / f"earlier_{attempt}" / "log.jsonl").read_text() == f"run {attempt}"
    assert names(tmp_path) == ["earlier_1", "earlier_2", "notes.txt"]
    set_aside(tmp_path, 0, said.append)
    assert len(said) == 1  # nothing left to move, nothing said


def test_resuming_an_older_checkpoint_moves_the_later_ones_aside(tmp_path: Path) -> None:
    """Else the next auto would continue the branch that the user left."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=9)
    (tmp_path / "log.jsonl").touch()
    set_aside(tmp_path, 1, lambda text: None)
    assert names(tmp_path) == ["earlier_1", "log.jsonl", "step_000001"]
    assert names(tmp_path / "earlier_1") == ["step_000002", "step_000003"]
    assert find_checkpoint(tmp_path, "auto", CONFIG, lambda text: None) == tmp_path / "step_000001"


def holding(out: Path, then: Callable[[], int]) -> int:
    """`then()` while another process has the directory; its result."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        file = keep_for_this_run(out)
        os.write(tell, str(file.fileno() > 0).encode())
        time.sleep(60)
        os._exit(1)
    os.read(told, 4)
    try:
        return then()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_live_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    """The second is refused and told whose it is; what is killed has it no longer."""

    def refused() -> int:
        with pytest.raises(UserError, match=r"run\.out=.* has not ended \(process \d+ on .*\): wait for it, stop it, or choose another"):
            keep_for_this_run(tmp_path)
        return 7

    assert holding(tmp_path, refused) == 7
    first = keep_for_this_run(tmp_path)
    again = keep_for_this_run(tmp_path)  # a process that begins anew, after an error, say
    assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    again.close()
    give_up(tmp_path, first)
    assert not names(tmp_path)
    assert fork(lambda: keep_for_this_run(tmp_path).close()) == 0


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(fcntl, "lockf", fail)
    keep_for_this_run(tmp_path, said.append).close()
    assert len(said) == 1 and "No locks available" in said[0] and "start no second run" in said[0]
