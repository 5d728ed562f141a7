"""Where in a rendered conversation an answer stands, told by whose characters lie there, or why it stands nowhere.

A plain answer is found where its text stands whole, blanks at its ends aside. The template may take it apart and
restate some of it (Qwen3 splits at </think> and writes the tag itself): what counts is that the text agrees, and that
all of the row's characters in it are the answer's own, each in its place. An answer with tool calls, reasoning or
several texts is found from behind the generation prompt before it to its last character: what the template writes
around the parts (`<tool_call>`, `{"name": "`) has to be generated too.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchft.data.chat_template import ChatTemplate, Rendered, RowError, RowSpan
from torchft.data.tracked import Source
from torchft.data.wrapping import REASONING

Region = tuple[int, int]  # start, end in the rendered text

NOT_VERBATIM = "answer is not rendered as it is written (beyond trimming)"
REPEATED = "answer is rendered more than once"
EMPTY = "answer is empty"
NO_START = "no generation prompt stands before the answer's tool calls or reasoning"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was rendered, with what, into what."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    template: ChatTemplate
    rendered: Rendered
    controls: Sequence[Region]  # the control tokens in the rendered text, in order


@dataclass(frozen=True, slots=True)
class _Answer:
    """A message of a rendered conversation and the numbers of its spans."""

    chat: Conversation
    index: int
    own: list[int]


def find_answers(chat: Conversation, indices: Sequence[int]) -> list[list[Region] | str]:
    """For each of the messages at `indices` its regions, up to its last own character; or why it is not to be trained.

    There are several regions only where a template gives each tool call a turn of its own.
    """
    own: dict[int, list[int]] = {index: [] for index in indices}  # message -> its spans
    for number, span in enumerate(chat.rendered.spans):
        if span[2].message in own:
            own[span[2].message].append(number)
    return [_find_answer(_Answer(chat, index, own[index])) for index in indices]


def _find_answer(answer: _Answer) -> list[Region] | str:
    contents, reasoning, calls = _parts(answer.chat.messages[answer.index])
    if reasoning or calls or len(contents) > 1:
        return _find_composed(answer, contents + reasoning, calls)
    if not contents:
        return EMPTY
    found = _find_text(answer, contents[0])
    if len(found) > 1:
        found = [region for region in found if _follows_prompt(answer.chat, region[0])]
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
        start, end, source, offset = answer.chat.rendered.spans[number]
        if source.text == text and offset >= 0:
            low, high = extents.get(start - offset, (start, end))
            extents[start - offset] = min(low, start), max(high, end)
    places = [_fit(answer, text, base, extent) for base, extent in extents.items()]
    return [place for place in places if place]


def _fit(answer: _Answer, text: str, base: int, extent: Region) -> Region | None:
    """The region of a text that begins at `base`, blanks at its ends only as far as the template kept them; or None."""
    rendered = answer.chat.rendered
    core = text.strip() or text
    start = base + text.index(core)
    end = start + len(core)
    if start < 0 or rendered.text[start:end] != core or not _is_own(answer, start, end, base, text):
        return None
    low, high = min(start, extent[0]), max(end, extent[1])
    kept = rendered.text[low:high] == text[low - base : high - base] and _is_own(answer, low, high, base, text)
    return (low, high) if kept else (start, end)


def _is_own(answer: _Answer, start: int, end: int, base: int, text: str) -> bool:
    """Whether all row text in a region is of this text of this message, which begins at `base`, and in its place."""
    spans = answer.chat.rendered.spans
    first = bisect.bisect_right(spans, start, key=lambda span: span[1])
    stop = bisect.bisect_left(spans, end, key=lambda span: span[0])
    return all(
        source.message == answer.index and source.text == text and low - offset == base
        for low, _, source, offset in spans[first:stop]
    )


def _follows_prompt(chat: Conversation, start: int) -> bool:
    """Whether the generation prompt, written by the template, ends at `start`."""
    spans, prompt = chat.rendered.spans, chat.template.generation_prompt
    number = bisect.bisect_left(spans, start, key=lambda span: span[0])  # of the first span that begins no earlier
    return prompt != "" and chat.rendered.text.endswith(prompt, spans[number - 1][1] if number else 0, start)


@dataclass(slots=True)
class _Segment:
    """From behind a generation prompt to the last character of the row that follows without another message between."""

    start: int
    end: int
    sources: set[Source]


def _find_composed(answer: _Answer, texts: list[str], calls: Sequence[Mapping[str, Any]]) -> list[Region] | str:
    segments = _segments(answer)
    if not segments:
        return NO_START if answer.own else NOT_VERBATIM
    regions = [(segment.start, segment.end) for segment in segments]
    sources = list(itertools.chain.from_iterable(segment.sources for segment in segments))
    if len(sources) > len(set(sources)):
        return REPEATED
    written = "".join(answer.chat.rendered.text[start:end] for start, end in regions)
    whole = all(_stands_in(regions, _find_text(answer, text)) for text in filter(str.strip, texts))
    whole &= all(call.get("function", call)["name"] in written for call in calls)
    return regions if whole else NOT_VERBATIM


def _stands_in(regions: list[Region], places: list[Region]) -> bool:
    """Whether one of the places is within one of the regions."""
    return any(low <= start and end <= high for start, end in places for low, high in regions)


def _segments(answer: _Answer) -> list[_Segment]:
    """The generation prompt is looked for only in what the template wrote right before a character of the message."""
    spans = answer.chat.rendered.spans
    segments: list[_Segment] = []
    last = -1  # the number of the span with which the last segment ends so far
    for number in answer.own:
        _, end, source, _ = spans[number]
        begin = _prompt_end(answer, number)
        if begin is None and not segments and number == answer.own[0]:
            begin = _context_end(answer)
        if begin is not None:
            segments.append(_Segment(begin, end, {source}))
        elif segments and last == number - 1 and not _is_mention(answer.chat, segments[-1], spans[number]):
            segments[-1].end = end
            segments[-1].sources.add(source)
        else:
            continue
        last = number
    return segments


def _is_mention(chat: Conversation, segment: _Segment, span: RowSpan) -> bool:
    """Whether a span repeats, behind a control token, what the segment says: a call's name above the tool's reply."""
    behind = bisect.bisect_left(chat.controls, (segment.end,))
    return span[2] in segment.sources and behind < len(chat.controls) and chat.controls[behind][1] <= span[0]


def _prompt_end(answer: _Answer, number: int) -> int | None:
    """Where the last generation prompt ends in the template's text before a span."""
    prompt, spans = answer.chat.template.generation_prompt, answer.chat.rendered.spans
    free = spans[number - 1][1] if number else 0
    at = answer.chat.rendered.text.rfind(prompt, free, spans[number][0]) if prompt else -1
    return at + len(prompt) if at >= 0 else None


def _context_end(answer: _Answer) -> int | None:
    """Where the messages before this one end, for templates without a generation prompt (Mistral): if they render to
    the very beginning of this text, and end in what the template wrote right before the answer.
    """
    chat, first = answer.chat, answer.own[0]
    try:
        before = chat.template.render(chat.messages[: answer.index], chat.tools, add_generation_prompt=True).text
    except RowError:
        return None
    free = chat.rendered.spans[first - 1][1] if first else 0
    fits = free <= len(before) <= chat.rendered.spans[first][0] and chat.rendered.text.startswith(before)
    return len(before) if fits else None
