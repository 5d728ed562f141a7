"""A row as a template sees it: transformers' view of the messages, every string tracked, and checks on their shape.

All strings are the row's, keys and names of tools too, but for the roles that chat formats know: a template may write a
control token as `<|` + role + `|>`.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from torchft.data.tracked import RowDict, Source, track
from torchft.errors import UserError

ROLES = frozenset("system developer user assistant model tool function ipython observation".split())
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, as in transformers
FIELDS = {"content": "content", "tool_calls": "tool_calls"} | dict.fromkeys(REASONING, "reasoning")


class RowError(UserError):
    """This conversation cannot be used; others may be."""


def wrap_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as transformers hands it on (null fields left out, reasoning under all its names), tracked.

    Raises:
        RowError: it is no message: content that is no text, a tool call without a name, something that is no JSON.
    """
    if not isinstance(message, Mapping):
        raise RowError(f"message {index} is a {type(message).__name__}, not an object with role and content")
    _check_texts(message, index)
    _check_calls(message.get("tool_calls"), index)
    wrapped: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role" and value in ROLES:
            wrapped[key] = value
        elif value is not None:
            wrapped[wrap(key, index, "other")] = wrap(value, index, FIELDS.get(key, "other"))
    reasoning = next((wrapped[key] for key in REASONING if key in wrapped), None)
    return wrapped if reasoning is None else {"thinking": reasoning, **wrapped, "reasoning_content": reasoning}


def wrap(value: Any, message: int, field: str) -> Any:
    """A JSON value with every string in it tracked. `message`: its index, -1: of no message.

    Raises:
        RowError: it holds something that is no JSON.
    """
    if isinstance(value, str):
        return track(value, Source(message, field, value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        row = RowDict((wrap(key, message, field), wrap(item, message, field)) for key, item in value.items())
        row._source = Source(message, field, "")
        return row
    if isinstance(value, (list, tuple)):
        return [wrap(item, message, field) for item in value]
    where = "tools" if message < 0 else f"message {message}"
    raise RowError(f"{where}: holds a {type(value).__name__}, which JSON does not have")


def size_of(value: Any) -> int:
    """Characters and items of a wrapped value."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, dict):
        return 1 + sum(size_of(key) + size_of(item) for key, item in value.items())
    if isinstance(value, list):
        return 1 + sum(map(size_of, value))
    return 8


def _check_texts(message: Mapping[str, Any], index: int) -> None:
    content = message.get("content")
    if isinstance(content, (bool, int, float)):
        raise RowError(f"message {index}: content is the {type(content).__name__} {content!r}, not text")
    for part in content if isinstance(content, (list, tuple)) else ():
        if isinstance(part, Mapping) and not isinstance(part.get("text", ""), str):
            raise RowError(f"message {index}: a part of its content has no text: {str(part)[:80]}")
    for name in REASONING:
        if not isinstance(message.get(name, ""), (str, NoneType)):
            raise RowError(f"message {index}: {name} is a {type(message[name]).__name__}, not text")


def _check_calls(calls: Any, index: int) -> None:
    if not isinstance(calls, (list, tuple, NoneType)):
        raise RowError(f"message {index}: tool_calls is a {type(calls).__name__}, not a list")
    for call in calls or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"message {index}: a tool call is no object with a function name: {str(call)[:80]}")
