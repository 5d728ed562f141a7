"""A string that remembers of every character which string of the row it came from, whatever a template does to it.

`Tracked` is a str whose characters are described by runs `(length, source, offset)`: `length` characters of `source`,
from `offset` on. Source None is text that the template wrote; offset -1 is text derived from the row but no longer its
characters (JSON, a repr). A plain str is all template, so what touches no row text costs nothing. What is derived stays
the row's: only text that the template itself wrote can ever be a control token.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torchft.data.limits import BUDGET


@dataclass(eq=False, slots=True)
class Source:
    """One string of a row. `message` is its index; -1: of no message (tools), or of several."""

    message: int
    field: str  # content | reasoning | tool_calls | other
    text: str


Run = tuple[int, Source | None, int]
SHARED = Source(-1, "other", "")  # stands for strings of several messages, or of none


class RowDict(dict):
    """An object of the row: printed as JSON it is its message's, even if it holds no string."""

    __slots__ = ("_source",)
    _source: Source


class Tracked(str):
    """A str with runs. Methods are str's own, here those that return text, with the runs kept."""

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> str:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        times = max(0, count.__index__())
        BUDGET.spend(len(self) * times)
        return make(str.__mul__(self, times), self._runs * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:  # formatting.percent, which templates get, keeps the runs
        return derived(str.__mod__(self, values), self, values)

    def __rmod__(self, template: Any) -> str:
        return derived(str.__mod__(template, self), self) if isinstance(template, str) else NotImplemented

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return cut(self, start, max(start, stop))
            return join([cut(self, i, i + 1) for i in range(start, stop, step)])
        position = range(len(self))[index]  # range: str's own rules for negative and too large ones
        return cut(self, position, position + 1)

    def __iter__(self) -> Iterator[str]:
        position = 0
        for length, source, offset in self._runs:
            for i in range(length):
                BUDGET.spend(1)
                char = str.__getitem__(self, position + i)
                yield make(char, ((1, source, offset if offset < 0 else offset + i),))
            position += length

    def __repr__(self) -> str:
        return derived(str.__repr__(self), self)

    def __format__(self, spec: str) -> str:
        return derived(str.__format__(self, spec), self) if spec else self

    def lstrip(self, chars: str | None = None, /) -> str:
        return cut(self, len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return cut(self, 0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return cut(self, start, max(start, len(str.rstrip(self, chars))))

    def removeprefix(self, prefix: str, /) -> str:
        return cut(self, len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return cut(self, 0, len(self) - len(suffix)) if self.endswith(suffix) else self

    def _pieces(self, pieces: Iterable[str], gap: int | None = 0) -> list[str]:
        """Consecutive pieces of this string, with their runs; between two are `gap` characters, or (None) blanks."""
        found, position = [], 0
        for piece in pieces:
            if gap is None:
                position = str.index(self, piece, position)
            found.append(cut(self, position, position + len(piece)))
            position += len(piece) + (gap or 0)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._pieces(str.splitlines(self, True))
        return lines if keepends else [cut(a, 0, len(b)) for a, b in zip(lines, str.splitlines(self), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, ...]:
        return tuple(self._pieces(str.partition(self, sep)))

    def rpartition(self, sep: str, /) -> tuple[str, ...]:
        return tuple(self._pieces(str.rpartition(self, sep)))

    def join(self, parts: Iterable[str], /) -> str:
        parts = list(parts)
        for part in parts:
            if not isinstance(part, str):
                raise TypeError(f"join takes strings, not {type(part).__name__}")
        return join(parts, self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if old:
            return join(self.split(old, count), new)
        chars, times = [*self, ""], count.__index__()
        return join(piece for i, char in enumerate(chars) for piece in (new if i < times or times < 0 else "", char))

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return join((self, _fill(width.__index__() - len(self), fill)))

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return join((_fill(width.__index__() - len(self), fill), self))

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        missing = max(0, width.__index__() - len(self))
        left = missing // 2 + (missing & width.__index__() & 1)  # as CPython rounds
        return join((_fill(left, fill), self, _fill(missing - left, fill)))

    def zfill(self, width: SupportsIndex, /) -> str:
        BUDGET.spend(max(0, width.__index__()))
        return derived(str.zfill(self, width), self)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        BUDGET.spend(str.count(self, "\t") * max(0, tabsize.__index__()))
        return derived(str.expandtabs(self, tabsize), self)

    def translate(self, table: Any, /) -> str:
        return join(derived(str.translate(char, table), (char, table)) for char in self)

    def _recased(self, text: str) -> str:
        """A change of case moves no character unless it changes the length."""
        return make(text, self._runs) if len(text) == len(self) else derived(text, self)

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def casefold(self) -> str:
        return self._recased(str.casefold(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def swapcase(self) -> str:
        return self._recased(str.swapcase(self))


def _fill(count: int, char: str) -> str:
    BUDGET.spend(max(0, count))
    return char * count


def make(text: str, runs: tuple[Run, ...]) -> str:
    """`text` with `runs`, which must add up to its length: a plain str where the template wrote all of it."""
    for run in runs:
        if run[1] is not None:
            return promote(text, runs)
    return str.__str__(text)


def promote(text: str, runs: tuple[Run, ...]) -> Tracked:
    """As `make`, but a Tracked in any case: so that a template's own string handles tracked arguments."""
    tracked = str.__new__(Tracked, str.__str__(text))
    tracked._runs = runs
    return tracked


def track(text: str, source: Source) -> str:
    """The whole of `source`, before anything is done to it."""
    return make(text, ((len(text), source, 0),) if text else ())


def runs_of(text: str) -> tuple[Run, ...]:
    if type(text) is Tracked:
        return text._runs
    return ((len(text), None, 0),) if text else ()


def join(parts: Iterable[str], separator: str = "") -> str:
    """separator.join(parts), with the runs of all."""
    parts = list(parts)
    if separator:
        parts = [piece for part in parts for piece in (separator, part)][1:]
    BUDGET.spend(sum(map(len, parts)))
    text = "".join(parts)
    if Tracked not in map(type, parts):
        return text
    return make(text, tuple([run for part in parts for run in runs_of(part)]))


def cut(text: str, start: int, stop: int) -> str:
    """text[start:stop] for 0 <= start <= stop <= len(text), with its runs."""
    BUDGET.spend(stop - start)
    runs, position = [], 0
    for length, source, offset in runs_of(text):
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            runs.append((high - low, source, offset if offset < 0 else offset + low - position))
        position += length
    return make(str.__getitem__(text, slice(start, stop)), tuple(runs))


def owner(value: Any) -> Source | None:
    """One source that stands for all row text inside a value: the first, if all are of its message; None without any.

    Walking the value draws on the budget, so that nested lists cannot explode when they are printed or compared.
    """
    found: dict[Source, None] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (str, Mapping, list, tuple, set, frozenset)):
            continue
        BUDGET.spend(len(item))
        if isinstance(item, str):
            found.update((source, None) for _, source, _ in runs_of(item) if source is not None)
            continue
        if type(item) is RowDict:
            found[item._source] = None
        stack += [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
    first = next(iter(found), None)
    return SHARED if any(source.message != first.message for source in found) else first


def derived(text: str, *origin: Any) -> str:
    """`text` as made out of the values of `origin` in some other way than copying characters."""
    BUDGET.spend(len(text))
    source = owner(origin)
    return make(text, ((len(text), source, -1),) if text else ())


def to_text(value: Any) -> str:
    """What `{{ value }}` prints: numbers, None and undefined are the template's own text, a printed container is the
    row's.
    """
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (Mapping, list, tuple, set)):
        source = owner(value)  # before the text: walking bounds its size
        text = str(value)
        BUDGET.spend(len(text))
        return make(text, ((len(text), source or SHARED, -1),))
    return str(value)
