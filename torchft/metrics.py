"""The run's log: a line on the terminal and a JSON object in out/log.jsonl per log step, trackers, the resolved config.

Between log steps only device tensors are added up; the device is waited for once per record. A GPU whose steps are short is
given the next step first: the record, or the error of a step that was not finite, comes while it works on that, so that it is
never without work because of the log. Nothing is validated or saved before. Every record begins with the fields that a resumed
run repeats bit for bit (DETERMINISTIC_FIELDS); timings follow. Everything printed or written goes through redact.py. Of several
processes the first prints and writes; figures are those of the whole run, but for memory, which is the first one's.
"""

import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from torchft.atomic import replace_bytes
from torchft.config import RunConfig
from torchft.errors import UserError
from torchft.interval import Clock, Interval, Totals
from torchft.losses import FIGURES
from torchft.ranks import rank, world_size
from torchft.redact import redact, redact_text
from torchft.run_dir import give_up, keep_for_this_run, set_aside
from torchft.throughput import peak_flops, peak_memory_gib
from torchft.trackers import Trackers

DETERMINISTIC_FIELDS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "epoch", "valid_loss", "exact_match")
DETERMINISTIC_FIELDS += ("aux_loss", *FIGURES, *(f"valid_{name}" for name in FIGURES))
SHOWN = ("aux_loss", "margin", "accuracy", "kl")  # of those, on the terminal
# Seconds per step, up to which a GPU's records are read a step late. Of longer ones the milliseconds without work are less than
# one in a hundred, and a person would wait for the line. Processes may differ in it: none waits for another's log.
SHORT_STEP = 1.0


class Pending(NamedTuple):
    """A record before it is read."""

    step: int
    lr: float
    totals: Totals
    peak_memory_gib: float
    constants: dict[str, float]


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
                self._lock = keep_for_this_run(self._out, self.print)
        except OSError as error:
            raise UserError(f"run.out={run.out} cannot be written: {error.strerror}; choose another directory") from None
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._interval = Interval(device)
        self._runs_behind = device.type == "cuda"  # the device, behind what it is given
        self._pending: Pending | None = None
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
        warmup = self._config.get("optim", {}).get("warmup_steps", 0)
        if 0 < total_steps <= warmup:
            peak = f"the learning rate rises to {total_steps / warmup:.0%} of optim.lr and never falls"
            self.print(f"WARNING: the run ends within its warm-up, {total_steps} of optim.warmup_steps={warmup}: {peak}")
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
        seen = self._writes and sys.stderr.isatty()  # in a file or a pipe a bar is noise
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", leave=False, disable=not seen)
        self._clock = Clock(self._device)

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
        clip_and_check. Raises UserError, at a log step or one step later, if a step since the last one was not finite.
        """
        self._interval.add(step, loss, supervised, tokens, grad_norm, found_inf)
        self._bar.update(1)
        self._finish()  # only now: the device has this whole step to do
        last = step == self._total_steps
        if step % self._run.log_every and not last:
            return
        totals = Totals(self._interval, self._latest)
        self._interval.reset()
        self._pending = Pending(step, lr, totals, round(peak_memory_gib(self._device), 3), dict(self._constants))
        if last or not self._runs_behind or self._clock.last_step > SHORT_STEP:
            self._finish()

    def _finish(self) -> None:
        """Write the record that is pending, if any. Raises UserError if a step of it was not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, totals = pending.step, pending.totals
        sums = totals.wait()  # the one wait for the device
        rate = totals.tokens / self._clock.lap(totals.end, totals.steps)
        record = {
            "step": step,
            "loss": sums.loss / max(1, totals.count or totals.supervised),  # per supervised token since the last record
            "lr": pending.lr,
            "grad_norm": sums.grad_norm,  # of this step, before clipping
            **sums.latest,
            "supervised_tokens": totals.supervised,  # since the last record
            "epoch": step / self._steps_per_epoch,
            **{name: total / max(1, totals.count) for name, total in sums.figures.items()},
            "tokens_per_s": round(rate, 1),
            "peak_memory_gib": pending.peak_memory_gib,
            "mfu": round(rate * self._flops_per_token / (self._peak * world_size()), 4) if self._peak else None,
            "eta_s": round((self._total_steps - step) * self._clock.seconds_per_step(), 1),
            **pending.constants,
        }
        self._write(record)
        self.print(self._line(record))

    def validation(self, step: int, **values: float) -> None:
        """Log what an evaluation after `step` found, such as valid_loss or exact_match."""
        self._finish()
        self._write({"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()})
        self.print(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record; flushed at once, so that a kill loses none that is written."""
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
        """Around evaluation and saving: their time does not count in tokens/s and ETA.

        Raises UserError if a step of the last record was not finite.
        """
        self._finish()
        self._clock.pause()
        yield
        self._clock.resume()

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the sums since the last record, exactly; all records are on the disk afterwards.

        Raises UserError if a step since the last record was not finite: such a run must not be saved.
        """
        self._finish()
        totals = Totals(self._interval, {})
        sums = totals.wait()
        with self._writing():
            if self._writes:
                os.fsync(self._log.fileno())
        more = {"count": totals.count, "figures": sums.figures}
        return {"loss_sum": sums.loss, "supervised": totals.supervised, "wandb_id": self._trackers.wandb_id()} | more

    def close(self) -> None:
        """After the last step."""
        self._finish()
        self._bar.close()
        self._log.close()
        self._trackers.close()
        if self._writes:
            give_up(self._out, self._lock)


def _shown(key: str, value: Any) -> str:
    """One option as it is written on a command line; of a data source what is set. All of it is in out/config.yaml."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        sources = [{name: item for name, item in source.items() if item not in ("", {}, "auto")} for source in value]
        value = "[" + ", ".join("{" + ", ".join(f"{n}: {v}" for n, v in source.items()) + "}" for source in sources) + "]"
    return f"{key}={value}"


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
