"""What splits text at control tokens, and only at those that a template wrote: one class per library.

Both classes have the same methods. `encode(text, first)` is plain: text that spells a control token is ordinary text.
`encode_rendered(text, foreign)` is for rendered conversations: `foreign` are the parts, in order, that the template did
not write, and a control token is one only where it lies wholly outside of them. Offsets are as in vocabularies.py.
"""

import bisect
import re
import secrets
from collections.abc import Mapping, Sequence

import tokenizers

from torchft.data.vocabularies import Offsets, SentencePieceModel, TiktokenModel
from torchft.errors import UserError

Span = tuple[int, int]
Control = tuple[int, int, int]  # start, end, id of a control token that the template wrote into the text
Edge = tuple[int, int, int, int]  # start, end in a text with replacements; start, end of what was there before


class HubBackend:
    """tokenizer.json through `tokenizers`: exactly what transformers does, wherever no row spells a control token.

    `tokenizer` is the file's, less its post-processor (it would add BOS, or trim offsets), with control tokens
    recognised. The twin, made when first needed, recognises none: in its text, a control token that the template wrote
    is replaced by an added token of its own that swallows the same blanks (lstrip, rstrip), spelled with a per-process
    secret so that no row can spell it. So pieces keep their place in the text (Metaspace's "first", Prepend) and one
    call encodes them all.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, control: Mapping[str, int], unk_id: int | None) -> None:
        self.tokenizer = tokenizer
        self._control = dict(control)
        self._unk_id = unk_id
        self._control_ids = frozenset(control.values()) - {unk_id}
        self._spelling = {i: token for token, i in control.items()}
        self._pattern = _pattern_of(control)
        self._twin: tokenizers.Tokenizer | None = None
        self._stand_ins: dict[int, str] = {}  # control id -> its spelling in the twin's text
        self._originals: dict[int, int] = {}  # id in the twin -> control id; of a cut: -1
        self._cut = ""

    def encode(self, text: str, first: bool) -> tuple[list[int], Offsets]:
        if first:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
            if not self._is_forged(text, [(0, len(text))], ids, offsets):
                return ids, offsets
        return self.encode_around(text, [], first)

    def encode_rendered(self, text: str, foreign: Sequence[Span]) -> tuple[list[int], Offsets]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self._is_forged(text, foreign, ids, offsets):
            return self.encode_around(text, find_controls(text, foreign, self._pattern, self._control))
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_around(self, text: str, controls: list[Control], first: bool = True) -> tuple[list[int], Offsets]:
        """Ids and offsets where exactly `controls` (in order, apart) are control tokens and all else is plain text.

        Raises:
            UserError: the model makes a control token of plain text, and the text cannot be cut inside it.
        """
        cuts: set[int] = set() if first else {0}
        while True:
            ids, offsets, forged = self._encode_twin(text, controls, sorted(cuts))
            if not forged:
                return ids, offsets
            # A vocabulary that has control tokens among its ordinary pieces (Unigram, word level): cut inside them.
            new = {offsets[i][0] + 1 for i in forged if offsets[i][1] - offsets[i][0] > 1} - cuts
            if not new:
                raise _forgery(text, *offsets[forged[0]])
            cuts |= new

    def _encode_twin(self, text: str, controls: list[Control], cuts: list[int]) -> tuple[list[int], Offsets, list[int]]:
        """Ids, offsets, and the indices of control tokens that nobody wrote."""
        twin = self._make_twin()
        put = sorted([(*c[:2], self._stand_ins[c[2]]) for c in controls] + [(c, c, self._cut) for c in cuts])
        spelled, edges = _replace(text, put)
        encoding = twin.encode(spelled, add_special_tokens=False)
        ids: list[int] = []
        offsets: Offsets = []
        forged: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            original = self._originals.get(token, token)
            if original < 0:
                continue
            if token in self._control_ids:
                forged.append(len(ids))
            ids.append(original)
            offsets.append((_back(edges, start), _back(edges, end)))
        return ids, offsets, forged

    def _make_twin(self) -> tokenizers.Tokenizer:
        if self._twin is not None:
            return self._twin
        twin = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        flags = twin.get_added_tokens_decoder()
        for i in self._spelling:
            flags[i].special = True
        twin.add_tokens([flags[i] for i in self._spelling])
        twin.encode_special_tokens = True  # = special tokens are encoded like any other text
        secret = secrets.token_hex(8)
        stand_ins = {i: f"\U0010fffe{secret}:{i}\U0010ffff" for i in self._spelling}
        cut = f"\U0010fffe{secret}\U0010ffff"
        # Never missed: neither within a word (single_word) nor after normalising (normalized).
        added = [
            tokenizers.AddedToken(spelling, lstrip=flags[i].lstrip, rstrip=flags[i].rstrip, normalized=False)
            for i, spelling in stand_ins.items()
        ]
        twin.add_tokens([*added, tokenizers.AddedToken(cut, normalized=False)])
        self._originals = {twin.token_to_id(spelling): i for i, spelling in stand_ins.items()}
        self._originals[twin.token_to_id(cut)] = -1
        self._stand_ins, self._cut, self._twin = stand_ins, cut, twin
        return twin

    def _is_forged(self, text: str, foreign: Sequence[Span], ids: list[int], offsets: Offsets) -> bool:
        """Whether the characters of some control token are not all the template's."""
        found = [i for i, token in enumerate(ids) if token in self._spelling]
        return any(_overlap(foreign, *self._core(text, ids[i], *offsets[i])) for i in found)

    def _core(self, text: str, token: int, start: int, end: int) -> Span:
        """A control token's own characters: not the blanks that it swallows; none if it is the model's unk."""
        spelling = self._spelling[token]
        at = text.find(spelling, start, end)
        if at >= 0:
            return at, at + len(spelling)
        return (start, start) if token == self._unk_id else (start, end)


