"""docs/RECORDS.md says what docs/records.jsonl says, and every record is complete."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import script_module

EVERY = {"case", "date", "commit", "command", "gpu", "num_gpus", "versions", "baselines"}
FIELDS = EVERY | {"tokens_per_s", "peak_alloc_gib", "loss_first", "loss_last"}
START_FIELDS = EVERY | {"cold", "warm"}
CASE = re.compile(r"[a-z]+_\w+_\w+_\d+x\d+_(ac|noac|min)|dpo_1b_bf16_ragged")
START = re.compile(r"start_\w+_lora_bf16")


@pytest.fixture(scope="module")
def render() -> Iterator[ModuleType]:
    with script_module("render_records") as module:
        yield module


def test_page_is_rendered_from_the_records(repo: Path) -> None:
    done = subprocess.run([sys.executable, "scripts/render_records.py", "--check"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_notices_a_stale_page(repo: Path, tmp_path: Path) -> None:
    for name in ("scripts/render_records.py", "docs/records.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((repo / name).read_bytes())
    (tmp_path / "docs/RECORDS.md").write_text("old")
    done = subprocess.run([sys.executable, tmp_path / "scripts/render_records.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "stale" in done.stderr


def test_records_are_complete(repo: Path) -> None:
    lines = (repo / "docs/records.jsonl").read_text().splitlines()
    if not lines:
        pytest.fail("no record")
    for line in lines:
        record = json.loads(line)
        fields = START_FIELDS if START.fullmatch(record["case"]) else FIELDS
        assert record.keys() >= fields, fields - record.keys()
        assert START.fullmatch(record["case"]) or CASE.fullmatch(record["case"]), record["case"]


def test_a_record_says_how_much_was_recomputed_and_offloaded(repo: Path, render: ModuleType) -> None:
    record = json.loads((repo / "docs/records.jsonl").read_text().splitlines()[0]) | {"peak_alloc_gib": 17.25}
    assert "| 17.25 |" in render.row(record)
    record |= {"recomputed_blocks": 32, "offloaded_gib": 8.43}
    assert "| 17.25 (32 blocks recomputed, 8.43 GiB offloaded) |" in render.row(record)
    assert "| 17.25 (32 blocks recomputed) |" in render.row(record | {"offloaded_gib": 0.0})
    assert "recomputed, 8.43 GiB offloaded, 1.5 GiB in a graph) |" in render.row(record | {"graph_gib": 1.5})


def test_first_steps_have_a_table_of_their_own(
    repo: Path, render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (repo / "docs/records.jsonl").read_text().splitlines()[0]
    once = {"seconds": 12.5, "until": {"imports": 4.04, "weights": 8.0, "step 1": 12.5}, "all_seconds": [12.5]}
    thrice = once | {"all_seconds": [13.0, 12.5, 11.0]}
    record = {name: value for name, value in json.loads(before).items() if name in EVERY}
    record |= {"case": "start_8b_lora_bf16", "cold": thrice, "warm": once, "baselines": {"hf_peft": once}}
    monkeypatch.setattr(render, "DOCS", tmp_path)
    (tmp_path / "records.jsonl").write_text(before + "\n")
    without = render.render()
    assert "first finished step" not in without
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n" + before + "\n")
    page = render.render()
    assert page.startswith(without) and page.count("\n| `start_8b_lora_bf16` |") == 1
    way = "12.5 (imports 4.0, weights 8.0)"
    assert f"| 12.5 [13.0, 12.5, 11.0] (imports 4.0, weights 8.0) | {way} | hf_peft: {way} |" in page
    *_, head, line, row = page.splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
