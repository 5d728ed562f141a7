"""What one render of a chat template may use: a template is somebody else's program, and may be a bomb.

No signals and no threads: everything a template can do draws on the budget of the render in progress in its thread,
before it makes anything large, so that a bomb stops within fractions of a second and a few tens of MiB, in any thread.
"""

import threading
import time

# Of one render; the row's `size` is counted in characters and items.
FREE_STEPS, STEPS_PER_SIZE = 50_000, 8  # loop turns, calls, filters, string operations; templates take about size / 2
FREE_CHARS, CHARS_PER_SIZE = 1 << 20, 128  # characters and list items made, at every step on the way to the output
MAX_SECONDS = 20.0  # of this thread's CPU time; the steps end almost any bomb much sooner
MAX_BITS = 4096  # of an integer
MAX_FIELD = 10_000  # width of a formatted field, of an indentation


class LimitExceeded(Exception):
    """A template does more work, or makes more text, than any chat template needs."""


class _Budget(threading.local):
    """What is left to the render in progress in this thread; outside of a render there is no limit."""

    steps: float = float("inf")
    chars: float = float("inf")
    deadline: float = float("inf")  # of time.thread_time(), seconds

    def start(self, size: int) -> None:
        """Begins a render of a row of that size."""
        self.steps = FREE_STEPS + STEPS_PER_SIZE * size
        self.chars = FREE_CHARS + CHARS_PER_SIZE * size
        self.deadline = time.thread_time() + MAX_SECONDS

    def stop(self) -> None:
        self.steps = self.chars = self.deadline = float("inf")

    def spend(self, chars: int = 0) -> None:
        """Takes one step and room for `chars` characters or list items.

        Raises:
            LimitExceeded: the render has used up its budget.
        """
        self.steps -= 1
        self.chars -= chars
        if self.chars < 0:
            raise LimitExceeded("it makes far more text than it is given")
        if self.steps < 0 or (self.steps % 64 == 0 and time.thread_time() > self.deadline):
            raise LimitExceeded("it takes far more steps than a row of this size needs")


BUDGET = _Budget()
