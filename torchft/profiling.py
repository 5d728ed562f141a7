"""Where time and memory go: a window of torch.profiler and CUDA's allocation history, both of a run's first steps.

    out/profile/trace.json        open it in https://ui.perfetto.dev or chrome://tracing
    out/profile/top_ops.txt       operators by their own time
    out/profile/memory.json       torch.cuda.memory._snapshot(): segments, and every allocation and free with its stack
    out/profile/memory_top.txt    what was allocated in these steps and alive at their peak, by line of code

Steps that run as a CUDA graph show kernels without their operators: model.kernels={graph: eager} for these. Left out: a window later
in the run (set run.max_steps and resume there) and memory on CPU.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from torchft.atomic import replace_bytes
from torchft.checks import counted
from torchft.config import RunConfig
from torchft.ranks import rank

SKIPPED_STEPS = 2  # the first compiles and fills caches; in the second the profiler starts up and allocations are recorded
MEMORY_EVENTS = 50_000  # kept at most, the newest; one is a few kB of JSON
TOP = 40  # rows per table
TORCH = str(Path(torch.__file__).parent)


class ProfileWindow:
    """Call `step()` after each optimizer step and `close()` after the last; does nothing unless the config asks."""

    def __init__(self, run: RunConfig, device: torch.device, say: Callable[[str], None] = print) -> None:
        self._folder = Path(run.out) / "profile"
        self._device = device
        self._say = say
        self._steps = 0
        self._memory = bool(run.profile_steps) and device.type == "cuda" and rank() == 0
        self._profiler = self._build_profiler(run.profile_steps) if run.profile_steps and rank() == 0 else None
        if self._profiler:
            self._profiler.start()
        if self._memory:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)

    def _build_profiler(self, steps: int) -> profile:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        # acc_events: the only cycle's events stay readable after the window, without a warning
        window = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
        return profile(activities=activities, schedule=window, on_trace_ready=self._write_trace, acc_events=True)

    def step(self) -> None:
        """One optimizer step ended."""
        self._steps += 1
        if self._steps == SKIPPED_STEPS:  # before the window, which recording stacks would slow
            self._write_memory()
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """Write what a run shorter than its windows recorded."""
        if self._profiler:
            self._profiler.stop()
            if self._steps <= SKIPPED_STEPS:
                self._say(f"run.profile_steps: nothing recorded, the run ended within the first {SKIPPED_STEPS} steps")
        self._write_memory()

    def _write_trace(self, profiler: profile) -> None:
        recorded = self._steps - SKIPPED_STEPS
        if recorded <= 0:  # stopped where the window begins: a trace of no step
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        key = f"self_{self._device.type}_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=TOP, max_name_column_width=80)
        replace_bytes(self._folder / "top_ops.txt", table.encode())
        self._say(f"profile of {counted(recorded, 'step')} written to {self._folder}: trace.json, top_ops.txt")

    def _write_memory(self) -> None:
        if not self._memory:
            return
        self._memory = False
        torch.cuda.synchronize(self._device)
        snapshot = torch.cuda.memory._snapshot(self._device)
        torch.cuda.memory._record_memory_history(enabled=None)
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(self._folder / "memory.json", json.dumps(snapshot, default=str).encode())
        events = [event for trace in snapshot["device_traces"] for event in trace]
        replace_bytes(self._folder / "memory_top.txt", peak_table(events).encode())
        self._say(f"memory history written to {self._folder}: memory.json, memory_top.txt")


def peak_table(events: list[dict[str, Any]]) -> str:
    """The allocations alive when their sum was largest, summed by line of code, largest first.

    `events`: one device's allocator trace, entries of `device_traces` in torch.cuda.memory._snapshot().
    """
    live_bytes = peak_bytes = peak_index = 0
    live: dict[int, dict[str, Any]] = {}
    for index, event in enumerate(events):
        live_bytes += _track(live, event)
        if live_bytes > peak_bytes:
            peak_bytes, peak_index = live_bytes, index
    live = {}
    for event in events[: peak_index + 1]:
        _track(live, event)
    by_line: Counter[str] = Counter()
    for event in live.values():
        by_line[_line_of_code(event["frames"])] += event["size"]
    rows = [f"{size / 2**20:12,.1f} MiB  {line}" for line, size in by_line.most_common(TOP)]
    return "\n".join([f"{peak_bytes / 2**20:12,.1f} MiB  in all, at the peak", *rows]) + "\n"


def _track(live: dict[int, dict[str, Any]], event: dict[str, Any]) -> int:
    """Update the live allocations; the change in bytes. A free of what was allocated before the recording is 0."""
    if event["action"] == "alloc":
        live[event["addr"]] = event
        return event["size"]
    if event["action"] == "free_completed":
        freed = live.pop(event["addr"], None)
        return -freed["size"] if freed else 0
    return 0


def _line_of_code(frames: list[dict[str, Any]]) -> str:
    """The innermost frame outside torch; frames come innermost first."""
    outside = [frame for frame in frames if not frame["filename"].startswith(TORCH)]
    if not outside:
        return "inside torch"
    return f"{outside[0]['filename']}:{outside[0]['line']} {outside[0]['name']}"
