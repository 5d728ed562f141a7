"""What the steps since the log's last record add up to, how long they took, and how that gets to the host.

Between records device tensors are added up, in fp64. For a record they leave together, in one copy behind the kernels of its
step: whoever reads it waits for that copy alone, at once or while the device is at the next step. Left out: what a record says
(torchft/metrics.py).
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from torchft.errors import UserError


class Moment:
    """A point in the work of a GPU: behind all that it was given before. On a CPU, which does things at once, simply now."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Both have come. By the GPU's clock: the host's would say when it came to look, which may be a good part of a step later."""
        if self._event is None:
            return self._now - earlier._now
        return earlier._event.elapsed_time(self._event) / 1000  # from ms


def to_host(values: Tensor) -> Tensor:
    """A copy in CPU memory, whole once a Moment made after it has come."""
    try:
        return values.to("cpu", non_blocking=True)  # from a GPU into memory that torch pins for it
    except RuntimeError:  # none can be pinned: a copy that waits. Had a kernel failed, this would fail as well
        return values.cpu()


class Sums(NamedTuple):
    """The device's part of a record."""

    loss: float
    grad_norm: float  # of the last step
    latest: dict[str, float]
    figures: dict[str, float]


class Totals:
    """An interval as it stood when this was made; `wait` for what comes from the device. `latest`: scalars that come along."""

    def __init__(self, interval: "Interval", latest: dict[str, Tensor]) -> None:
        self.supervised, self.tokens, self.steps, self.count = interval.supervised, interval.tokens, interval.steps, interval.count
        self._names = list(latest), list(interval.figures)
        scalars = [interval.loss_sum, interval.grad_norm, interval.first_bad_step, *latest.values(), *interval.figures.values()]
        self._values = to_host(torch.stack([scalar.double() for scalar in scalars]))
        self.end = Moment(interval.loss_sum.device)

    def wait(self) -> Sums:
        """Once the device is there. Raises UserError naming the first step that was not finite."""
        self.end.wait()
        loss, grad_norm, bad_step, *others = self._values.tolist()
        if bad_step:
            raise UserError(
                f"step {bad_step:.0f}: the loss or gradient norm is not finite. Its update was skipped (with optim.in_backward, "
                "that of tensors whose gradient was not finite), and nothing is saved after it. Lower optim.lr, lengthen "
                "optim.warmup_steps or look at that step's data, then "
                "continue from the last checkpoint with run.resume=auto"
            )
        latest, figures = self._names
        count = len(latest)
        return Sums(
            loss, grad_norm, dict(zip(latest, others[:count], strict=True)), dict(zip(figures, others[count:], strict=True))
        )


class Interval:
    """What the steps since the last record add up to. It stays on the device, in fp64: a resume does not round it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)  # of the run; never taken back
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

    def reset(self) -> None:
        """After a record's totals were taken: the device does this behind their copy."""
        self.loss_sum.zero_()
        self.supervised = self.tokens = self.steps = self.count = 0
        self.figures.clear()


class Clock:
    """Seconds spent in training steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark = Moment(device)
        self._before_pause = 0.0
        self._first_lap: tuple[float, int] | None = None
        self._seconds = 0.0
        self._steps = 0
        self.last_step = math.inf  # seconds: the mean of the last lap, once there is one

    def lap(self, end: Moment, steps: int) -> float:
        """Seconds from the last lap's end to this one's, which has come; `steps` steps ended in them."""
        seconds = self._before_pause + end.seconds_since(self._mark)
        self._mark, self._before_pause = end, 0.0
        self._first_lap = self._first_lap or (seconds, steps)
        self._seconds += seconds
        self._steps += steps
        self.last_step = seconds / steps
        return seconds

    def seconds_per_step(self) -> float:
        """Mean over all laps, without the first, which holds compilation, once there are others."""
        assert self._first_lap is not None, "no lap yet"
        seconds, steps = self._first_lap if self._steps > self._first_lap[1] else (0.0, 0)
        return (self._seconds - seconds) / (self._steps - steps)

    def pause(self) -> None:
        """Stop after the steps under way; all laps that ended were taken."""
        now = Moment(self._device)
        now.wait()
        self._before_pause += now.seconds_since(self._mark)

    def resume(self) -> None:
        """Go on, behind what the device was given during the pause."""
        self._mark = Moment(self._device)
