"""Files to rows: every row with its line, every bad one under a reason, broken files refused where they break."""

import csv
import json
import pathlib
import sys
import types

import pytest

from torchft.config import DataConfig, SourceConfig
from torchft.data.dataset import build_dataset
from torchft.data.rows import BadRow, parse_json
from torchft.data.sources import SUFFIXES, hash_source, read_source
from torchft.errors import UserError
from torchft.options import field_comments


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read_source(SourceConfig(path=str(path)), "data.train[0]")
    return [(row.where.removeprefix(f"{tmp_path}/"), row.values or str(row.problem)) for row in rows]


def test_jsonl_rows_have_their_lines_and_blank_lines_are_no_rows(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "x\\u2028y"}\r\n{"a": 3}'  # byte order mark, CRLF, no final newline
    assert read(tmp_path, "t.jsonl", content) == [
        ("t.jsonl:1", {"a": 1}),
        ("t.jsonl:4", {"a": "x\u2028y"}),
        ("t.jsonl:5", {"a": 3}),
    ]


def test_every_kind_of_file_is_in_the_help():
    local = field_comments(SourceConfig)["path"].partition(",")[0]
    assert local.split()[1:] == list(SUFFIXES)


BAD_JSON = [
    ('{"a": 1, "a": 2}', "duplicate key: 'a'"),
    ('{"a": {"b": [{"c": 1, "c": 1}]}}', "duplicate key: 'c'"),
    ('{"a": NaN}', "NaN or infinite number: NaN"),
    ('{"a": [-Infinity]}', "NaN or infinite number: -Infinity"),
    ('{"a": 1e999}', "NaN or infinite number: 1e999"),
    ('{"a": ' + "9" * 5000 + "}", "number of more than 1,000 digits"),
    ("[1, 2]", "row is not a JSON object: list"),
    ("null", "row is not a JSON object: NoneType"),
    ('"a"', "row is not a JSON object: str"),
    ('{"a": 1', "broken JSON: Expecting ',' delimiter (column 8)"),
    ('{"a": "x\x00y"}', "broken JSON: Invalid control character at (column 9)"),
    ("{'a': 1}", "broken JSON: Expecting property name enclosed in double quotes (column 2)"),
    ('{"a": 1} {"a": 2}', "broken JSON: Extra data (column 10)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_JSON)
def test_bad_lines_of_jsonl_have_a_reason_and_the_others_are_read(tmp_path, line, reason):
    rows = read(tmp_path, "t.jsonl", '{"a": 0}\n' + line + '\n{"a": 2}\n')
    assert rows == [("t.jsonl:1", {"a": 0}), ("t.jsonl:2", reason), ("t.jsonl:3", {"a": 2})]


def test_deep_nesting_is_a_bad_row_and_no_crash(tmp_path):
    rows = read(tmp_path, "t.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"a": 2}\n')
    assert rows == [("t.jsonl:1", "JSON nested too deeply"), ("t.jsonl:2", {"a": 2})]


def test_json_array_gives_each_row_the_line_it_begins_at(tmp_path):
    text = '\n[\n {"a": 1},\n {"a":\n  2}, {"a": 3, "a": 4},\n\n 5\n]\n'
    assert read(tmp_path, "t.json", text) == [
        ("t.json:3", {"a": 1}),
        ("t.json:4", {"a": 2}),
        ("t.json:5", "duplicate key: 'a'"),
        ("t.json:7", "row is not a JSON object: int"),
    ]


def test_json_data_object_and_empty_arrays(tmp_path):
    assert read(tmp_path, "t.json", '{ "data" :\n[{"a": 1}] }') == [("t.json:2", {"a": 1})]
    assert read(tmp_path, "t.json", "[ ]") == read(tmp_path, "t.json", '{"data": []}') == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1},\n{"a": }]', r"t\.json:2: broken JSON: Expecting value"),
        ('[{"a": 1},\n{"a": 2}', r"t\.json:2: broken JSON: expected ',' or ']'"),
        ('[{"a": 1},\n]', r"t\.json:2: broken JSON"),
        ('[{"a": 1}]\n[]', r"t\.json:2: broken JSON: something follows"),
        ('{"data": [{"a": 1}],\n "version": 2}', r't\.json:1: broken JSON: .*beside "data" no other key is read'),
        ('{"rows": [{"a": 1}]}', r't\.json:1: expected an array of rows, or \{"data": \[\.\.\.\]\}'),
        ('{"a": 1}\n{"a": 2}', r"one object per line is \.jsonl"),
        ("", r"t\.json:1: the file is empty; expected an array"),
        ("[" * 100_000, r"t\.json:1: JSON nested too deeply"),
    ],
)
def test_a_json_file_that_breaks_is_refused_at_its_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, "t.json", text)


