"""Rows of a data file or hub dataset, each with the place it stands at: JSON, JSONL, CSV, Parquet, plain text, hub.

    rows = read_source(SourceConfig(path="train.jsonl"), "data.train[0]")    # [Row("train.jsonl:1", {...}), ...]

Every row comes out exactly once: with its values, or with the reason why it cannot be read. What makes the rest of a
file unreadable (an array that breaks off, a quote never closed) is an error for the whole file. What the columns mean
is not decided here (formats.py).
"""

import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchft.config import SourceConfig, resolve_path
from torchft.data.rows import BadRow, Row, parse_json, strict_decoder
from torchft.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # a name without org is a misspelt file far more often
EXTRA = 'pip install "torchft-recipes[data]"'
AFTER_ROWS = {"]": "expected ',' or ']' after a row", "}": 'expected "}": beside "data" no other key is read'}
JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_ARRAY = re.compile(r'[ \t\n\r]*(\{[ \t\n\r]*"data"[ \t\n\r]*:[ \t\n\r]*)?\[')


def read_source(source: SourceConfig, key: str) -> list[Row]:
    """All rows of one source, in file order.

    Args: `key` is the config key that named the source, for messages.
    Raises: UserError if the file is missing, of an unknown kind, or broken beyond one row.
    """
    path = local_path(source, key)
    if path is None:
        return list(_read_hub(source, key))
    if path.suffix == ".parquet":
        return list(_read_parquet(path, source.path, key))
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path, source.path))
    # without a byte order mark; bytes that are not UTF-8 become lone surrogates, which the formats refuse row by row
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if path.suffix == ".json":
        return list(_read_json(text, source.path, key))
    if path.suffix == ".csv":
        return _read_csv(text, source.path, key)
    return [Row(f"{source.path}:1", {"text": text})]


def hash_source(source: SourceConfig, key: str) -> str:
    """sha256 of the source's bytes (of its rows as JSON for a hub dataset), for the cache key."""
    path = local_path(source, key)
    if path is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for row in _read_hub(source, key):
        digest.update(json.dumps(row.values, default=str).encode())
    return digest.hexdigest()


