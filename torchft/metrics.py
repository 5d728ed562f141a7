"""The run's log: a line on the terminal and a JSON object in out/log.jsonl per log step, trackers, the resolved config.

Between log steps only device tensors are added up; the device is waited for once per log step. Every record begins
with the fields that a resumed run repeats bit for bit (DETERMINISTIC_FIELDS); timings follow. Everything printed or
written goes through redact.py. Of several processes the first prints and writes; figures are those of the whole run, but
for memory, which is the first one's.
"""

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from torchft.atomic import replace_bytes
from torchft.config import RunConfig
from torchft.errors import UserError
from torchft.losses import FIGURES
from torchft.ranks import rank, world_size
from torchft.redact import redact, redact_text
from torchft.run_dir import set_aside
from torchft.throughput import peak_flops, peak_memory_gib
from torchft.trackers import Trackers

DETERMINISTIC_FIELDS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "epoch", "valid_loss", "exact_match")
DETERMINISTIC_FIELDS += ("aux_loss", *FIGURES, *(f"valid_{name}" for name in FIGURES))
SHOWN = ("aux_loss", "margin", "accuracy", "kl")  # of those, on the terminal


class RunLogger:
    """Prints and records one run. `config`: the resolved config as nested dicts."""

    def __init__(self, run: RunConfig, config: dict[str, Any], device: torch.device) -> None:
        self._run = run
        self._out = Path(run.out)
        self._config = redact(config)
        self._device = device
        self._writes = rank() == 0
        self._trackers = Trackers(run if self._writes else RunConfig())
        try:
            if self._writes:
                self._out.mkdir(parents=True, exist_ok=True)  # now: not after a model was loaded
        except OSError as error:
            raise UserError(f"run.out={run.out} cannot be written: {error.strerror}; choose another directory") from None
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._interval = Interval(device)
        self._constants: dict[str, float] = {}
        self._latest: dict[str, Tensor] = {}
        for group, options in self._config.items():
            text = f"{group}={options}"
            if isinstance(options, dict):
                text = f"{group}: " + " ".join(_shown(name, value) for name, value in options.items())
            self.print(textwrap.fill(text, 120, subsequent_indent="    ", break_long_words=False))

    def print(self, text: str) -> None:
        """Lines on the terminal, above the progress bar."""
        if self._writes:
            with tqdm.external_write_mode(file=sys.stdout):
                print(redact_text(text), flush=True)

    def begin(
        self,
        *,
        total_steps: int,
        steps_per_epoch: float,
        start_step: int = 0,
        state: dict[str, Any] | None = None,
        flops_per_token: float = 0.0,
    ) -> None:
        """Open everything, right before the loop.

        A fresh start moves an earlier run's files aside; a resumed one (`start_step` steps done, `state` from
        `state()`) cuts log.jsonl back to `start_step`. Raises UserError where run.out cannot be written.
        """
        if start_step > total_steps:
            raise UserError(
                f"the checkpoint is at step {start_step} and the run would end at {total_steps}: raise run.max_steps or "
                "run.epochs, or resume an earlier checkpoint"
            )
        if start_step == total_steps:
            self.print(f"nothing is left to train after step {total_steps}: the result is written again")
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._flops_per_token = flops_per_token
        state = state or {"loss_sum": 0.0, "supervised": 0, "wandb_id": None}
        self._interval.loss_sum.fill_(state["loss_sum"])
        self._interval.supervised = state["supervised"]
        self._interval.add_figures(state.get("count", 0), state.get("figures", {}))
        with self._writing():
            if self._writes:
                set_aside(self._out, start_step, self.print)
                cut_log(self._out / "log.jsonl", start_step)
                replace_bytes(self._out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self._config)).encode())
            self._log = open(self._out / "log.jsonl" if self._writes else os.devnull, "a", encoding="utf-8")
        self._trackers.begin(self._config, start_step, state["wandb_id"])
        # On a terminal only: in a file or a pipe a bar is noise.
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            leave=False,
            disable=not (self._writes and sys.stderr.isatty()),
        )
        self._clock = Clock()

    def figures(self, count: int, sums: dict[str, Tensor]) -> None:
        """What else the next record holds, told before each `step`: means over `count` of something, pairs say.

        The loss is then a sum over those, too, and its mean is taken over them.
        """
        self._interval.add_figures(count, sums)

    def latest(self, **figures: Tensor) -> None:
        """What the next record holds of the step to come alone, as its grad_norm is."""
        self._latest = figures

    def constant(self, **figures: float) -> None:
        """What all records hold from here on, until it is told again."""
        self._constants |= figures

    def step(
        self, step: int, *, loss: Tensor, supervised: int, tokens: int, lr: float, grad_norm: Tensor, found_inf: Tensor
    ) -> None:
        """Count optimizer step `step` (from 1); at each `run.log_every`-th and the last one, log.

        `loss`: sum over the step's `supervised` tokens; `tokens`: all it processed; `grad_norm`, `found_inf`: from
        clip_and_check. Raises UserError, at a log step, if a step since the last one was not finite.
        """
        interval = self._interval
        interval.add(step, loss, supervised, tokens, grad_norm, found_inf)
        self._bar.update(1)
        if step % self._run.log_every and step != self._total_steps:
            return
        loss_sum, norm = interval.read()  # the one wait for the device
        seconds = self._clock.lap(interval.steps)
        rate = interval.tokens / seconds
        record = {
            "step": step,
            "loss": loss_sum / max(1, interval.count or interval.supervised),  # per supervised token since the last record
            "lr": lr,
            "grad_norm": norm,  # of this step, before clipping
            **{name: value.item() for name, value in self._latest.items()},
            "supervised_tokens": interval.supervised,  # since the last record
            "epoch": step / self._steps_per_epoch,
            **{name: total / max(1, interval.count) for name, total in interval.read_figures().items()},
            "tokens_per_s": round(rate, 1),
            "peak_memory_gib": round(peak_memory_gib(self._device), 3),
            "mfu": round(rate * self._flops_per_token / (self._peak * world_size()), 4) if self._peak else None,
            "eta_s": round((self._total_steps - step) * self._clock.seconds_per_step(), 1),
            **self._constants,
        }
        interval.reset()
        self._write(record)
        self.print(self._line(record))

    def validation(self, step: int, **values: float) -> None:
        """Log what an evaluation after `step` found, such as valid_loss or exact_match."""
        self._write({"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()})
        self.print(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record; flushed at once, so that a kill loses none."""
        with self._writing():
            self._log.write(json.dumps(record, allow_nan=False) + "\n")
            self._log.flush()
        self._trackers.log(record["step"], record)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk and the like are the user's to mend, not a traceback."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.out={self._run.out} cannot be written: {error}; mend that or choose another directory, "
                "then continue from the last checkpoint with run.resume=auto"
            ) from None

    def _line(self, record: dict[str, Any]) -> str:
        """The record for a person; columns stay in place from line to line."""
        width = len(str(self._total_steps))
        columns = [
            f"step {record['step']:>{width}}/{self._total_steps}",
            f"epoch {record['epoch']:.2f}",
            f"loss {record['loss']:7.4f}",
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:6.2f}",
            f"{record['tokens_per_s']:>9,.0f} tok/s",
            f"{record['supervised_tokens']:>6,} trained",
            f"{record['peak_memory_gib']:6.2f} GiB",
        ]
        columns[3:3] = [f"{name} {record[name]:6.3f}" for name in SHOWN if name in record]
        if record["mfu"] is not None:
            columns.append(f"MFU {record['mfu']:5.1%}")
        columns.append(f"ETA {timedelta(seconds=round(record['eta_s']))}")
        return "  ".join(columns)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving: their time does not count in tokens/s and ETA."""
        self._clock.pause(self._device)
        yield
        self._clock.resume(self._device)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the sums since the last record, exactly; all records are on the disk afterwards.

        Raises UserError if a step since the last record was not finite: such a run must not be saved.
        """
        loss_sum, _ = self._interval.read()
        with self._writing():
            if self._writes:
                os.fsync(self._log.fileno())
        more = {"count": self._interval.count, "figures": self._interval.read_figures()}
        return {"loss_sum": loss_sum, "supervised": self._interval.supervised, "wandb_id": self._trackers.wandb_id()} | more

    def close(self) -> None:
        """After the last step."""
        self._bar.close()
        self._log.close()
        self._trackers.close()


def _shown(key: str, value: Any) -> str:
    """One option as it is written on a command line; of a data source what is set. All of it is in out/config.yaml."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        sources = [{name: item for name, item in source.items() if item not in ("", {}, "auto")} for source in value]
        value = "[" + ", ".join("{" + ", ".join(f"{n}: {v}" for n, v in source.items()) + "}" for source in sources) + "]"
    return f"{key}={value}"


class Interval:
    """What the steps since the last record add up to. It stays on the device, in fp64: a resume does not round it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.supervised = 0
        self.count, self.figures = 0, {}  # see RunLogger.figures
        self.tokens = 0  # not saved: after a resume tokens/s counts what this process did
        self.steps = 0

    def add(self, step: int, loss: Tensor, supervised: int, tokens: int, grad_norm: Tensor, found_inf: Tensor) -> None:
        """One optimizer step; does not wait for the device."""
        self.loss_sum += loss.detach()
        found_inf = found_inf.to(self.loss_sum.device)  # from CPU memory, where the gradients are there
        self.first_bad_step = torch.where((self.first_bad_step == 0) & (found_inf > 0), step, self.first_bad_step)
        self.grad_norm = grad_norm.detach().to(self.loss_sum.device)
        self.supervised += supervised
        self.tokens += tokens
        self.steps += 1

    def add_figures(self, count: int, sums: dict[str, Tensor]) -> None:
        """One step's, or those of a checkpoint."""
        self.count += count
        for name, value in sums.items():
            before = self.figures.setdefault(name, torch.zeros_like(self.loss_sum))
            before += value

    def read_figures(self) -> dict[str, float]:
        """Their sums; waits for the device."""
        values = torch.stack(list(self.figures.values())).tolist() if self.figures else []
        return dict(zip(self.figures, values, strict=True))

    def read(self) -> tuple[float, float]:
        """The loss sum and the last gradient norm. Raises UserError naming the first step that was not finite."""
        values = torch.stack([self.loss_sum, self.grad_norm.double(), self.first_bad_step.double()])
        loss_sum, norm, bad_step = values.tolist()
        if bad_step:
            raise UserError(
                f"step {bad_step:.0f}: the loss or gradient norm is not finite. Its update was skipped (with optim.in_backward, "
                "that of tensors whose gradient was not finite), and nothing is saved after it. Lower optim.lr, lengthen "
                "optim.warmup_steps or look at that step's data, then "
                "continue from the last checkpoint with run.resume=auto"
            )
        return loss_sum, norm

    def reset(self) -> None:
        """After a record."""
        self.loss_sum.zero_()
        self.supervised = self.tokens = self.steps = self.count = 0
        self.figures.clear()


class Clock:
    """Seconds spent in training steps."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._before_pause = 0.0
        self._first_lap: tuple[float, int] | None = None
        self._seconds = 0.0
        self._steps = 0

    def lap(self, steps: int) -> float:
        """Seconds since the last lap, in which `steps` steps ended; the device has been waited for."""
        now = time.perf_counter()
        seconds = self._before_pause + now - self._mark
        self._mark, self._before_pause = now, 0.0
        self._first_lap = self._first_lap or (seconds, steps)
        self._seconds += seconds
        self._steps += steps
        return seconds

    def seconds_per_step(self) -> float:
        """Mean over all laps, without the first, which holds compilation, once there are others."""
        assert self._first_lap is not None, "no lap yet"
        seconds, steps = self._first_lap if self._steps > self._first_lap[1] else (0.0, 0)
        return (self._seconds - seconds) / (self._steps - steps)

    def pause(self, device: torch.device) -> None:
        """Stop after the steps under way."""
        _wait_for(device)
        self._before_pause += time.perf_counter() - self._mark

    def resume(self, device: torch.device) -> None:
        """Go on."""
        _wait_for(device)
        self._mark = time.perf_counter()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cut_log(path: Path, step: int) -> None:
    """Keep the records up to `step`, in one atomic replacement; a last line that a crash cut short goes too.

    Raises UserError naming the line if any other is not a record.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            recorded_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not a run's record: remove that line, or move the file away") from None
        if recorded_step <= step and line.endswith(b"\n"):
            kept.append(line)
    replace_bytes(path, b"".join(kept))
