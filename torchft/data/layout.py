"""Which format a source has, told by its columns.

    layout = detect_layout(rows, SourceConfig(path="train.jsonl"), "data.train[0]")
    layout.format, layout.columns    # "instruct", {"instruction": "instruction", "output": "output"}

The columns that at least half of the readable rows have decide. Where they fit no format or more than one, the error
names the option that settles it; a column map that names what is not there is an error with the nearest name. What a recipe
does not train on is refused: it reads answers to imitate (sft), pairs of answers (pairs), or answers with a verdict (verdicts).
"""

import difflib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torchft.config import SourceConfig
from torchft.data.rows import Row
from torchft.errors import UserError

PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "completion"), ("prompt", "response"))
SIDES = ("chosen", "rejected")
NEEDED = {  # the column sets of each format, any one of which makes it
    "instruct": PAIRS,
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "text": (("text",),),
    "preference": (("prompt", *SIDES), ("conversations", *SIDES), ("messages", *SIDES), SIDES),  # the first that fits
    "kto": (("messages", "label"), ("conversations", "label"), ("prompt", "completion", "label")),
}
OPTIONAL = {"instruct": ("input", "system"), "messages": ("tools",), "sharegpt": ("tools", "system"), "text": ()}
OPTIONAL |= {"preference": ("tools", "system"), "kto": ("tools", "system")}
KINDS = {"sft": ("instruct", "messages", "sharegpt", "text"), "pairs": ("preference",)}
KINDS |= {"verdicts": ("kto", "preference")}  # a pair is two verdicts
Fit = tuple[str, tuple[str, ...]]  # a format, and the columns of ours that make it


@dataclass(frozen=True)
class Layout:
    """Which format a source has, and in which of its columns our names are found."""

    format: str
    columns: dict[str, str]  # our name -> the file's
    unused: list[str] = field(default_factory=list)  # the file's other columns


def detect_layout(rows: list[Row], source: SourceConfig, key: str, kind: str = "sft") -> Layout:
    """The format and columns of a source, from its options and from the columns of its rows.

    kind: one of KINDS, what the recipe reads. Raises: UserError, naming the option to set, if an option is wrong or the
    columns fit no format of that kind or more than one.
    """
    tables, counts, usual = _columns(rows)
    forms = _forms(source, kind, key)
    _check_options(source, counts, key, forms)
    names = _our_names(usual, source.columns)
    if kind == "sft" and source.format == "auto":
        _refuse_preference(names, tables, source, key)
    fits = _fits(names, source, forms)
    if kind != "sft":
        fits = fits[:1]
    if len(fits) != 1:
        raise UserError(_several_fit(fits, source, key) if fits else _none_fits(usual, source, key, forms))
    form, needed = fits[0]
    ours = (*needed, *_optional(form, needed, counts, source.columns))
    columns = {name: source.columns.get(name, name) for name in ours}
    return Layout(form, columns, [name for name in counts if name not in columns.values()])


def _columns(rows: list[Row]) -> tuple[list[dict[str, Any]], Counter[str], list[str]]:
    """The readable rows, how many of them have each column, and the columns that at least half of them have."""
    tables = [row.values for row in rows if row.values is not None]
    counts = Counter(itertools.chain.from_iterable(tables))
    return tables, counts, [name for name, count in counts.items() if 2 * count >= len(tables)]


def _forms(source: SourceConfig, kind: str, key: str) -> tuple[str, ...]:
    """The formats that come into question."""
    if source.format not in ("auto", *NEEDED):
        raise UserError(f"{key}.format: {source.format!r} is not known{_nearest(source.format, ['auto', *NEEDED])}")
    if source.format != "auto" and source.format not in KINDS[kind]:
        raise UserError(f"{key}.format: {source.format} is not trained on here; known are {', '.join(('auto', *KINDS[kind]))}")
    return KINDS[kind] if source.format == "auto" else (source.format,)


