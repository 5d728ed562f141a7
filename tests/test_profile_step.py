"""scripts/profile_step.py: a small trace by hand, its kinds, gaps and overlaps."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_modules import script_module


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with script_module("profile_step") as module:
        yield module


def event(category: str, name: str, start_ms: float, ms: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start_ms * 1000, "dur": ms * 1000}


def trace(tmp_path: Path, events: list[dict]) -> Path:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}))
    return file


def test_kinds_gaps_and_overlaps(script, tmp_path):
    steps = [event("user_annotation", f"ProfilerStep#{n}", 100 * n, 100) for n in range(3)]  # the last two: 100 to 300 ms
    work = [
        event("kernel", "nvjet_hsh_256x128", 50, 100),  # half of it before the window
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90", 150, 40),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 160, 20),  # beside attention
        event("kernel", "rms_norm_kernel", 200, 10),
        event("kernel", "rms_norm_kernel", 290, 30),  # 20 of it behind the window
        event("cpu_op", "aten::mm", 100, 200),
    ]
    profile = script.read_trace(trace(tmp_path, steps + work), steps=2)
    assert profile["step_ms"] == 100
    assert profile["kinds_ms"] == {
        "products": 25, "attention": 20, "other kernels": 10, "copies": 10, "idle": 45, "overlapped": -10,
    }  # fmt: skip
    assert sum(profile["kinds_ms"].values()) == profile["step_ms"]
    assert profile["kernels"][0] == {"name": "nvjet_hsh_256x128", "ms": 25, "launches": 0.5}
    assert "25.00 ms   25.0%  products" in script.render(profile)


def test_a_short_trace_and_one_without_a_gpu_are_refused(script, tmp_path):
    one = [event("user_annotation", "ProfilerStep#0", 0, 10)]
    with pytest.raises(SystemExit, match="holds 1 steps, and the last 4 are wanted"):
        script.read_trace(trace(tmp_path, one), steps=4)
    with pytest.raises(SystemExit, match="shows nothing on a GPU"):
        script.read_trace(trace(tmp_path, one), steps=1)


def test_a_file_that_is_no_trace_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match=r"none.json: No such file or directory; a run with run.profile_steps"):
        script.read_trace(tmp_path / "none.json", steps=1)
    for text in ("# words", "[]", "{}", '{"traceEvents": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(SystemExit, match=r"other.json is not what torch.profiler writes"):
            script.read_trace(tmp_path / "other.json", steps=1)


def test_what_cannot_be_measured_is_refused_before_anything_starts(script, monkeypatch):
    case, check = "lora_8b_bf16_2048x4_noac", script.bench_recipe.check
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check([case], ["model.shard=all"], 2)
    check([case, "dpo_1b_bf16_ragged"], [], 0)
    refused = [
        ([case, "nope"], [], 0, "no case nope; bench_recipe.py --list"),
        (["dpo_1b_bf16_ragged"], [], 1, "leave out --gpus"),
        ([case], ["model.shard"], 0, "--option model.shard: write KEY=VALUE"),
        ([case], [], 3, r"--gpus 3: write 0 \(one process\) to 2"),
        ([case], [], -1, "--gpus -1: write 0"),
    ]
    for cases, options, gpus, message in refused:
        with pytest.raises(SystemExit, match=message):
            check(cases, options, gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU to measure on"):
        check([case], [], 0)


def test_clock_and_power_are_those_of_a_busy_gpu(script, tmp_path, monkeypatch):
    text = "345, 1980, 80.1, 700.00, 0\n1395, 1980, 698.2, 700.00, 100\n1410, 1980, 690.0, 700.00, 100\n1380, 1980, 699.9, 700.00, 99\n"
    expected = {"sm_mhz": 1395, "max_sm_mhz": 1980, "watts": 698.2, "limit_watts": 700, "samples": 3}
    for rest in ("[N/A], 1980, 1, 700, 100", *("1395, 1980, 698.2, 700.00, 10"[:end] for end in range(30))):  # not known; cut off
        assert script.read_clock(text + rest) == expected
    assert script.read_clock("345, 1980, 80.1, 700.00, 0\n") == {}
    tool, told = tmp_path / "nvidia-smi", tmp_path / "told"
    tool.write_text(f'#!/bin/sh\necho "$@" > {told}\nwhile true; do echo "1395, 1980, 698.2, 700.00, 100"; sleep 0.05; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with script.watched(tmp_path / "clock"):
        for _ in range(200):
            time.sleep(0.02)
            if (tmp_path / "clock").read_text():
                break
    found = script.read_clock((tmp_path / "clock").read_text())
    assert found["watts"] == 698.2
    wanted = ("--id=3", f"--query-gpu={','.join(script.ASKED)}", "--format=csv,noheader,nounits", "--loop-ms=100")
    assert told.read_text().split() == list(wanted)
    monkeypatch.setenv("PATH", "")
    with script.watched(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
