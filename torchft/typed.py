"""YAML nodes to plain values, by the type hints of the options; every mismatch is a problem with its file and line.

Nothing is guessed: a quoted number is text, 1.5 is no whole number, `yes` is no boolean. What a text option gets is
the text as it was written (`compile: on` is "on", `out: 007` is "007").
"""

import math
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from torchft.checks import nearest, show
from torchft.config import SourceConfig
from torchft.strict_yaml import BOOL, FLOAT, INT, NULL, STR, where

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
MAX_DIGITS = 19  # as 64 bits have; Python's int() is slow and then refuses for thousands of digits


class Problem(NamedTuple):
    """One thing that is wrong: where (`file:line`, or "" for a default), which option, what and the fix."""

    place: str
    key: str
    message: str


class _Mismatch(Exception):
    """A node does not fit its hint; the message completes "<option> ..."."""


def read_value(node: Node, hint: Any, key: str, problems: list[Problem]) -> Any:
    """The value of `node` as `hint`: str, int, float, bool, list[...], dict[str, str] or SourceConfig.

    Problems are appended; what is returned is then of no use.
    """
    try:
        if hint in WORDS:
            return _read_scalar(node, hint)
        if hint is SourceConfig:
            return _read_source(node, key, problems)
        if get_origin(hint) is list:
            items = _list_items(node, get_args(hint)[0])
            return [read_value(item, get_args(hint)[0], f"{key}[{i}]", problems) for i, item in enumerate(items)]
        assert hint == dict[str, str], f"{key}: options of type {hint} are not supported"
        return {
            name: read_value(item, str, f"{key}.{name}", problems) for name, item in read_pairs(node, key, problems)
        }
    except _Mismatch as error:
        problems.append(Problem(where(node), key, str(error)))
        return None


def read_pairs(node: Node, key: str, problems: list[Problem]) -> list[tuple[str, Node]]:
    """The entries of a mapping; a key that stands there twice is a problem. No value counts as an empty mapping."""
    if node.tag == NULL:
        return []
    if not isinstance(node, MappingNode):
        raise _Mismatch(f"expects a mapping of names to values, got {_describe(node)}")
    pairs: dict[str, Node] = {}
    for name, value in node.value:
        if name.value in pairs:
            first = where(pairs[name.value])
            full = f"{key}.{name.value}".lstrip(".")
            problems.append(Problem(where(name), full, f"is given twice, first at {first}"))
        pairs[name.value] = value
    return list(pairs.items())


def _read_scalar(node: Node, hint: type) -> str | int | float | bool:
    if not isinstance(node, ScalarNode) or node.tag == NULL:
        raise _Mismatch(f"expects {WORDS[hint]}, got {_describe(node)}")
    if hint is str:
        return _check_text(node.value)
    if hint is bool and node.tag == BOOL and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    if hint is not bool and node.tag in (INT, FLOAT if hint is float else INT):
        return _read_number(node.value, hint)
    raise _Mismatch(f"expects {WORDS[hint]}, got {_describe(node)}")


def _check_text(text: str) -> str:
    if "${" in text:
        raise _Mismatch(f"is {show(text)}; ${{...}} is refused: write the value itself")
    if text == "???":  # OmegaConf's mark for a missing value
        raise _Mismatch("has no value; ??? stands for nothing here")
    return text


def _read_number(text: str, hint: type) -> int | float:
    if sum(letter.isdigit() for letter in text) > MAX_DIGITS:
        raise _Mismatch(f"is {show(text)}, a number of more than {MAX_DIGITS} digits")
    try:
        number = hint(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # an explicit tag gives the type of a number to anything: !!int x
        raise _Mismatch(f"expects {WORDS[hint]}, got {show(text)}") from None
    if not math.isfinite(number):
        raise _Mismatch(f"is {show(text)}; it must be finite")
    return number


def _list_items(node: Node, item_hint: Any) -> list[Node]:
    if isinstance(node, SequenceNode):
        return node.value
    if item_hint is SourceConfig and node.tag != NULL:
        return [node]  # data.train: file.jsonl
    example = f"[{node.value}]" if isinstance(node, ScalarNode) and node.tag != NULL else "[...]"
    raise _Mismatch(f"expects a list, got {_describe(node)}; one is written in brackets: {example}")


def _read_source(node: Node, key: str, problems: list[Problem]) -> SourceConfig:
    """A data source: `file.jsonl`, or a mapping with its fields."""
    if isinstance(node, ScalarNode):
        return SourceConfig(path=_read_scalar(node, str))
    hints = get_type_hints(SourceConfig)
    fields = {}
    for name, value in read_pairs(node, key, problems):
        if name in hints:
            fields[name] = read_value(value, hints[name], f"{key}.{name}", problems)
        else:
            near = nearest(name, list(hints))
            fix = f"did you mean {near}? " * bool(near) + f"{'A' if near else 'a'} data source has {', '.join(hints)}"
            problems.append(Problem(where(value), f"{key}.{name}", f"is not an option; {fix}"))
    return SourceConfig(**fields)


def _describe(node: Node) -> str:
    """A node as an error message calls it."""
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    if node.tag == NULL:
        return "nothing; leave the line out for the default"
    return ("the text " if node.tag == STR else "") + show(node.value)
