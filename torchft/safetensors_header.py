"""The header of a safetensors file, read strictly: what a file holds, before any of its data is believed.

A file is 8 bytes of header length (little endian), a JSON header, the data. The safetensors library accepts a header
that names a tensor twice and silently takes one of the two; here every byte of data must belong to exactly one tensor.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    dtype: str  # the format's name: BF16, F32, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the data
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """The tensors of one file in the order of their data, and its string metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        UserError: the file is missing, cut off, has bytes that belong to no tensor or to two, or its header is not
            valid.
    """
    text, data_bytes = _read_json_text(path)
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not an object of strings")
    infos = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    end = 0
    for name, info in tensors.items():
        if info.start != end:
            raise _damaged(path, f"{name} begins at byte {info.start:,} of the data, where {end:,} was expected")
        end += info.num_bytes
    if end != data_bytes:
        raise _damaged(path, f"its tensors take {end:,} bytes, but {data_bytes:,} follow the header")
    return Header(tensors, metadata)


def _read_json_text(path: Path) -> tuple[str, int]:
    """(the header's text, bytes of data after it)."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"it has {size:,} bytes and its first 8 announce a header of {header_bytes:,}")
            raw = file.read(header_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return raw.decode(), size - 8 - header_bytes
    except UnicodeDecodeError:
        raise _damaged(path, "its header is not UTF-8 text") from None


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _damaged(path, f"{name} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has the shape {shape!r} at bytes {offsets!r}")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise _damaged(path, f"{name} is {dtype} of shape {tuple(shape)}, which is not {num_bytes:,} bytes")
    return TensorInfo(path, dtype, tuple(shape), offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: a key that occurs twice is an error, where json would take the last one."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"it names {key!r} twice")
        seen[key] = value
    return seen


def _no_constants(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not an intact safetensors file: {what}; download or copy it again")