def test_csv_cells_are_text_and_rows_have_their_first_line(tmp_path):
    text = '\ufeffa,b\n1,"x\ny"\n\n2,\n"""q""",None\n'
    assert read(tmp_path, "t.csv", text) == [
        ("t.csv:2", {"a": "1", "b": "x\ny"}),
        ("t.csv:5", {"a": "2", "b": ""}),
        ("t.csv:6", {"a": '"q"', "b": "None"}),
    ]


def test_csv_bad_rows_and_long_cells(tmp_path):
    usual = csv.field_size_limit(4321)
    rows = read(tmp_path, "t.csv", 'a,b\n1\n1,2,3\n"x"y,2\n' + "z" * 1_000_000 + ",2\n")
    assert rows[:3] == [
        ("t.csv:2", "wrong number of cells: 1 where the header has 2"),
        ("t.csv:3", "wrong number of cells: 3 where the header has 2"),
        ("t.csv:4", "broken CSV: ',' expected after '\"'"),
    ]
    assert rows[3] == ("t.csv:5", {"a": "z" * 1_000_000, "b": "2"})
    assert csv.field_size_limit(usual) == 4321, "the module's limit must be put back"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n', r"t\.csv:3: a quote opened in this row is never closed"),
        ("a,a\n1,2\n", r"t\.csv:1: the header line cannot be used: .*repeated"),
        ("a,\n1,2\n", r"t\.csv:1: the header line cannot be used: .*blank"),
        ("a,b\n1,2\n".encode("utf-16"), r"t\.csv is UTF-16; save it as UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_told_apart_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, "t.csv", text)


def test_an_empty_csv_has_no_rows(tmp_path):
    assert read(tmp_path, "t.csv", "") == read(tmp_path, "t.csv", "a,b\n") == []


def test_a_text_file_is_one_row(tmp_path):
    assert read(tmp_path, "t.txt", b"\xef\xbb\xbfone\ntwo\n") == [("t.txt:1", {"text": "one\ntwo\n"})]


def test_bytes_that_are_not_utf8_stay_visible_as_surrogates(tmp_path):
    """The formats refuse them (test_formats): nothing is replaced in silence."""
    for name, content in (("t.jsonl", b'{"a": "\xff"}'), ("t.json", b'[{"a": "\xff"}]'), ("t.csv", b"a\n\xff\n")):
        assert read(tmp_path, name, content)[0][1] == {"a": "\udcff"}


def test_parquet_rows_are_numbered_and_nested_nulls_are_absent_keys(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow as pa

    turns = [[{"role": "user", "content": "q", "name": None}], [{"role": "user", "content": None, "name": "n"}], None]
    pq.write_table(pa.table({"messages": turns, "n": [1.5, None, 2.0]}), tmp_path / "t.parquet")
    rows = read_source(SourceConfig(path=str(tmp_path / "t.parquet")), "data.train[0]")
    assert [row.values for row in rows] == [
        {"messages": [{"role": "user", "content": "q"}], "n": 1.5},
        {"messages": [{"role": "user", "name": "n"}], "n": None},
        {"messages": None, "n": 2.0},
    ]
    assert rows[1].where == f"{tmp_path}/t.parquet:2"


def test_parquet_with_text_that_is_not_unicode_loses_that_row_only(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow as pa

    column = pa.array([b"good", b"\xff\xfe", b"also good"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    rows = read_source(SourceConfig(path=str(tmp_path / "t.parquet")), "data.train[0]")
    assert [row.values and row.values["text"] for row in rows] == ["good", None, "also good"]
    assert rows[1].problem.reason == "text that is not Unicode"


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is an optional extra")
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: .*t\.parquet cannot be read as Parquet"):
        read(tmp_path, "t.parquet", b"PAR1 this is none")


@pytest.mark.parametrize(("module", "path"), [("pyarrow", "t.parquet"), ("datasets", "org/name")])
def test_a_missing_optional_library_is_named_with_its_extra(tmp_path, monkeypatch, module, path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # makes the import raise ImportError
    with pytest.raises(UserError, match=r'data\.train\[0\]\.path: .*pip install "torchft-recipes\[data\]"'):
        read_source(SourceConfig(path=path), "data.train[0]")


class HubError(Exception):
    """Stands for datasets.exceptions.DatasetsError, which is no OSError."""


def fake_datasets(monkeypatch, load_dataset):
    exceptions = types.SimpleNamespace(DatasetsError=HubError)
    library = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)


def test_a_hub_dataset_is_read_by_name_subset_and_split(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "q", "answer": "a"}, {"question": "q2", "answer": None}]

    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, load_dataset)
    source = SourceConfig(path="org/name:main", split="test")
    rows = read_source(source, "data.train[0]")
    assert asked == [(("org/name", "main"), {"split": "test"})]
    assert [row.where for row in rows] == ["org/name:main[test]:1", "org/name:main[test]:2"]
    assert rows[1].values == {"question": "q2", "answer": None}
    assert len(hash_source(source, "data.train[0]")) == 64


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, RuntimeError, HubError])
def test_a_hub_dataset_that_cannot_be_read_is_named(tmp_path, monkeypatch, kind):
    def load_dataset(*args, **kwargs):
        raise kind("Unknown split 'tset'")

    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, load_dataset)
    said = r"data\.valid\[1\]\.path: there is no file org/name here, and the hub dataset org/name, split 'tset'.*Unknown split"
    with pytest.raises(UserError, match=said):
        read_source(SourceConfig(path="org/name", split="tset"), "data.valid[1]")


