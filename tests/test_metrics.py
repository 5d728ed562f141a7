"""The log's numbers, its resume, the terminal, secrets, trackers."""

import io
import json
import math
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from torchft import interval
from torchft.config import RunConfig
from torchft.errors import UserError
from torchft.metrics import DETERMINISTIC_FIELDS, RunLogger, cut_log

CPU = torch.device("cpu")


def make_logger(out: Path, log_every: int = 1, config: dict[str, Any] | None = None, **run: Any) -> RunLogger:
    return RunLogger(RunConfig(out=str(out), log_every=log_every, **run), config or {"model": {"path": "m"}}, CPU)


def log_steps(log: RunLogger, first: int, last: int, bad: tuple[int, ...] = ()) -> None:
    """Steps first .. last; step s has 3 s supervised tokens of loss 1 / s each, and norm s / 7; the `bad` are NaN."""
    for step in range(first, last + 1):
        norm = torch.tensor(math.nan if step in bad else step / 7)
        log.step(
            step,
            loss=torch.tensor(math.nan if step in bad else 3.0),
            supervised=3 * step,
            tokens=100,
            lr=0.1 / step,
            grad_norm=norm,
            found_inf=torch.isnan(norm).float(),
        )


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def deterministic(out: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in DETERMINISTIC_FIELDS if key in record} for record in records(out)]


def test_a_run_that_ends_within_its_warm_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for steps in (0, 6, 10, 11):
        log = make_logger(tmp_path / str(steps), config={"optim": {"warmup_steps": 10}})
        capsys.readouterr()
        log.begin(total_steps=steps, steps_per_epoch=2.5)
        said[steps] = "".join(line for line in capsys.readouterr().out.splitlines() if "WARNING" in line)
    assert said[0] == said[11] == ""
    rest = "of optim.lr and never falls"
    assert said[6] == f"WARNING: the run ends within its warm-up, 6 of optim.warmup_steps=10: the learning rate rises to 60% {rest}"
    assert said[10] == f"WARNING: the run ends within its warm-up, 10 of optim.warmup_steps=10: the learning rate rises to 100% {rest}"


def test_a_record_is_the_mean_over_tokens_since_the_last(tmp_path: Path) -> None:
    log = make_logger(tmp_path, log_every=2)
    log.begin(total_steps=5, steps_per_epoch=2.5)
    log_steps(log, 1, 5)
    log.validation(5, valid_loss=0.25, exact_match=math.nan)
    log.close()
    *trained, validated = records(tmp_path)
    assert [record["step"] for record in trained] == [2, 4, 5]  # the last step is always logged
    assert [record["loss"] for record in trained] == [6 / 9, 6 / 21, 3 / 15]
    assert [record["supervised_tokens"] for record in trained] == [9, 21, 15]
    assert [record["grad_norm"] for record in trained] == [pytest.approx(step / 7, rel=1e-6) for step in (2, 4, 5)]
    assert [record["epoch"] for record in trained] == [0.8, 1.6, 2.0]
    assert tuple(trained[0])[:6] == DETERMINISTIC_FIELDS[:6]  # timings come after
    assert all(record["tokens_per_s"] > 0 and record["peak_memory_gib"] > 0.05 for record in trained)
    assert validated == {"step": 5, "valid_loss": 0.25, "exact_match": None}  # strict JSON knows no NaN


def test_a_constant_is_in_every_record_from_then_on(tmp_path: Path) -> None:
    log = make_logger(tmp_path)
    log.begin(total_steps=3, steps_per_epoch=3)
    log_steps(log, 1, 1)
    log.constant(recomputed_blocks=4, offloaded_gib=0.5)
    log_steps(log, 2, 2)
    log.constant(offloaded_gib=0.25)
    log_steps(log, 3, 3)
    log.close()
    assert [(r.get("recomputed_blocks"), r.get("offloaded_gib")) for r in records(tmp_path)] == [(None, None), (4, 0.5), (4, 0.25)]


def test_a_latest_figure_is_that_of_the_records_step(tmp_path: Path) -> None:
    """As grad_norm is; a step without it has none."""
    log = make_logger(tmp_path, log_every=2)
    log.begin(total_steps=4, steps_per_epoch=4)
    for step, figures in enumerate([{"aux_loss": 2.5}, {"aux_loss": 2.25}, {"aux_loss": 2.0}, {}], start=1):
        log.latest(**{name: torch.tensor(value) for name, value in figures.items()})
        log_steps(log, step, step)
    log.close()
    assert [record.get("aux_loss") for record in records(tmp_path)] == [2.25, None]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_log_is_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    """Stopped in the middle of an interval, too; what the killed run logged after the checkpoint is cut away."""
    for out, stops in ((tmp_path / "a", []), (tmp_path / "b", [stop])):
        log = make_logger(out, log_every=3)
        log.begin(total_steps=6, steps_per_epoch=6)
        first = 1
        for last in stops:
            log_steps(log, first, last)
            state = json.loads(json.dumps(log.state()))
            log_steps(log, last + 1, 5)  # then killed
            log = make_logger(out, log_every=3)
            log.begin(total_steps=6, steps_per_epoch=6, start_step=last, state=state)
            first = last + 1
        log_steps(log, first, 6)
        log.close()
    assert deterministic(tmp_path / "b") == deterministic(tmp_path / "a")
    assert [record["step"] for record in records(tmp_path / "a")] == [3, 6]


