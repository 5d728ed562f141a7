"""Where in a rendered conversation an answer stands, told by whose characters lie there, or why it stands nowhere.

A plain answer is found where its text stands whole, blanks at its ends aside. The template may take it apart and
restate some of it (Qwen3 splits at </think> and writes the tag itself): what counts is that the text agrees, and that
all of the row's characters in it are the answer's own, each in its place. An answer with tool calls, reasoning or
several texts is found from behind the generation prompt before it to its last character: what the template writes
between the parts (`<tool_call>`, `{"name": "`) has to be generated too.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchft.data.chat_template import Rendered
from torchft.data.tracked import Source
from torchft.data.wrapping import REASONING

NOT_VERBATIM = "answer is not rendered as it is written (beyond trimming)"
REPEATED = "answer is rendered more than once"
EMPTY = "answer is empty"
NO_START = "no generation prompt stands before the answer's tool calls or reasoning"

Region = tuple[int, int]  # start, end in the rendered text


def find_answers(
    rendered: Rendered, messages: Sequence[Mapping[str, Any]], indices: Sequence[int], prompt: str
) -> list[list[Region] | str]:
    """For each of the messages at `indices` its regions, up to its last own character; or why it is not to be trained.

    `prompt` is the template's generation prompt. There are several regions only where a template gives each tool call a
    turn of its own.
    """
    own: dict[int, list[int]] = {index: [] for index in indices}  # message -> its spans
    for number, span in enumerate(rendered.spans):
        if span[2].message in own:
            own[span[2].message].append(number)
    return [_find_answer(_Answer(rendered, index, own[index]), messages[index], prompt) for index in indices]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A message of a rendered conversation and the numbers of its spans."""

    rendered: Rendered
    index: int
    own: list[int]


def _find_answer(answer: _Answer, message: Mapping[str, Any], prompt: str) -> list[Region] | str:
    contents, reasoning, calls = _parts(message)
    if reasoning or calls or len(contents) > 1:
        return _find_composed(answer, prompt, contents + reasoning, calls)
    if not contents:
        return EMPTY
    found = _find_text(answer, contents[0])
    if len(found) > 1:
        found = [region for region in found if _follows_prompt(answer.rendered, region[0], prompt)]
        return found if len(found) == 1 else REPEATED
    return found or NOT_VERBATIM


def _parts(message: Mapping[str, Any]) -> tuple[list[str], list[str], Sequence[Mapping[str, Any]]]:
    """An answer's texts that are not empty, its reasoning (none or one), its tool calls."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return list(filter(None, texts)), [reasoning] if reasoning else [], message.get("tool_calls") or []


def _find_text(answer: _Answer, text: str) -> list[Region]:
    """Every place where one of a message's texts stands whole."""
    extents: dict[int, Region] = {}  # where the text would begin -> from its first to its last character that says so
    for number in answer.own:
        start, end, source, offset = answer.rendered.spans[number]
        if source.text == text and offset >= 0:
            low, high = extents.get(start - offset, (start, end))
            extents[start - offset] = min(low, start), max(high, end)
    places = [_fit(answer, text, base, extent) for base, extent in extents.items()]
    return [place for place in places if place]


def _fit(answer: _Answer, text: str, base: int, extent: Region) -> Region | None:
    """The region of a text that begins at `base`, blanks at its ends only as far as the template kept them; or None."""
    rendered = answer.rendered
    core = text.strip() or text
    start = base + text.index(core)
    end = start + len(core)
    if start < 0 or rendered.text[start:end] != core or not _is_own(answer, start, end, base, text):
        return None
    low, high = min(start, extent[0]), max(end, extent[1])
    return (low, high) if rendered.text[low:high] == text[low - base : high - base] else (start, end)


def _is_own(answer: _Answer, start: int, end: int, base: int, text: str) -> bool:
    """Whether all row text in a region is of this text of this message, which begins at `base`, and in its place."""
    spans = answer.rendered.spans
    first = bisect.bisect_right(spans, start, key=lambda span: span[1])
    stop = bisect.bisect_left(spans, end, key=lambda span: span[0])
    return all(
        source.message == answer.index and source.text == text and low - offset == base
        for low, _, source, offset in spans[first:stop]
    )


def _follows_prompt(rendered: Rendered, start: int, prompt: str) -> bool:
    """Whether the generation prompt, written by the template, ends at `start`."""
    number = bisect.bisect_left(rendered.spans, start, key=lambda span: span[0])  # of the first that begins no earlier
    free = rendered.spans[number - 1][1] if number else 0
    return prompt != "" and rendered.text.endswith(prompt, free, start)


@dataclass(slots=True)
class _Segment:
    """From behind a generation prompt to the last character of the row that follows without another message between."""

    start: int
    end: int
    sources: set[Source]


def _find_composed(
    answer: _Answer, prompt: str, texts: list[str], calls: Sequence[Mapping[str, Any]]
) -> list[Region] | str:
    segments = _segments(answer, prompt)
    if not segments:
        return NO_START if answer.own else NOT_VERBATIM
    regions = [(segment.start, segment.end) for segment in segments]
    sources = list(itertools.chain.from_iterable(segment.sources for segment in segments))
    if len(sources) > len(set(sources)):
        return REPEATED
    written = "".join(answer.rendered.text[start:end] for start, end in regions)
    whole = all(_stands_in(regions, _find_text(answer, text)) for text in filter(str.strip, texts))
    whole &= all(call.get("function", call)["name"] in written for call in calls)
    return regions if whole else NOT_VERBATIM


def _stands_in(regions: list[Region], places: list[Region]) -> bool:
    """Whether one of the places is within one of the regions."""
    return any(low <= start and end <= high for start, end in places for low, high in regions)


def _segments(answer: _Answer, prompt: str) -> list[_Segment]:
    """The prompt is looked for only in what the template wrote right before one of the message's characters."""
    text, spans = answer.rendered.text, answer.rendered.spans
    segments: list[_Segment] = []
    inside = -1  # the number of the span with which the last segment ends so far
    for number in answer.own:
        start, end, source, _ = spans[number]
        at = text.rfind(prompt, spans[number - 1][1] if number else 0, start) if prompt else -1
        if at >= 0:
            segments.append(_Segment(at + len(prompt), end, {source}))
        elif segments and inside == number - 1:
            segments[-1].end = end
            segments[-1].sources.add(source)
        else:
            continue
        inside = number
    return segments