def test_a_name_that_is_no_file_is_said_to_be_looked_for_on_the_hub(byte_model, tmp_path, monkeypatch, capsys):
    def load_dataset(*args, **kwargs):
        assert "data.train[0].path: there is no file org/name here" in capsys.readouterr().out or quiet
        raise HubError("no network")

    monkeypatch.chdir(tmp_path)
    fake_datasets(monkeypatch, load_dataset)
    sources = [SourceConfig(path="org/name")]
    for quiet in (False, True):  # quiet: on all processes but one
        with pytest.raises(UserError, match="no network"):
            build_dataset(sources, DataConfig(train=sources), *byte_model, quiet=quiet)
        assert capsys.readouterr().out == ""


def test_a_file_named_without_its_ending_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such file: my_data \(.*\); did you mean my_data\.jsonl\?$"):
        read_source(SourceConfig(path="my_data"), "data.train[0]")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", r"data\.train\[0\]\.path: '' is empty"),
        (".", "is a directory"),
        ("missing.jsonl", "no such file: missing.jsonl"),
        ("./missing", "no such file"),
        ("a/b/c", "no such file"),
        ("my_data", r"no such file: my_data \(a hub dataset is written org/name or org/name:subset\)$"),
        ("data:main", "no such file"),
        ("notes.docx", r"unknown kind of file '\.docx'; known are \.json, \.jsonl"),
    ],
)
def test_paths_that_name_no_source_are_refused_with_the_key(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        read_source(SourceConfig(path=path), "data.train[0]")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(self, *args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "t.jsonl").write_text("{}")
    monkeypatch.setattr(pathlib.Path, "open", forbidden)  # mode bits do not stop root
    for use in (read_source, hash_source):
        with pytest.raises(UserError, match=r"data\.train\[0\]\.path: .*t\.jsonl cannot be read: Permission denied"):
            use(SourceConfig(path=str(tmp_path / "t.jsonl")), "data.train[0]")


def test_the_hash_follows_every_byte(tmp_path):
    path = tmp_path / "t.jsonl"
    source = SourceConfig(path=str(path))
    path.write_text('{"a": 1}\n')
    first = hash_source(source, "data.train[0]")
    path.write_text('{"a": 1} \n')
    assert hash_source(source, "data.train[0]") != first


def test_parse_json_takes_what_json_dumps_writes():
    value = {"a": [1, 2.5, None, True, "x\n\u00e9"], "b": {}}
    assert parse_json(json.dumps(value)) == value
    with pytest.raises(BadRow, match="duplicate key"):
        parse_json('{"a": 1, "a": 1}')