def local_path(source: SourceConfig, key: str) -> Path | None:
    """The file a source names, or None for a hub dataset.

    Raises: UserError if it is neither a readable file of a known kind nor the name of a dataset.
    """
    name = source.path
    path = resolve_path(name)
    if not name or path.is_dir():
        what = "is a directory" if name else "is empty"
        raise UserError(
            f"{key}.path: {name!r} {what}; name one file ({', '.join(SUFFIXES)}) or a hub dataset (org/name)"
        )
    looks_local = path.suffix in SUFFIXES or name.startswith(("builtin:", "/", ".", "~"))
    if not path.is_file():
        if not looks_local and HUB_NAME.fullmatch(name):
            return None
        raise UserError(f"{key}.path: no such file: {name} (a hub dataset is written org/name or org/name:subset){_near(name)}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{key}.path: {name}: unknown kind of file {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    _check_readable(path, name, key)
    return path


def _near(name: str) -> str:
    """What a file's name without its ending was meant to be."""
    return next((f"; did you mean {name}{end}?" for end in SUFFIXES if resolve_path(name + end).is_file()), "")


def announce_hub(sources: list[SourceConfig], key: str) -> None:
    """Prints which sources are no files: before the hub's own lines, and its minutes of waiting where there is no network.

    Raises: UserError as local_path. `key` is the config key of them all.
    """
    for number, source in enumerate(sources):
        here = f"{key}[{number}]"
        if local_path(source, here) is None:
            print(f"{here}.path: there is no file {source.path} here: it is looked for on the hub, as a dataset", flush=True)


def _check_readable(path: Path, name: str, key: str) -> None:
    try:
        with path.open("rb") as file:
            mark = file.read(2)
    except OSError as error:
        raise UserError(f"{key}.path: {name} cannot be read: {error.strerror}") from None
    if mark in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{key}.path: {name} is UTF-16; save it as UTF-8")


def _as_row(where: str, value: Any, problem: BadRow | None) -> Row:
    if problem is None and not isinstance(value, dict):
        problem = BadRow("row is not a JSON object", type(value).__name__)
    return Row(where, None if problem else value, problem)


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    """One JSON object per line; blank lines are not rows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape").strip(" \t\r\n")
            if not text:
                continue
            value, problem = None, None
            try:
                value = parse_json(text)
            except BadRow as error:
                problem = error
            yield _as_row(f"{name}:{number}", value, problem)


def _read_json(text: str, name: str, key: str) -> Iterator[Row]:
    """The elements of `[...]` or of `{"data": [...]}`, one at a time, so that each has its line."""

    def broken(position: int, message: str) -> UserError:
        line = text.count("\n", 0, position) + 1
        return UserError(
            f"{name}:{line}: {message} ({key}.path; rows after it cannot be told apart, so the file is refused)"
        )

    start = JSON_ARRAY.match(text)
    if start is None:
        empty = "the file is empty; " * (not text.strip())
        raise UserError(
            f'{name}:1: {empty}expected an array of rows, or {{"data": [...]}} ({key}.path); one object per line is .jsonl'
        )
    decoder, problems = strict_decoder()
    position, line, counted = _skip_space(text, start.end()), 1, 0
    more = text[position : position + 1] != "]"
    while more:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        problems.clear()
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, f"broken JSON: {error.msg}") from None
        except RecursionError:
            raise broken(position, "JSON nested too deeply") from None
        yield _as_row(f"{name}:{line}", value, problems[0] if problems else None)
        position = _skip_space(text, position)
        more = text[position : position + 1] == ","
        position += more
    for bracket in "]}" if start.group(1) else "]":
        if text[position : position + 1] != bracket:
            raise broken(position, f"broken JSON: {AFTER_ROWS[bracket]}")
        position = _skip_space(text, position + 1)
    if position < len(text):
        raise broken(position, "broken JSON: something follows the rows")


def _skip_space(text: str, position: int) -> int:
    return JSON_SPACE.match(text, position).end()


def _read_csv(text: str, name: str, key: str) -> list[Row]:
    """The rows below a header line. Cells are text as it stands; a blank one is the empty string."""
    limit = csv.field_size_limit(sys.maxsize)  # the module's own is 128 KiB, less than a long document; put back below
    try:
        return list(_csv_rows(text, name, key))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str, name: str, key: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        cells, problem = _csv_cells(reader, where, key)
        if cells is None:
            return
        if header is None:
            header = _csv_header(cells, problem, where, key)
        elif problem is not None:
            yield Row(where, None, problem)
        elif len(cells) == len(header):
            yield Row(where, dict(zip(header, cells, strict=True)))
        elif cells:  # none: a blank line
            said = f"{len(cells)} where the header has {len(header)}"
            yield Row(where, None, BadRow("wrong number of cells", said))


def _csv_cells(reader: Any, where: str, key: str) -> tuple[list[str] | None, BadRow | None]:
    """The next record's cells, None at the end; or what is wrong with it."""
    try:
        return next(reader, None), None
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(f"{where}: a quote opened in this row is never closed ({key}.path)") from None
        return [], BadRow("broken CSV", str(error))


def _csv_header(cells: list[str], problem: BadRow | None, where: str, key: str) -> list[str]:
    if problem or not all(cell.strip() for cell in cells) or len(set(cells)) < len(cells) or not cells:
        said = problem or f"a blank or repeated column name in {cells}"
        raise UserError(f"{where}: the header line cannot be used: {said} ({key}.path)")
    return cells


def _read_parquet(path: Path, name: str, key: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{key}.path: {name}: reading Parquet needs pyarrow: {EXTRA}") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for values in itertools.chain.from_iterable(map(_arrow_rows, file.iter_batches(batch_size=1024))):
                number += 1
                problem = values if isinstance(values, BadRow) else None
                yield Row(f"{name}:{number}", None if problem else values, problem)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{key}.path: {name} cannot be read as Parquet after row {number}: {error}") from None


def _arrow_rows(batch: Any) -> list[dict[str, Any] | BadRow]:
    """The rows of an Arrow record batch; those with text that is not Unicode are found one by one."""
    try:
        return list(map(_without_nulls_below, batch.to_pylist()))
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow("text that is not Unicode", error.reason)]
    return [row for index in range(batch.num_rows) for row in _arrow_rows(batch.slice(index, 1))]


def _without_nulls_below(values: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every object of a column the same keys, null where a row has no such key: nulls below the top level
    are keys that are not there."""
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_hub(source: SourceConfig, key: str) -> Iterator[Row]:
    """Rows of `org/name` or `org/name:subset`, through the optional `datasets`, which runs no code of theirs."""
    try:
        import datasets
        import datasets.exceptions
    except ImportError:
        raise UserError(
            f"{key}.path: {source.path} is no file here; a hub dataset needs the datasets library: {EXTRA}"
        ) from None
    name, _, subset = source.path.partition(":")
    try:
        table = datasets.load_dataset(name, subset or None, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        read = f"the hub dataset {source.path}, split {source.split!r}, cannot be read: {error}"
        said = f"{key}.path: there is no file {source.path} here, and {read}"
        raise UserError(f"{said} (a gated one needs HF_TOKEN in the environment)") from None
    for number, values in enumerate(table, 1):
        yield Row(f"{source.path}[{source.split}]:{number}", _without_nulls_below(values))
