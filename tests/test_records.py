"""docs/RECORDS.md says what docs/records.jsonl says, and every record is complete."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FIELDS = {"case", "date", "commit", "command", "gpu", "num_gpus", "versions", "tokens_per_s", "peak_alloc_gib", "loss_first"}
FIELDS |= {"loss_last", "baselines"}


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
        assert record.keys() >= FIELDS, FIELDS - record.keys()
        assert re.fullmatch(r"[a-z]+_\w+_\w+_\d+x\d+_(ac|noac|min)|dpo_1b_bf16_ragged", record["case"]), record["case"]


def test_a_record_says_how_much_was_recomputed_and_offloaded(repo: Path) -> None:
    spec = importlib.util.spec_from_file_location("render_records", repo / "scripts" / "render_records.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    record = json.loads((repo / "docs/records.jsonl").read_text().splitlines()[0]) | {"peak_alloc_gib": 17.25}
    assert "| 17.25 |" in render.row(record)
    record |= {"recomputed_blocks": 32, "offloaded_gib": 8.43}
    assert "| 17.25 (32 blocks recomputed, 8.43 GiB offloaded) |" in render.row(record)
    assert "| 17.25 (32 blocks recomputed) |" in render.row(record | {"offloaded_gib": 0.0})
    assert "recomputed, 8.43 GiB offloaded, 1.5 GiB in a graph) |" in render.row(record | {"graph_gib": 1.5})
