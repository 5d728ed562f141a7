"""The profiler's window and the memory tables."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchft.config import RunConfig
from torchft.profiling import TORCH, ProfileWindow, peak_table

CPU = torch.device("cpu")


def multiply(size: int, device: torch.device = CPU) -> Tensor:
    return torch.ones(size, size, device=device) @ torch.ones(size, size, device=device)


def test_the_window_holds_the_steps_asked_for(tmp_path: Path) -> None:
    """Two skipped, two recorded; the fifth, another operator, is not in it."""
    said: list[str] = []
    window = ProfileWindow(RunConfig(out=str(tmp_path), profile_steps=2), CPU, said.append)
    for step in range(5):
        multiply(16)
        if step not in (2, 3):
            torch.ones(16).cumsum(0)
        window.step()
    window.close()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert names.count("aten::mm") == 2 and "aten::cumsum" not in names
    assert "aten::mm" in (tmp_path / "profile" / "top_ops.txt").read_text()
    assert said == [f"profile of 2 steps written to {tmp_path}/profile: trace.json, top_ops.txt"]


def test_a_short_run_writes_what_there_is_or_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    for steps, name in ((3, "a"), (1, "b"), (2, "c")):
        window = ProfileWindow(RunConfig(out=str(tmp_path / name), profile_steps=5), CPU, said.append)
        for _ in range(steps):
            multiply(16)
            window.step()
        window.close()
    assert (tmp_path / "a" / "profile" / "trace.json").exists()
    nothing = "run.profile_steps: nothing recorded, the run ended within the first 2 steps"
    assert said == [f"profile of 1 step written to {tmp_path}/a/profile: trace.json, top_ops.txt", nothing, nothing]
    assert not (tmp_path / "c" / "profile").exists()


def test_nothing_happens_unless_asked(tmp_path: Path) -> None:
    said: list[str] = []
    window = ProfileWindow(RunConfig(out=str(tmp_path)), CPU, said.append)
    window.step()
    window.close()
    assert said == [] and list(tmp_path.iterdir()) == []


def event(action: str, address: int, mebibytes: int, line: int) -> dict:
    frames = [
        {"filename": TORCH + "/nn/functional.py", "line": 1, "name": "linear"},
        {"filename": "model.py", "line": line, "name": "forward"},
    ]
    return {"action": action, "addr": address, "size": mebibytes * 2**20, "frames": frames}


def test_the_memory_table_is_of_the_peak() -> None:
    events = [
        event("free_completed", 9, 500, 7),  # allocated before the recording: not counted
        event("alloc", 1, 100, 10),
        event("alloc", 2, 30, 20),
        event("alloc", 3, 30, 20),
        event("free_requested", 1, 100, 10),  # not free yet
        event("segment_alloc", 4, 999, 30),  # reserved, not used
        event("alloc", 5, 1, 40),  # the peak: 161
        event("free_completed", 1, 100, 10),
        event("alloc", 1, 50, 50),  # 111, at an address used before
    ]
    assert peak_table(events).splitlines() == [
        "       161.0 MiB  in all, at the peak",
        "       100.0 MiB  model.py:10 forward",
        "        60.0 MiB  model.py:20 forward",
        "         1.0 MiB  model.py:40 forward",
    ]
    events[1]["frames"] = events[1]["frames"][:1]
    assert "100.0 MiB  inside torch" in peak_table(events)
    assert peak_table([]) == "         0.0 MiB  in all, at the peak\n"


@pytest.mark.gpu
def test_the_snapshot_of_a_gpu_names_our_lines(tmp_path: Path) -> None:
    window = ProfileWindow(RunConfig(out=str(tmp_path), profile_steps=1), torch.device("cuda"))
    for _ in range(4):
        multiply(4096, torch.device("cuda"))  # three matrices of 64 MiB
        window.step()
    window.close()
    snapshot = json.loads((tmp_path / "profile" / "memory.json").read_text())
    assert snapshot["segments"] and any(snapshot["device_traces"])
    table = (tmp_path / "profile" / "memory_top.txt").read_text()
    assert f"{Path(__file__).name}" in table and "multiply" in table
    assert float(table.split()[0].replace(",", "")) >= 192
    assert "mm" in (tmp_path / "profile" / "top_ops.txt").read_text()
