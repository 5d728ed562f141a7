"""What a row says: it becomes an `Example`, a conversation or a plain text.

    layout = detect_layout(rows, SourceConfig(path="train.jsonl"), "data.train[0]")
    example = to_example(rows[0], layout)

Formats: instruct (alpaca and other column pairs), messages (OpenAI), sharegpt (conversations) and text; which one a
source has is told by layout.py; pairs and verdicts are read in preferences.py. Nothing is guessed inside a row: what does
not fit is a `BadRow`, whose reason the row is counted under.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from torchft.data.layout import OPTIONAL, Layout
from torchft.data.rows import BadRow, Row, parse_json
from torchft.errors import UserError

MAX_BLANK = 25_000  # in a run: the tokenizers' regular expressions crash on a million; Llama's own code cuts here
MAX_DEPTH = 64  # of nested values in tools and arguments; real schemas stay below 20
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row, understood: either a conversation or a text."""

    messages: list[dict[str, Any]] | None  # OpenAI's: role, content, tool_calls with arguments as objects, ...
    tools: list[dict[str, Any]] | None  # OpenAI's function schemas
    text: str | None
    where: str  # file:line
    num_prompt: int = 0  # of the messages, those before the answer that a pair or a verdict is about
    rejected: list[dict[str, Any]] | None = None  # of a pair: the worse conversation; messages has the better
    desirable: bool | None = None  # of a verdict


def to_example(row: Row, layout: Layout) -> Example:
    """The example in one row. Raises: BadRow with the reason if it cannot be used."""
    if row.problem is not None:
        raise row.problem
    columns = layout.columns
    if layout.format == "text":
        return Example(None, None, read_text(row.values, columns["text"]), row.where)
    if layout.format == "instruct":
        messages, tools = _from_instruct(row.values, columns), None
    else:
        read = from_openai if layout.format == "messages" else from_sharegpt
        messages, tools = read(row.values, columns), read_tools(row.values, columns)
    if "system" in columns and (system := optional_text(row.values, columns["system"])):
        messages.insert(0, {"role": "system", "content": system})
    check_conversation(messages)
    return Example(messages, tools, None, row.where)


def split_answer(example: Example) -> tuple[list[dict[str, Any]], str]:
    """(messages before the last assistant turn, that turn's text), to generate an answer and compare it.

    Raises: UserError for a plain text, which asks nothing.
    """
    if example.messages is None:
        raise UserError(
            f"{example.where}: exact match and sample answers need conversations, and this row is plain text"
        )
    last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
    return example.messages[:last], example.messages[last].get("content") or ""


def read_text(values: dict[str, Any], column: str) -> str:
    """A cell that must hold text: a null never becomes the word None."""
    if column not in values:
        raise BadRow(f'no "{column}"')
    text = values[column]
    if text is None:
        raise BadRow(f'null "{column}"')
    _check_string(text, f'"{column}"')
    if not text.strip():
        raise BadRow(f'blank "{column}"')
    return text


def optional_text(values: dict[str, Any], column: str) -> str:
    """A cell that may be missing, null or blank, all of which mean that there is none."""
    text = values.get(column)
    if text is None:
        return ""
    _check_string(text, f'"{column}"')
    return text if text.strip() else ""


