"""Over 300 malformed rows of all formats (PITFALLS 2c): each counted once under a reason, with its file and line."""

import csv
import json
import time

import pytest
from byte_tokenizer import row, texts

VALUES = [
    None, 3, 2.5, True, [], {}, ["x"], {"x": 1}, "", " \n\t", "a\0b", "\ud800", "x\udfff", "\udcff", [None],
    " " * 30_000 + "x",
]  # fmt: skip
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def bad_instruct():
    rows = []
    for value in VALUES:
        rows += [row(value, "a"), row("q", value), row("q", [value]), row({"text": value}, "a")]
        rows.append({"question": "q", "other": value})
    return rows


def bad_messages():
    user, answer = TURNS
    calling = {"role": "assistant", "content": ""}
    several = [
        [],
        [{"role": "system", "content": "s"}] * 2 + TURNS,
        [*TURNS, {"role": "system", "content": "s"}],
        [user],
        user,
        [TURNS],
        [user, {"role": "assistant"}],
        [user, {"content": "a"}],
    ]
    for value in VALUES:
        several += [
            value,
            [{"role": "user", "content": value}, answer],
            [user, {"role": "assistant", "content": value}],
            [user, {"role": value, "content": "a"}],
            [user, calling | {"tool_calls": value or [None]}],
            [user, calling | {"tool_calls": [{"name": value, "arguments": 1}]}],
        ]
    return [{"messages": turns} for turns in several] + [{"messages": TURNS, "tools": [v, "x"]} for v in VALUES] + [{}]


def bad_sharegpt():
    several = []
    for value in VALUES:
        call = json.dumps({"name": "f", "arguments": value if isinstance(value, str) else [value]})
        several += [
            value,
            [HUMAN, {"from": "gpt", "value": value}],
            [{"from": value, "value": "q"}, GPT],
            [HUMAN, {"from": "function_call", "value": value}],
            [HUMAN, {"from": "function_call", "value": call}],
        ]
    return [{"conversations": turns} for turns in several]


BROKEN_LINES = [
    b"{", b"}", b'{"text": "a"', b'{"text": "a",}', b'{"text": a}', b"{'text': 'a'}", b'{"text"}', b"nonsense", b"NaN",
    b"[]", b"1", b'"text"', b"null", b"true", b'{"text": "a", "text": "b"}', b'{"text": "a"} {"text": "b"}',
    b'{"text": NaN}', b'{"text": Infinity}', b'{"text": 1e400}', b'{"text": ' + b"9" * 6000 + b"}",
    b'{"text": "\xff\xfe"}', b'{"text": "\xc3"}', b"\xff", b'{"text": "\\ud800"}', b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "\\u0000"}', b'{"text": "a\x00"}', b"\x00", b'{"text": ' + b"[" * 5000,
]  # fmt: skip


def account(dataset, report_lines):
    """Every row of the file is used or dropped under a reason, and every reason names a place."""
    (report,) = dataset.reports
    assert report.read == report.used + report.reasons.total() == report_lines
    for reason, count in report.reasons.items():
        assert len(report.places[reason]) == min(count, 5)
    return report


SETS = {
    "instruct": ({"question": "q", "answer": "a"}, bad_instruct()),
    "messages": ({"messages": TURNS}, bad_messages()),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, bad_sharegpt()),
    "text": ({"text": "t"}, [{"text": value} for value in VALUES]),
}


@pytest.mark.parametrize("form", list(SETS))
def test_every_malformed_row_is_counted_once_and_named(build, byte_model, form):
    """None hangs, none is trained, least of all as the word None."""
    good, rows = SETS[form]
    started = time.perf_counter()
    dataset = build([good] * 3 + rows, max_bad_rows=1.0, max_seq_len=1000)
    report = account(dataset, 3 + len(rows))
    found = [text for text, _ in texts(dataset, byte_model[0])]
    assert report.used == 3, found[3:]
    named = {int(place.split(".jsonl:")[1].split(":")[0]) for places in report.places.values() for place in places}
    assert min(named) > 3 and max(named) <= 3 + len(rows)
    assert not any("None" in text for text in found)
    assert time.perf_counter() - started < 10


def test_every_line_that_is_no_row_is_counted_once(build):
    lines = [b'{"text": "t"}', *BROKEN_LINES, b'{"text": "t"}']
    assert account(build(b"\n".join(lines), max_bad_rows=1.0), len(lines)).used == 2


def test_there_are_more_than_300_of_them():
    assert sum(len(rows) for _, rows in SETS.values()) + len(BROKEN_LINES) > 300


def test_malformed_csv_and_parquet_rows_are_counted_once(build, byte_model, tmp_path):
    cells = [("", "a"), ("q", ""), (" ", "a"), ("q", "a\0"), ("q", "\t")]
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), ("q", "None"), *cells])
    content = (tmp_path / "cells.csv").read_bytes() + b'q\nq,a,b\nq,\xff\n"q"x,a\n'
    dataset = build(content, name="t.csv", max_bad_rows=1.0)
    report = account(dataset, 1 + len(cells) + 4)
    assert report.reasons == {
        'blank "question"': 2, 'blank "answer"': 2, "NUL character": 1, "wrong number of cells": 2,
        "text that is not Unicode": 1, "broken CSV": 1,
    }  # fmt: skip
    assert texts(dataset, byte_model[0]) == [("<s>q<a>None<e>", "None<e>")]  # the word, where a cell says it
    assert report.places['blank "answer"'][0].endswith("0t.csv:4")

    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow as pa

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"question": ["q", None, "", "q"], "answer": ["a", "a", "a", None]}), path)
    dataset = build(path.read_bytes(), name="t.parquet", max_bad_rows=1.0)
    assert account(dataset, 4).reasons == {'null "question"': 1, 'blank "question"': 1, 'null "answer"': 1}
