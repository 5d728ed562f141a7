"""The two kinds of tokenizer.model: sentencepiece's (Llama 2, Mistral) and the ranks that tiktoken reads (Llama 3).

Both encode plain text only. Offsets are character positions in the text, half-open, one pair per token; they cover the
text, and a character of several byte tokens is given to each of them.
"""

import base64
import binascii
import itertools
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tiktoken

from torchft.errors import UserError

Offsets = list[tuple[int, int]]


class SentencePieceModel:
    """BPE or Unigram pieces with byte fallback and without text normalisation.

    Raises:
        UserError: the file is no sentencepiece model.
    """

    def __init__(self, path: Path) -> None:
        model = path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            # Protocol buffers merge a repeated message field by field: these four bytes are a second normalizer_spec
            # (field 3) that holds add_dummy_prefix (field 3) = false. Text behind a control token gets no blank.
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a sentencepiece model ({error}); download it again") from None
        processor = self.processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id, self.unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.control = {
            piece: i for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)
        }
        self._bytes = {i: int(piece[1:-1], 16) for i, piece in enumerate(pieces) if processor.is_byte(i)}
        self._widths = [0 if i in self._bytes else len(piece) for i, piece in enumerate(pieces)]  # in characters

    def encode(self, text: str, first: bool) -> tuple[list[int], Offsets]:
        ids = (self.processor if first else self._inner).encode(text)
        return ids, self._offsets(text, ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def _offsets(self, text: str, ids: list[int]) -> Offsets:
        """From the pieces' lengths: nothing is normalised but blanks, one character for one character.

        Raises:
            UserError: something else is.
        """
        bytes_ = self._bytes
        characters = sum(self._widths[i] or bytes_[i] & 0xC0 != 0x80 for i in ids)  # not the bytes that continue one
        position = len(text) - characters  # -1 where a blank was put before the text
        if position not in (0, -1):
            raise UserError(
                "this tokenizer.model changes text, so that tokens have no place in it: use a tokenizer.json"
            )
        offsets: Offsets = []
        following = 0  # bytes that the character at hand still needs
        for token in ids:
            width = self._widths[token]
            offsets.append((max(position, 0), position + (width or 1)))
            if not width:
                lead = bytes_[token]
                following = following - 1 if lead & 0xC0 == 0x80 else (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
                width = int(following == 0)
            position += width
        return offsets


class TiktokenModel:
    """Llama 3's 128,000 byte ranks, one `base64 rank` per line, and the 256 control tokens behind them.

    Raises:
        UserError: the file is something else.
    """

    # How Llama 3 splits text before it merges bytes (llama_models/llama3/tokenizer.py): GPT-4's rule, digits by threes.
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    RANKS = 128_000
    NAMED = {  # all others are <|reserved_special_token_N|>, counted through
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }

    def __init__(self, path: Path) -> None:
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{path}:{number}: not a line of `base64 rank`; download the file again") from None
        if sorted(ranks.values()) != list(range(self.RANKS)):
            raise UserError(
                f"{path}: holds {len(ranks):,} ranks, but of this kind only Llama 3's (0 to {self.RANKS - 1:,}) "
                "is known; use the model's tokenizer.json"
            )
        self._encoding = tiktoken.Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._lengths = {rank: len(token) for token, rank in ranks.items()}  # in bytes
        reserved = itertools.count()
        names = [self.NAMED.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
        self.control = {f"<|{name}|>": self.RANKS + i for i, name in enumerate(names)}
        self.vocab_size = self.RANKS + len(names)
        self.bos_id, self.eos_id, self.unk_id = self.RANKS, self.RANKS + 1, -1

    def encode(self, text: str, first: bool) -> tuple[list[int], Offsets]:
        ids = self._encoding.encode_ordinary(text)
        ends = list(itertools.accumulate(self._lengths[i] for i in ids))  # in bytes
        starts = [0, *ends]
        if text.isascii():
            return ids, list(zip(starts, ends, strict=False))
        owner = [i for i, char in enumerate(text) for _ in range(len(char.encode()))]  # byte -> its character
        return ids, [(owner[start], owner[end - 1] + 1) for start, end in zip(starts, ends, strict=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")
