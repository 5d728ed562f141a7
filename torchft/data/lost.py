"""What a chat template leaves out of a conversation without a word: tool calls, and the tools to choose from.

    lost_call(messages, rendered)     # "message 2, call of find", or "" where all calls stand in the text
    lost_tools(tools, rendered)       # whether there are tools and none of them is in the text

A template that knows no calls writes an empty answer in their place, which would be trained: such a row is refused
(samples.py). How a call is written is the template's affair (JSON, XML, Python, other letters in a name): it is there if
its name and the names of its arguments are, in text that is the message's. Left out: whether each value is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchft.data.chat_template import Rendered
from torchft.data.tracked import SHARED


def lost_call(messages: Sequence[Mapping[str, Any]], rendered: Rendered) -> str:
    """The first tool call that is not in the text, or ""; of several calls of one name each has to be there."""
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        written = _plain(_written(rendered, index)) if calls else ""
        names: list[str] = []
        for call in calls:
            function = call.get("function", call)
            names.append(function["name"])
            arguments = function.get("arguments")
            keys = list(arguments) if isinstance(arguments, Mapping) else []
            if _count(written, names[-1]) < names.count(names[-1]) or not all(_count(written, key) for key in keys):
                return f"message {index}, call of {names[-1]}"
    return ""


def lost_tools(tools: Sequence[Mapping[str, Any]] | None, rendered: Rendered) -> bool:
    """Whether there are tools of which nothing is in the text."""
    return bool(tools) and not any(source.message < 0 for _, _, source, _ in rendered.spans)


def _written(rendered: Rendered, index: int) -> str:
    """The text that may be of a message's calls: theirs, and what was printed as JSON. An answer may name its call too."""
    pieces = [
        rendered.text[start:end]
        for start, end, source, offset in rendered.spans
        if source is SHARED or (source.message == index and (source.field == "tool_calls" or offset < 0))
    ]
    return "\n".join(pieces)


def _count(written: str, name: str) -> int:
    """How often a name is in the text, as it is or as JSON escapes it."""
    spellings = {_plain(name), _plain(json.dumps(name)), _plain(json.dumps(name, ensure_ascii=False))}
    return max(written.count(spelling) for spelling in spellings)


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return "".join(filter(str.isalnum, text)).lower()