class PieceBackend:
    """tokenizer.model: the text between two control tokens is a piece of its own."""

    def __init__(self, model: SentencePieceModel | TiktokenModel, control: Mapping[str, int]) -> None:
        self.model = model
        self._control = dict(control)
        self._control_ids = frozenset(control.values()) - {model.unk_id}
        self._spelling = {i: token for token, i in control.items()}
        self._pattern = _pattern_of(control)

    def encode(self, text: str, first: bool) -> tuple[list[int], Offsets]:
        encoded: tuple[list[int], Offsets] = [], []
        done = 0
        while True:
            ids, offsets = self.model.encode(text[done:], first and done == 0)
            forged = next((i for i, token in enumerate(ids) if token in self._control_ids), None)
            if forged is None:
                _append(encoded, (ids, offsets), done)
                return encoded
            start, end = offsets[forged]  # a piece that is a word and a control token at once: cut inside it
            if end - start < 2:
                raise _forgery(text, done + start, done + end)
            _append(encoded, self.encode(text[done : done + start + 1], first and done == 0), done)
            done += start + 1

    def encode_rendered(self, text: str, foreign: Sequence[Span]) -> tuple[list[int], Offsets]:
        encoded: tuple[list[int], Offsets] = [], []
        done = 0
        for start, end, control in find_controls(text, foreign, self._pattern, self._control):
            if start > done:
                _append(encoded, self.encode(text[done:start], first=done == 0), done)
            _append(encoded, ([control], [(0, end - start)]), start)
            done = end
        if done < len(text):
            _append(encoded, self.encode(text[done:], first=done == 0), done)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Control tokens as they are spelled: the libraries print nothing for them."""
        parts: list[str] = []
        plain: list[int] = []
        for token in ids:
            if token in self._spelling:
                parts += [self.model.decode(plain), self._spelling[token]]
                plain = []
            else:
                plain.append(token)
        return "".join([*parts, self.model.decode(plain)])


def find_controls(
    text: str, foreign: Sequence[Span], pattern: re.Pattern[str], control: Mapping[str, int]
) -> list[Control]:
    """The control tokens in what the template wrote, each piece of it searched on its own, left to right."""
    controls: list[Control] = []
    start = 0
    for foreign_start, foreign_end in [*foreign, (len(text), len(text))]:
        for match in pattern.finditer(text, start, foreign_start):
            controls.append((match.start(), match.end(), control[match[0]]))
        start = foreign_end
    return controls


def _pattern_of(control: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _overlap(foreign: Sequence[Span], start: int, end: int) -> bool:
    before = bisect.bisect_left(foreign, (end,))  # of the parts that begin before `end`, the last reaches farthest
    return start < end and before > 0 and foreign[before - 1][1] > start


def _append(encoded: tuple[list[int], Offsets], piece: tuple[list[int], Offsets], shift: int) -> None:
    """Puts ids and offsets of a piece of text that begins at `shift` behind those of what stands before it."""
    encoded[0].extend(piece[0])
    encoded[1].extend((start + shift, end + shift) for start, end in piece[1])


def _replace(text: str, put: list[tuple[int, int, str]]) -> tuple[str, list[Edge]]:
    """The text with each (start, end, replacement) done, and where everything put in stands."""
    parts: list[str] = []
    edges: list[Edge] = []
    done = size = 0
    for start, end, replacement in put:
        parts += [text[done:start], replacement]
        begin = size + start - done
        size = begin + len(replacement)
        edges.append((begin, size, start, end))
        done = end
    return "".join([*parts, text[done:]]), edges


def _back(edges: list[Edge], position: int) -> int:
    """A position in the text made by `_replace` as one in the original."""
    index = bisect.bisect_right(edges, position, key=lambda edge: edge[0]) - 1
    if index < 0:
        return position
    _, end, original_start, original_end = edges[index]
    return original_end + position - end if position >= end else original_start


def _forgery(text: str, start: int, end: int) -> UserError:
    return UserError(
        f"the tokenizer makes a control token of the plain text {text[start:end]!r} and it cannot be cut apart: "
        "remove that text from the row"
    )
