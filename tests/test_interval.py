"""Records that are read a step late: what they hold, in which order they come, and that a GPU has always something to do.

The GPU is simulated: it works through what it is given, and nothing arrives from it before it is waited for.
"""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_metrics import deterministic, log_steps, records
from tiny_training import TinyRun
from torch import Tensor

from torchft import interval, metrics
from torchft.config import RunConfig
from torchft.errors import UserError
from torchft.metrics import RunLogger
from torchft.optim import clip_and_check, step_optimizer

CPU = torch.device("cpu")


class Gpu:
    """A queue of work, in seconds. `host` is the host's clock, `free` when the work given so far will be done."""

    def __init__(self) -> None:
        self.host = self.free = self.idle = 0.0
        self.waits = 0
        self.copies: list[tuple[Tensor, Tensor]] = []

    def work(self, seconds: float) -> None:
        self.idle += max(0.0, self.host - self.free)
        self.free = max(self.host, self.free) + seconds

    def send(self, values: Tensor) -> Tensor:
        host = torch.full_like(values, math.nan)
        self.copies.append((host, values))
        return host


class GpuMoment:
    """interval.Moment on it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at, self.sent = gpu, max(gpu.host, gpu.free), len(gpu.copies)

    def wait(self) -> None:
        self.gpu.waits += 1
        self.gpu.host = max(self.gpu.host, self.at)
        for host, values in self.gpu.copies[: self.sent]:
            host.copy_(values)

    def seconds_since(self, earlier: "GpuMoment") -> float:
        assert self.gpu.host >= self.at >= earlier.at, "both have come"
        return self.at - earlier.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(interval, "Moment", lambda device: GpuMoment(gpu))
    monkeypatch.setattr(interval, "to_host", gpu.send)
    return gpu


def begin(out: Path, steps: int = 6, late: bool = True, state: dict[str, Any] | None = None, start: int = 0, **run: Any) -> RunLogger:
    log = RunLogger(RunConfig(out=str(out), **run), {}, CPU)
    log._runs_behind = late
    log.begin(total_steps=steps, steps_per_epoch=steps, start_step=start, state=state)
    return log


def train(log: RunLogger, gpu: Gpu, first: int, last: int, *, host: float = 0.006, work: float = 0.125, **bad: Any) -> None:
    """Steps first .. last, each of so many seconds on the host and on the device."""
    for step in range(first, last + 1):
        gpu.host += host  # the next batches and the first launches
        gpu.work(work)
        log_steps(log, step, step, **bad)


def written(out: Path) -> list[int]:
    return [record["step"] for record in records(out)]


def untimed(out: Path) -> list[dict[str, Any]]:
    timings = ("tokens_per_s", "peak_memory_gib", "eta_s")
    return [{name: value for name, value in record.items() if name not in timings} for record in records(out)]


@pytest.mark.parametrize("log_every", [1, 3])
def test_late_records_are_those_read_at_once(log_every: int, gpu: Gpu, tmp_path: Path) -> None:
    """All their fields, each of its own step, whatever the next step's are by then."""
    for late in (False, True):
        log = begin(tmp_path / str(late), 8, late, log_every=log_every)
        for step in range(1, 9):
            gpu.host += 0.01
            gpu.work(0.125)
            log.latest(aux_loss=torch.tensor(step / 7))
            log.figures(step, {"margin": torch.tensor(0.5 * step), "kl": torch.tensor(1.0)})
            log.constant(recomputed_blocks=step)
            log_steps(log, step, step)
        log.close()
    at_once, late = untimed(tmp_path / "False"), untimed(tmp_path / "True")
    assert late == at_once and [list(record) for record in late] == [list(record) for record in at_once]
    assert [record["recomputed_blocks"] for record in late] == [record["step"] for record in late]
    assert written(tmp_path / "True") == ([3, 6, 8] if log_every == 3 else [*range(1, 9)])


