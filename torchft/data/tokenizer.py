"""Text to ids and back, one small interface over tokenizer.json and both kinds of tokenizer.model.

    tokenizer = load_tokenizer("models/Llama-3.1-8B-Instruct")
    ids, offsets = tokenizer.encode("plain text")           # never a control token
    print(tokenizer.decode(ids))

Control tokens are the special ones (`special: true`, and those named in tokenizer_config.json: bos, eos ...). Ids equal
transformers' `encode(text, add_special_tokens=False)` for text that spells none of them. Left out: post-processors
(nothing is added by itself: torchft.data.tokenize says where BOS and EOS go), padding, truncation, token types.
"""

import functools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers

from torchft.data.backends import HubBackend, PieceBackend, Span
from torchft.data.tokenizer_config import TokenizerConfig, read_config
from torchft.data.vocabularies import Offsets, SentencePieceModel, TiktokenModel
from torchft.errors import UserError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class Tokenizer:
    """See the module's docstring; made by `load_tokenizer`."""

    path: Path
    backend: HubBackend | PieceBackend
    special_tokens: dict[str, int]  # every control token
    named: dict[str, str]  # bos_token, eos_token ...: those that are set
    chat_template: str | None
    tools_template: str | None  # a second template for conversations with tools; nearly no tokenizer has one
    vocab_size: int  # largest id + 1
    files: list[Path]  # what makes up the tokenizer, for fingerprints and copies
    added: list[str] = field(default_factory=list)  # by add_tokens, in the order of their ids

    @property
    def bos_token(self) -> str | None:
        return self.named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        return self.special_tokens.get(self.named.get("bos_token", ""))

    @property
    def eos_id(self) -> int | None:
        return self.special_tokens.get(self.named.get("eos_token", ""))

    @property
    def added_ids(self) -> range:
        """Ids of the tokens that `add_tokens` has added; empty if none."""
        return range(self.vocab_size - len(self.added), self.vocab_size)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that only a template may write. Not unk's: a model gives it for whatever it cannot spell."""
        return frozenset(self.special_tokens.values()) - {self.special_tokens.get(self.named.get("unk_token", ""))}

    def encode(self, text: str, first: bool = True) -> tuple[list[int], Offsets]:
        """Ids and character offsets of plain text. `first`: it begins a document, so it gets the blank that some models
        put there; not so behind a control token.

        Raises:
            UserError: the text holds half a surrogate pair, or spells a control token that cannot be kept apart.
        """
        _check_text(text)
        return self.backend.encode(text, first)

    def encode_rendered(self, text: str, foreign: Sequence[Span]) -> tuple[list[int], Offsets, list[int]]:
        """Ids, offsets and the indices of control tokens of a rendered conversation. `foreign`: the parts, in order,
        that the template did not write; a control token is one only where it lies wholly outside of them.

        Raises:
            UserError: as `encode`.
        """
        _check_text(text)
        ids, offsets = self.backend.encode_rendered(text, foreign)
        control_ids = self.control_ids
        return ids, offsets, [i for i, token in enumerate(ids) if token in control_ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out, or written as they are spelled."""
        left_out = frozenset(self.special_tokens.values()) if skip_special else frozenset()
        return self.backend.decode([i for i in ids if i not in left_out])

    def add_tokens(self, tokens: Sequence[str], template: str = "") -> list[int]:
        """Adds tokens behind the vocabulary and gives their ids. One that the chat template's source spells becomes a
        control token; any other is a word like `<tool>`, recognised wherever it stands.

        Raises:
            UserError: a token exists, is empty or repeated, or the tokenizer is no tokenizer.json.
        """
        if not isinstance(self.backend, HubBackend):
            raise UserError(f"data.new_tokens: {self.path} has no tokenizer.json to add tokens to; convert it first")
        library = self.backend.tokenizer
        for token in tokens:
            if not token.strip() or library.token_to_id(token) is not None or list(tokens).count(token) > 1:
                raise UserError(f"data.new_tokens: {token!r} is empty, listed twice, or in the vocabulary already")
        library.add_tokens([tokenizers.AddedToken(t, normalized=False, special=t in template) for t in tokens])
        ids = [library.token_to_id(token) for token in tokens]
        self.special_tokens |= {token: i for token, i in zip(tokens, ids, strict=True) if token in template}
        self.added += tokens
        self.vocab_size = max([self.vocab_size - 1, *ids]) + 1
        vars(self).pop("control_ids", None)
        self.backend = HubBackend(
            library, self.special_tokens, self.special_tokens.get(self.named.get("unk_token", ""))
        )
        return ids

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files to a folder; tokens that were added are written into its tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if self.added:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            library = json.loads(self.backend.tokenizer.to_str())  # holds what tokenizer_config.json named, too
            content["added_tokens"] = library["added_tokens"]
            (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


class StreamDecoder:
    """Text of ids that arrive one by one, e.g. from generation: each push gives what is certain by now.

    A character may take several tokens and a token may depend on the one before (blanks): the text since the last
    certain token is decoded again, and what ends in an unfinished character is kept back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been given out; the ones before serve as context

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was kept back, unfinished characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, else tokenizer.model of sentencepiece, or of Llama 3.

    Raises:
        UserError: no such directory or file, or one that cannot be read.
    """
    path = Path(path)
    files = [path / name for name in FILES if (path / name).is_file()]
    if not files or files[0].name not in ("tokenizer.json", "tokenizer.model"):
        raise UserError(f"{path}: no tokenizer.json and no tokenizer.model; a model directory has one of them")
    config = read_config(path)
    if files[0].name == "tokenizer.json":
        return _load_hub(path, files, config)
    return _load_model(path, files, config)


def _load_hub(path: Path, files: list[Path], config: TokenizerConfig) -> Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(files[0]))
    except Exception as error:  # noqa: BLE001  the library raises Exception itself, whatever is wrong
        raise UserError(f"{files[0]}: not a readable tokenizer.json ({error}); download it again") from None
    library.post_processor = None  # it would trim offsets
    library.no_truncation()
    library.no_padding()
    # As transformers: the config's flags win over tokenizer.json's, and a special token that is only named is added.
    library.add_tokens([token for _, token in sorted(config.listed.items())])
    spelled = {token.content for token in library.get_added_tokens_decoder().values()}
    wanted = dict.fromkeys([*config.named.values(), *config.extra])
    library.add_tokens([tokenizers.AddedToken(token, special=True) for token in wanted if token not in spelled])
    added = library.get_added_tokens_decoder()
    control = {token.content: i for i, token in sorted(added.items()) if token.special or token.content in wanted}
    backend = HubBackend(library, control, control.get(config.named.get("unk_token", "")))
    vocab_size = max([library.get_vocab_size(with_added_tokens=False) - 1, *added]) + 1
    templates = config.chat_template, config.tools_template
    return Tokenizer(path, backend, control, config.named, *templates, vocab_size, files)


def _load_model(path: Path, files: list[Path], config: TokenizerConfig) -> Tokenizer:
    model = _read_model(files[0])
    renamed = {i: token.content for i, token in config.listed.items() if token.special}  # e.g. reserved ones
    spelling = {i: token for token, i in model.control.items()} | renamed
    control = {token: i for i, token in sorted(spelling.items())}
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    named = {name: spelling[i] for name, i in ids.items() if i in spelling} | config.named
    unknown = [token for token in named.values() if token not in control]
    if unknown:
        file = path / "tokenizer_config.json"
        raise UserError(f"{file}: {unknown[0]!r} is not in {files[0].name}; use the model's tokenizer.json")
    backend = PieceBackend(model, control)
    vocab_size = max([model.vocab_size - 1, *control.values()]) + 1
    return Tokenizer(path, backend, control, named, config.chat_template, config.tools_template, vocab_size, files)


def _read_model(file: Path) -> SentencePieceModel | TiktokenModel:
    """Which of the two a tokenizer.model is, its first line tells."""
    with file.open("rb") as content:
        ranks = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content.read(1024))
    return TiktokenModel(file) if ranks else SentencePieceModel(file)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds half a surrogate pair (U+{ord(text[error.start]):04X}), which is no character"
        ) from None