def test_the_log_is_cut_in_one_step_and_a_torn_line_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    cut_log(path, 3)  # there is none yet
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 6)]
    torn_lines = ["", lines[2][:9], '{"step": 3}', "[3]", "7", "\0" * 50]  # a whole record without its end is torn, too
    for torn in torn_lines:
        path.write_text("".join(lines) + torn)
        cut_log(path, 3)
        assert path.read_text() == "".join(lines[:3])

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    path.write_text("".join(lines))
    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cut_log(path, 3)
    assert path.read_text() == "".join(lines)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log.jsonl:2 is not a run's record"):
        cut_log(path, 3)


def test_a_fresh_run_keeps_the_earlier_runs_log(tmp_path: Path) -> None:
    for _ in range(2):
        log = make_logger(tmp_path)
        log.begin(total_steps=2, steps_per_epoch=2)
        log_steps(log, 1, 2)
        log.close()
    assert deterministic(tmp_path / "earlier_1") == deterministic(tmp_path) and len(records(tmp_path)) == 2


def test_a_non_finite_step_stops_the_run_naming_it(tmp_path: Path) -> None:
    """PITFALLS L6: at the next log step or save, whichever comes first; nothing false is recorded."""
    log = make_logger(tmp_path, log_every=4)
    log.begin(total_steps=8, steps_per_epoch=8)
    log_steps(log, 1, 7, bad=(6, 7))
    for at_the_next_sync in (log.state, lambda: log_steps(log, 8, 8)):
        with pytest.raises(UserError, match="step 6: the loss or gradient norm is not finite. Its update was skipped"):
            at_the_next_sync()
    assert [record["step"] for record in records(tmp_path)] == [4]


def test_terminal_lines_have_units_and_stay_in_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_logger(tmp_path)
    capsys.readouterr()
    log.begin(total_steps=1200, steps_per_epoch=500)
    log_steps(log, 1, 1200)
    shown = capsys.readouterr()
    assert shown.err == ""  # no progress bar where there is no terminal
    lines = shown.out.splitlines()
    assert len(lines) == 1200
    for name in ("epoch", "loss", "lr", "norm", "tok/s", "trained", "GiB", "ETA"):
        assert len({line.index(name) for line in lines}) == 1, name
    assert lines[49].startswith("step   50/1200  epoch 0.10  loss  0.0200  lr 2.00e-03  norm   7.14 ")
    assert lines[-1].endswith("ETA 0:00:00") and max(map(len, lines)) <= 124


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_and_the_progress_bar_share_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    log = make_logger(tmp_path)
    log.begin(total_steps=3, steps_per_epoch=3)
    log_steps(log, 1, 3)
    log.close()
    shown = screen.getvalue()
    assert "3/3" in shown and "step/s" in shown
    for line in re.findall(r"step \d/3 .*", shown):  # each on a line of its own, the bar wiped before it
        assert re.search(rf"(\r|\n){re.escape(line)}\n", shown)
    assert len(re.findall(r"step \d/3 .*", shown)) == 3


def test_time_outside_training_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(interval.time, "perf_counter", lambda: now)
    log = make_logger(tmp_path)
    log.begin(total_steps=10, steps_per_epoch=10)
    for step, seconds in enumerate((50.0, 2.0, 4.0), start=1):  # the first compiles
        now += seconds / 2
        with log.paused():
            now += 1000.0
        now += seconds / 2
        log_steps(log, step, step)
    assert [record["tokens_per_s"] for record in records(tmp_path)] == [2.0, 50.0, 25.0]
    assert [record["eta_s"] for record in records(tmp_path)] == [450.0, 16.0, 21.0]  # 9 x 50, 8 x 2, 7 x 3


def test_the_resolved_config_is_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": {"path": "a: b"}, "optim": {"lr": 1e-4, "betas": [0.9, 0.99]}, "beta": 0.1}
    log = make_logger(tmp_path, config=config)
    assert capsys.readouterr().out == "model: path=a: b\noptim: lr=0.0001 betas=[0.9, 0.99]\nbeta=0.1\n"
    log.begin(total_steps=1, steps_per_epoch=1)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == config


def test_an_unwritable_out_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run.out=.*file cannot be written: .*choose another directory"):
        make_logger(tmp_path / "file").begin(total_steps=1, steps_per_epoch=1)


def test_a_full_disk_under_the_log_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EFBIG for ENOSPC; with room again, the torn line is cut and the run continues."""
    log = make_logger(tmp_path)
    log.begin(total_steps=3, steps_per_epoch=3)
    log_steps(log, 1, 1)
    state = log.state()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: .*File too large.*run.resume=auto"):
            log_steps(log, 2, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log = make_logger(tmp_path)
    log.begin(total_steps=3, steps_per_epoch=3, start_step=1, state=state)
    log_steps(log, 2, 3)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.gpu
def test_only_records_wait_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, for their own event; nothing else does."""
    device, wait, waits = torch.device("cuda"), interval.Moment.wait, []

    def allowed(moment: interval.Moment) -> None:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(moment)
        wait(moment)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(interval.Moment, "wait", allowed)
    log = RunLogger(RunConfig(out=str(tmp_path), log_every=3), {}, device)
    log.begin(total_steps=9, steps_per_epoch=9, flops_per_token=1e6)
    one = torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 10):
            log.step(step, loss=one, supervised=1, tokens=9, lr=0.1, grad_norm=one, found_inf=one * 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 3
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 1.0, 1.0]