def test_a_record_comes_with_the_next_step(gpu: Gpu, tmp_path: Path) -> None:
    """Not so the first, whose step nobody has timed yet, and the last."""
    log, seen = begin(tmp_path, 8, log_every=2), []
    for step in range(1, 9):
        train(log, gpu, step, step)
        seen.append(written(tmp_path))
    assert seen == [[], [2], [2], [2], [2, 4], [2, 4], [2, 4, 6], [2, 4, 6, 8]]


@pytest.mark.parametrize("late", [False, True])
def test_the_gpu_has_work_while_a_record_is_written(late: bool, gpu: Gpu, tmp_path: Path) -> None:
    log = begin(tmp_path, 20, late)
    train(log, gpu, 1, 20)
    assert gpu.waits == 20  # one per record
    assert gpu.idle == pytest.approx(0.006 * (2 if late else 20))  # the first record is read at once
    rates = [record["tokens_per_s"] for record in records(tmp_path)]
    assert rates[2:] == [800.0 if late else 763.4] * 18
    assert sum(100 / rate for rate in rates) == pytest.approx(gpu.host, rel=1e-3)  # over all of them, the time on the wall


def test_a_busy_host_does_not_shift_time_between_records(gpu: Gpu, tmp_path: Path) -> None:
    """It comes late to read; where it is what takes longest, the last record is no shorter than the others."""
    log = begin(tmp_path / "hiccup", 10)
    train(log, gpu, 1, 5)
    train(log, gpu, 6, 6, host=0.12)
    train(log, gpu, 7, 10)
    assert {record["tokens_per_s"] for record in records(tmp_path / "hiccup")[2:]} == {800.0}
    log = begin(tmp_path / "slow host", 10)
    train(log, gpu, 1, 10, host=0.2)
    assert {record["tokens_per_s"] for record in records(tmp_path / "slow host")[2:]} == {500.0}


def test_time_outside_training_does_not_count(gpu: Gpu, tmp_path: Path) -> None:
    log = begin(tmp_path, 10, log_every=2)
    for step in range(1, 11):
        train(log, gpu, step, step, host=0.0, work=0.5)
        if step in (3, 6):
            with log.paused():
                gpu.work(40.0)  # an evaluation, which nobody has waited for when it goes on
    log.close()
    assert {record["tokens_per_s"] for record in records(tmp_path)} == {200.0}
    assert [record["eta_s"] for record in records(tmp_path)] == [4.0, 3.0, 2.0, 1.0, 0.0]


def test_long_steps_are_read_at_once(gpu: Gpu, tmp_path: Path) -> None:
    """Whoever waits a minute for a line gets it with its step; a step that gets short again is late again."""
    log, seen = begin(tmp_path, 8), []
    for step, seconds in enumerate([60.0, 0.2, 0.2, 1.5, 1.5, 0.2, 0.2, 0.2], start=1):
        train(log, gpu, step, step, work=seconds)
        seen.append(written(tmp_path)[-1])
    assert seen == [1, 2, 2, 3, 5, 6, 6, 8]


BEFORE = {
    "paused": lambda log: log.paused().__enter__(),
    "validation": lambda log: log.validation(3, valid_loss=0.5),
    "state": lambda log: log.state(),
    "close": lambda log: log.close(),
}


@pytest.mark.parametrize("what", BEFORE)
def test_nothing_comes_before_the_record(what: str, gpu: Gpu, tmp_path: Path) -> None:
    log = begin(tmp_path)
    train(log, gpu, 1, 3)
    assert written(tmp_path) == [1, 2]
    BEFORE[what](log)
    assert written(tmp_path) == ([1, 2, 3, 3] if what == "validation" else [1, 2, 3])
    assert "loss" in records(tmp_path)[2]


@pytest.mark.parametrize("what", [*BEFORE, "the next step"])
def test_a_step_that_is_not_finite_stops_the_run(what: str, gpu: Gpu, tmp_path: Path) -> None:
    """One step later, and before anything is validated or saved."""
    log = begin(tmp_path)
    train(log, gpu, 1, 3, bad=(3,))
    act = BEFORE.get(what, lambda log: train(log, gpu, 4, 4))
    for attempt in (act, lambda log: log.state()):  # and from then on nothing can be saved
        with pytest.raises(UserError, match="^step 3: the loss or gradient norm is not finite"):
            attempt(log)
    assert written(tmp_path) == [1, 2]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("log_every", [1, 2])
