"""One row of a data source, one that cannot be used, and the strict JSON that rows and cells are written in."""

import json
import math
from dataclasses import dataclass
from typing import Any


class BadRow(ValueError):
    """One row cannot be used. `reason` is what it is counted under, `detail` says more about this row, and `num_tokens`
    how many it has where there are too many."""

    def __init__(self, reason: str, detail: str = "", num_tokens: int = 0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.num_tokens = reason, detail, num_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source."""

    where: str  # file:line of the row's first line; file:row number for Parquet and hub datasets, counted from 1
    values: dict[str, Any] | None  # None: unreadable, for the reason in `problem`
    problem: BadRow | None = None


def parse_json(text: str) -> Any:
    """`text` as one JSON value, strictly.

    Raises: BadRow for what the json module lets pass or fails on elsewhere: duplicate keys, NaN and infinities, numbers
    too long to convert, nesting too deep, and broken JSON.
    """
    decoder, problems = strict_decoder()
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("broken JSON", f"{error.msg} (column {error.colno})") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    if problems:
        raise problems[0]
    return value


def strict_decoder() -> tuple[json.JSONDecoder, list[BadRow]]:
    """A decoder, and the list to which it adds what is wrong in the values it reads.

    The problems are collected and not raised, so that an array can be read past a bad element.
    """
    problems: list[BadRow] = []

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            problems.append(BadRow("duplicate key", repr(twice)))
        return values

    def no_constant(name: str) -> float:
        problems.append(BadRow("NaN or infinite number", name))
        return 0.0

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else no_constant(digits[:20])

    def short(digits: str) -> int:
        if len(digits) > 1000:  # Python refuses to convert more than 4,300 digits
            problems.append(BadRow("number of more than 1,000 digits"))
            return 0
        return int(digits)

    hooks = {
        "object_pairs_hook": no_duplicates,
        "parse_constant": no_constant,
        "parse_float": finite,
        "parse_int": short,
    }
    return json.JSONDecoder(**hooks), problems