def _our_names(theirs: list[str], mapped: dict[str, str]) -> set[str]:
    """The file's column names, those in the map under our names; a like-named column is hidden by what is mapped."""
    renamed = {column: ours for ours, column in mapped.items()}
    return {renamed.get(name, name) for name in theirs if name in renamed or name not in mapped} | set(mapped)


def _fits(names: set[str], source: SourceConfig, forms: tuple[str, ...]) -> list[Fit]:
    """The formats that the names allow. A column map that holds a format's columns decides for it."""
    fits = [(form, needed) for form in forms for needed in NEEDED[form] if set(needed) <= names]
    mapped = [(form, needed) for form, needed in fits if set(needed) <= set(source.columns)]
    return mapped or fits


def _optional(form: str, needed: tuple[str, ...], counts: Counter[str], mapped: dict[str, str]) -> list[str]:
    """The optional columns there are: one counts from its first row on, as tools may stand in a few rows only."""
    # `input` belongs to `instruction`: beside `question` it is somebody else's, unless it is mapped
    known = [name for name in OPTIONAL[form] if name != "input" or "instruction" in needed or name in mapped]
    return [name for name in known if name in mapped or (name in counts and name not in mapped.values())]


def _check_options(source: SourceConfig, counts: Counter[str], key: str, forms: tuple[str, ...]) -> None:
    known = sorted({name for form in forms for names in (*NEEDED[form], OPTIONAL[form]) for name in names})
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise UserError(f"{key}.columns: {ours!r} is not a name of ours{_nearest(ours, known)}")
        if theirs not in counts:
            near = _nearest(theirs, sorted(counts))
            raise UserError(f"{key}.columns.{ours}: {source.path} has no column {theirs!r}{near}")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _refuse_preference(names: set[str], tables: list[dict[str, Any]], source: SourceConfig, key: str) -> None:
    """Two answers per row (DPO), or one with a verdict (KTO). Who names the format may train on them all the same."""
    pair = set(SIDES) <= names
    if pair or _has_verdicts(names, tables):
        found, recipe = ("chosen, rejected", "dpo_distributed") if pair else ("label", "kto_distributed")
        raise UserError(
            f"{key}: {source.path} is preference data (it has {found}), which is not trained on here but in {recipe}; "
            f"give a file with one answer per row, or set {key}.format to train on its conversations all the same"
        )


def _has_verdicts(names: set[str], tables: list[dict[str, Any]]) -> bool:
    return bool({"messages", "completion"} & names) and any(isinstance(row.get("label"), bool) for row in tables)


def _several_fit(fits: list[Fit], source: SourceConfig, key: str) -> str:
    said = " and ".join(f"{form} ({', '.join(needed)})" for form, needed in fits)
    fix = f"{key}.format"
    if len({form for form, _ in fits}) == 1:  # two pairs of instruct: the format does not decide
        fix = f"{key}.columns, e.g. {{{', '.join(f'{name}: {name}' for name in fits[0][1])}}}"
    return f"{key}: the columns of {source.path} fit {said}; set {fix}"


def _none_fits(names: list[str], source: SourceConfig, key: str, forms: tuple[str, ...]) -> str:
    wanted = "; ".join(f"{form}: {' or '.join(map(', '.join, NEEDED[form]))}" for form in forms)
    kin = next(kind for kind in KINDS.values() if forms[0] in kind)
    others = {form for form, _ in _fits(_our_names(names, source.columns), source, kin)}
    ours = NEEDED[forms[0]][0]
    example = ", ".join([f"{ours[0]}: {names[0] if names else 'question'}", *(f"{name}: ..." for name in ours[1:2])])
    fix = f"set it to {others.pop()}" if len(others) == 1 else f"map them, e.g. {key}.columns: {{{example}}}"
    return f"{key}.format: {source.path} has the columns {', '.join(names) or '(none)'}, which fit no format ({wanted}); {fix}"