def _check_string(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise BadRow(f"{what} is not text", type(text).__name__)
    if "\0" in text:
        raise BadRow("NUL character", what)
    if len(text) > MAX_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_BLANK:
        raise BadRow(f"a run of more than {MAX_BLANK:,} blanks", what)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("text that is not Unicode", f"{what} has a lone surrogate, or bytes that are not UTF-8") from None


def _check_tree(value: Any, what: str, depth: int = 0) -> None:
    """Nested values that a chat template will print: clean strings, finite numbers, nothing JSON has not."""
    if depth > MAX_DEPTH:
        raise BadRow("JSON nested too deeply", what)
    if isinstance(value, dict):
        for name, item in value.items():
            _check_string(name, what)
            _check_tree(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_tree(item, what, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRow("NaN or infinite number", what)
    elif not isinstance(value, bool | int | float | None):
        _check_string(value, what)


def _maybe_json(value: Any, what: str) -> Any:
    """A value that may stand in its column as JSON text, as it must in CSV."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except BadRow as error:
        raise BadRow(f"{what} is not JSON", str(error)) from None


def _from_instruct(values: dict[str, Any], columns: dict[str, str]) -> list[dict[str, Any]]:
    question, answer = (name for name in columns if name not in OPTIONAL["instruct"])
    prompt = read_text(values, columns[question])
    if "input" in columns and (extra := optional_text(values, columns["input"])):
        prompt = f"{prompt}\n\n{extra}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": read_text(values, columns[answer])}]


def _turns(values: dict[str, Any], column: str) -> list[dict[str, Any]]:
    if values.get(column) is None:
        raise BadRow(f'{"null" if column in values else "no"} "{column}"')
    turns = _maybe_json(values[column], f'"{column}"')
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f'"{column}" is not a list of objects')
    if not turns:
        raise BadRow(f'empty "{column}"')
    for turn in turns:
        _refuse_masks(turn)
    return turns


def _refuse_masks(turn: dict[str, Any]) -> None:
    """Other tools leave single turns untrained by a key: to train them all the same would be wrong, and silent."""
    for name in ("weight", "train"):
        if turn.get(name) is not None and not turn[name]:
            raise BadRow(f'a turn is masked by "{name}", which is not supported: use data.train_on')


def from_openai(values: dict[str, Any], columns: dict[str, str]) -> list[dict[str, Any]]:
    messages = []
    for index, turn in enumerate(_turns(values, columns["messages"])):
        at = f"{columns['messages']}[{index}]"
        role = turn.get("role")
        if role not in ROLES:
            hint = ": a from/value turn, set the format to sharegpt" if "from" in turn else f": {role!r} in {at}"
            raise BadRow("unknown role", f"expected {', '.join(ROLES)}{hint}")
        message = dict(turn)
        if message.get("tool_calls"):
            message["tool_calls"] = _tool_calls(message["tool_calls"], at)
            message["content"] = "" if message.get("content") is None else message["content"]
        else:
            message.pop("tool_calls", None)
        if isinstance(message.get("content"), list):
            message["content"] = _join_parts(message["content"], role, at)
        _check_content(message, at)
        _check_tree({name: value for name, value in message.items() if name != "content"}, at)
        messages.append(message)
    return messages


def from_sharegpt(values: dict[str, Any], columns: dict[str, str]) -> list[dict[str, Any]]:
    messages = []
    for index, turn in enumerate(_turns(values, columns["conversations"])):
        at = f"{columns['conversations']}[{index}]"
        source = turn.get("from")
        if not isinstance(source, str) or source not in SHAREGPT_ROLES:
            hint = ": a role/content turn, map the column to messages" if "role" in turn else f": {source!r} in {at}"
            raise BadRow("unknown role", f"expected {', '.join(SHAREGPT_ROLES)}{hint}")
        message = {"role": SHAREGPT_ROLES[source], "content": turn.get("value")}
        _check_content(message, at)
        if source == "function_call":
            calls = _maybe_json(message["content"], "function_call")
            message = {"role": "assistant", "content": "", "tool_calls": _tool_calls(calls, at)}
        messages.append(message)
    return messages


def _join_parts(parts: list[Any], role: str, at: str) -> str:
    """The text of OpenAI's content parts, `[{"type": "text", "text": "..."}, ...]`, with nothing between two of them: what
    templates that walk through the parts write, which get the text here.
    """
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"type {kind!r}"[:40] if isinstance(part, dict) else f"a {type(part).__name__}"
            said = f"{what} in {at}; only type text can be trained on"
            raise BadRow(f"a part of the content in turn of {role} is not text", said)
        _check_string(part.get("text"), f"a text part of the content in turn of {role}")
        texts.append(part["text"])
    return "".join(texts)


def _check_content(message: dict[str, Any], at: str) -> None:
    """Content must be text, and only a tool, a system prompt or a turn with tool calls may say nothing."""
    role, content = message["role"], message.get("content")
    if content is None:
        raise BadRow(f"null or no content in turn of {role}", at)
    _check_string(content, f"content in turn of {role}")
    if not content.strip() and role in ("user", "assistant") and not message.get("tool_calls"):
        raise BadRow(f"blank content in turn of {role}", at)


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """OpenAI's shape for one call or several, with the arguments as an object: templates print them with `tojson`."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise BadRow("tool call without name and arguments", at)
        arguments = _maybe_json(function["arguments"], "arguments of a tool call")
        if not isinstance(arguments, dict):
            raise BadRow("arguments of a tool call are not an object", at)
        _check_tree(function["name"], at)
        _check_tree(arguments, at)
        rest = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    if not found:
        raise BadRow("empty list of tool calls", at)
    return found


def read_tools(values: dict[str, Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
    """The `tools` column, a list or its JSON text, as OpenAI function schemas; None where it is missing or empty."""
    value = values.get(columns.get("tools", ""))
    tools = _maybe_json(value, '"tools"') if not isinstance(value, str) or value.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow('"tools" is not a list', type(tools).__name__)
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow('"tools" has an entry without a name')
        _check_tree(tool, '"tools"')
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return found


def check_conversation(messages: list[dict[str, Any]]) -> None:
    systems = [index for index, message in enumerate(messages) if message["role"] == "system"]
    if len(systems) > 1:
        raise BadRow("more than one system turn")
    if systems and systems[0] > 0:
        raise BadRow("a system turn that is not the first")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn")
