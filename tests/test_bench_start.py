"""scripts/bench_start.py: the files it writes, what it times, and that nothing of a run is left behind."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from script_modules import script_module

from torchft.hf_checkpoint import open_checkpoint
from torchft.models import build_model, read_config
from torchft.weights import load_weights


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with script_module("bench_start") as module:
        yield module


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    script.bench_recipe.write_inputs(folder, script.TINY, 8 * script.STEPS * 2 * 64)
    script.write_weights(folder / "model", script.TINY_FILE_BYTES)
    return folder


def test_the_files_are_a_model_of_several_files(script: ModuleType, folder: Path) -> None:
    files = sorted((folder / "model").glob("*.safetensors"))
    assert len(files) > 1 and script.read_once(folder / "model") == sum(file.stat().st_size for file in files)
    with torch.device("meta"):
        model = build_model(read_config(folder / "model"))
    report = load_weights(model, folder / "model", device="cpu", dtype=torch.float32)
    assert report.num_tensors == len(dict(model.named_parameters())) == len(open_checkpoint(folder / "model").tensors)
    with safe_open(files[0], framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  (no mapping)
    weights = dict(model.named_parameters())
    assert (weights["model.norm.weight"] == 1).all()
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.02)


def test_the_recipe_is_timed_up_to_its_first_step(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    options = script.TINY_OPTIONS | {"model.dtype": "float32"}
    out = tmp_path / "out"
    command = script.recipe_command(folder, out, options)
    start = time.perf_counter()
    seen = script.seconds_until(script.LINES, command, script.caches_in(tmp_path), 120)
    took = time.perf_counter() - start
    assert list(seen) == list(script.LINES) and sorted(seen.values()) == list(seen.values())
    assert 0.5 < seen["imports"] and seen["step 1"] <= took
    assert len((out / "log.jsonl").read_text().splitlines()) >= 1 and not (out / "adapter").exists()
    assert (tmp_path / "xdg_cache_home" / "torchft").is_dir()  # its tokens are not those of the user's other runs


def printing(*lines: str, first: str = "", then: str = "") -> list[str]:
    """A process that does something, prints lines 0.2 s apart, and does something else."""
    loop = f"for line in {lines!r}:\n    print(line, flush=True); time.sleep(0.2)"
    return ["-c", f"import subprocess, sys, time\n{first}\n{loop}\n{then}"]


def test_a_process_ends_at_the_last_line_with_all_that_it_started(script: ModuleType, tmp_path: Path) -> None:
    left = tmp_path / "left"
    later = f"import time; time.sleep(1.5); open({str(left)!r}, 'w')"  # as a compiler's worker would
    worker = f"subprocess.Popen([sys.executable, '-c', {later!r}])"
    command = printing("noise", "a 1", "a 2", "a 3", "b", first=worker, then="time.sleep(60)")
    seen = script.seconds_until({"a": "a", "b": "b"}, command, dict(os.environ), 30)
    assert 0.2 <= seen["a"] < seen["b"] - 0.4  # the first of the lines that begin so
    time.sleep(1.5)
    assert not left.exists()


def test_why_there_is_no_first_step(script: ModuleType) -> None:
    with pytest.raises(script.NoStep, match="ended after .* its last line: error: no such thing"):
        script.seconds_until({"b": "b"}, printing("a", "error: no such thing"), dict(os.environ), 30)
    with pytest.raises(script.NoStep, match="took more than 1 s.* its last line: a"):
        script.seconds_until({"b": "b"}, printing("a", then="time.sleep(60)"), dict(os.environ), 1)
    with pytest.raises(script.NoStep, match="it printed nothing"):
        script.seconds_until({"b": "b"}, ["-c", ""], dict(os.environ), 30)


def test_median_and_table(script: ModuleType) -> None:
    runs = [{"imports": 1.0, "step 1": seconds} for seconds in (9.0, 3.0, 5.0)]
    reduced = script.reduce_runs(runs)
    assert reduced == {"seconds": 5.0, "until": runs[2], "all_seconds": [9.0, 3.0, 5.0]}
    assert script.reduce_runs(runs[:2])["seconds"] == 3.0
    lines = [line.split() for line in script.table({"cold": reduced, "hf_peft": script.reduce_runs(runs[1:2])}).splitlines()]
    assert ["step", "1", "5.00", "3.00"] in lines and ["imports", "1.00", "1.00"] in lines and ["data", "-", "-"] in lines


def test_a_folder_with_something_else_is_refused(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    before = sorted((folder / "model").iterdir())
    script.prepare(folder, script.TINY, 10**5, 100)  # complete: kept
    assert sorted((folder / "model").iterdir()) == before
    with pytest.raises(SystemExit, match="is something else"):
        script.prepare(folder, script.TINY | {"vocab_size": 640}, 10**5, 100)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(script.TINY))  # but no weights: it was broken off
    with pytest.raises(SystemExit, match="not all of it"):
        script.prepare(tmp_path, script.TINY, 10**5, 100)


def test_wrong_arguments_are_one_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, message in ((["--repeat", "0"], "--repeat is 0"), (["--option", "lr"], "--option lr is not KEY=VALUE")):
        monkeypatch.setattr(sys, "argv", ["bench_start.py", *argv])
        with pytest.raises(SystemExit, match=message):
            script.parse_arguments()
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench_start.py"])
        with pytest.raises(SystemExit, match="error: there is no GPU here"):
            script.main()