def test_a_late_log_goes_on_as_if_never_stopped(log_every: int, stop: int, gpu: Gpu, tmp_path: Path) -> None:
    straight = begin(tmp_path / "a", late=False, log_every=log_every)
    train(straight, gpu, 1, 6)
    log = begin(tmp_path / "b", log_every=log_every)
    train(log, gpu, 1, stop)
    state = json.loads(json.dumps(log.state()))
    train(log, gpu, stop + 1, 5)  # then killed
    log = begin(tmp_path / "b", start=stop, state=state, log_every=log_every)
    train(log, gpu, stop + 1, 6)
    assert deterministic(tmp_path / "b") == deterministic(tmp_path / "a")


def test_where_nothing_can_be_pinned_the_copy_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    values, original = torch.tensor([1.0, 2.0]), Tensor.to

    def refused(self: Tensor, *where: Any, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            raise RuntimeError("CUDA error: out of memory")
        return original(self, *where)

    monkeypatch.setattr(Tensor, "to", refused)
    assert interval.to_host(values).tolist() == [1.0, 2.0]


def train_on_gpu(out: Path) -> list[int]:
    """9 steps, a record every second one, a pause after the 4th. Returns how many records there were after each step."""
    run, counts = TinyRun(), []
    run.model.cuda()  # in place
    log = RunLogger(RunConfig(out=str(out), log_every=2), {}, torch.device("cuda"))
    log.begin(total_steps=9, steps_per_epoch=9)
    for step in range(1, 10):
        loss = (run.model(torch.randn(4, 64).cuda()) - random.random()).square().sum()
        loss.backward()
        norm, found_inf = clip_and_check(run.params, 1.0, loss)
        step_optimizer(run.optimizer, found_inf)
        run.optimizer.zero_grad()
        log.figures(4, {"margin": loss.detach() * 2})
        log.latest(aux_loss=loss.detach() / 3)
        log.step(step, loss=loss, supervised=256, tokens=256, lr=0.1, grad_norm=norm, found_inf=found_inf)
        counts.append(len(written(out)))
        assert log._pending is None or log._pending.totals._values.is_pinned()
        if step == 4:
            with log.paused():
                log.validation(step, valid_loss=loss.item())
    log.close()
    return counts


@pytest.mark.gpu
def test_late_records_of_a_gpu_are_those_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SHORT_STEP", -1.0)
    assert train_on_gpu(tmp_path / "at once") == [0, 1, 1, 2, 3, 4, 4, 5, 6]
    monkeypatch.setattr(metrics, "SHORT_STEP", math.inf)
    assert train_on_gpu(tmp_path / "late") == [0, 0, 1, 1, 3, 3, 4, 4, 6]
    assert deterministic(tmp_path / "late") == deterministic(tmp_path / "at once")
    assert written(tmp_path / "late") == [2, 4, 4, 6, 8, 9]
    assert all(record.get("tokens_per_s", 1.0) > 0 for record in records(tmp_path / "late"))


@pytest.mark.gpu
def test_a_late_record_has_the_time_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last one, which is read right after the one before it."""
    monkeypatch.setattr(metrics, "SHORT_STEP", math.inf)
    one = torch.ones((), device="cuda")
    log = RunLogger(RunConfig(out=str(tmp_path)), {}, one.device)
    log.begin(total_steps=10, steps_per_epoch=10)
    start = time.perf_counter()
    for step in range(1, 11):
        time.sleep(0.05)
        log.step(step, loss=one, supervised=1, tokens=1000, lr=0.1, grad_norm=one, found_inf=one * 0)
    wall = time.perf_counter() - start
    seconds = [1000 / record["tokens_per_s"] for record in records(tmp_path)]
    assert seconds[1:] == pytest.approx([0.05] * 9, rel=0.3)
    assert sum(seconds) == pytest.approx(wall, rel=0.1)
