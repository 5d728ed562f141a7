"""5,000 fuzzed configs and 2,000 malformed rows: one clear error each, nothing imported, nothing trained, every row counted once.

PITFALLS U1, T9, T10, S1 and 2c; one case each, by name, is in tests/test_config_fuzz.py and tests/data/test_malformed.py.
"""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from byte_tokenizer import texts
from scale import SEED, random_of, scaled
from some_config import NEEDED, read
from test_config_fuzz import check_fuzzed
from test_malformed import BROKEN_LINES, SETS, account


def test_fuzzed_configs(tmp_path: Path, tally: Callable) -> None:
    read("", tmp_path, *NEEDED)  # what the parser itself imports late
    number = scaled(150, 5_000)
    accepted = sum(check_fuzzed(10**6 * (SEED + 1) + seed, tmp_path / "c.yaml") for seed in range(number))
    assert 0 < accepted < number / 4  # both kinds occur
    tally(number, "configs", f"{accepted} of them valid by chance" if scaled(0, 1) else "")


def broken(good: dict[str, Any], bad: list[dict], random: Random) -> bytes:
    """One line that is no usable row: a malformed one of the list, with other noise in it, or a usable one cut or mangled."""
    how = random.randrange(6)
    if how <= 1:
        return json.dumps(random.choice(bad)).encode()
    if how == 2:
        return random.choice(BROKEN_LINES)
    text = json.dumps(good)
    if how == 3:
        return text[: random.randrange(1, len(text))].encode()
    if how == 4:
        return json.dumps({random.choice(["Text", "text ", "txt", "_component_", "messages2"]): "x"}).encode()
    return json.dumps(random.choice(bad) | {"more": random.choice([None, "\ud800", 1e308, [[]] * 9])}).encode()


@pytest.mark.parametrize("form", SETS)
def test_malformed_lines(form: str, build: Callable, byte_model: tuple, tally: Callable) -> None:
    """Among usable rows at random places; read and dropped add up, and each reason names file and line."""
    (good, bad), random, number = SETS[form], random_of("lines", form), scaled(60, 400)
    lines = [json.dumps(good).encode()] * 20 + [broken(good, bad, random) for _ in range(number)]
    random.shuffle(lines)
    usable = lines.count(json.dumps(good).encode())
    began = time.perf_counter()
    dataset = build(b"\n".join(lines), max_bad_rows=1.0, max_seq_len=1000, sources=[{"format": "auto" if form == "text" else form}])
    report = account(dataset, len(lines))
    assert report.used == usable
    assert not any("None" in text for text, _ in texts(dataset, byte_model[0]))
    for places in report.places.values():
        assert all(0 < int(place.split(".jsonl:")[1].split(":")[0]) <= len(lines) for place in places)
    assert time.perf_counter() - began < 20
    tally(number, "malformed lines")


def test_malformed_json_file(build: Callable, tally: Callable) -> None:
    """One array: elements that are no usable rows are counted like lines."""
    random, (good, bad), number = random_of("json"), SETS["instruct"], scaled(60, 200)
    rows = [good] * 9 + [random.choice([*bad, None, 3, "x", [good], {}]) for _ in range(number)]
    random.shuffle(rows)
    assert account(build(json.dumps(rows).encode(), name="t.json", max_bad_rows=1.0), len(rows)).used == rows.count(good)
    tally(number, "malformed elements of a JSON array")


CELLS = ["", " ", "\t", "a\0", "x" * 20_000]


def test_malformed_csv(build: Callable, tally: Callable) -> None:
    random, number = random_of("csv"), scaled(60, 200)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("question", "answer"))
    rows = [("q", "a")] * 9
    for _ in range(number):
        cells = [random.choice(["q", *CELLS]), random.choice(CELLS)]
        rows.append(tuple(random.choice([cells, cells[:1], [*cells, "more"]])))
    random.shuffle(rows)
    writer.writerows(rows)
    report = account(build(text.getvalue(), name="t.csv", max_bad_rows=1.0), len(rows))
    assert report.used == rows.count(("q", "a"))
    tally(number, "malformed CSV rows")


def test_malformed_parquet(build: Callable, tmp_path: Path, tally: Callable) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow as pa

    random, number = random_of("parquet"), scaled(60, 200)
    rows = [("q", "a")] * 9 + [(random.choice(["q", None, "", "a\0"]), random.choice([None, "", " \n"])) for _ in range(number)]
    random.shuffle(rows)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": [q for q, _ in rows], "answer": [a for _, a in rows]}), path)
    assert account(build(path.read_bytes(), name="t.parquet", max_bad_rows=1.0), len(rows)).used == rows.count(("q", "a"))
    tally(number, "malformed Parquet rows")
