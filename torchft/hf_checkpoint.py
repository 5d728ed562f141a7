"""A Hugging Face checkpoint directory, checked before anything in it is believed: safetensors files and their index.

Exactly the tensors of the index are used, each from the file it names, and nothing outside the directory is ever
opened. Pickled files are refused by their names. MXFP4 tensors appear as the bf16 that they mean (mxfp4.py).
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchft import mxfp4
from torchft.errors import UserError
from torchft.safetensors_header import TensorInfo, read_header, unique_keys

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NAMED_AT_ONCE = 8  # tensors listed in one message
PIECES, PIECE_BYTES = 16, 2**16  # of each file's data, for its fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """A checked HF checkpoint directory: `tensors` are all that it holds, by name, file after file."""

    path: Path
    stored: dict[str, TensorInfo]  # as the files have it

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """As it is read."""
        return mxfp4.decoded(self.stored)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU: a view of the mapped file, as in `stream`."""
        if name not in self.stored:
            return self._coded(name)[:]
        with _opened(self.stored[name].file) as file:
            return file.get_tensor(name)

    def _coded(self, name: str) -> mxfp4.Coded:
        return mxfp4.Coded(self.read(name + mxfp4.BLOCKS), self.read(name + mxfp4.SCALES))

    def stream(self) -> Iterator[tuple[str, Tensor | mxfp4.Coded]]:
        """(name, tensor on the CPU) file by file. The tensor is a view of the mapped file: copy it, do not keep it."""
        by_file: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            by_file.setdefault(info.file, []).append(name)
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    yield name, file.get_tensor(name) if name in self.stored else self._coded(name)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Check a model directory's safetensors files and its index, without reading any weights.

    Raises:
        UserError: no weights, pickled weights only, a damaged file, or an index that its files do not match exactly.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is no model directory; `tune download <org>/<name>` makes one from a hub model")
    has_single, has_index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if has_single and has_index and set(_weight_map(folder).values()) != {SINGLE}:
        raise UserError(
            f"{folder} holds {SINGLE} and also {INDEX} for other files: two checkpoints; delete one of them"
        )
    if has_index:
        return Checkpoint(folder, _indexed_tensors(folder))
    if has_single:
        return Checkpoint(folder, read_header(contained(folder, SINGLE)).tensors)
    raise UserError(_why_no_weights(folder))


def fingerprint(path: str | Path) -> str:
    """An identity of a model directory: is this still the base model that a checkpoint was trained on?

    SHA-256 over config.json and, of each safetensors file in use, its name, size, header and 16 pieces of 64 KiB that
    are spread evenly over its data; smaller files count whole. A directory that was copied, or linked by the hub's
    cache, keeps its value. The trade: reading all of an 8B model's 16 GB would take too long at every start, so bytes
    changed between the pieces go unseen. Another model, revision, dtype or fine-tune changes weights everywhere, and is
    seen; one tensor edited in place may not be. It is no protection against someone who wants to deceive.

    Raises:
        UserError: as `open_checkpoint`, or config.json is missing.
    """
    folder = open_checkpoint(path).path
    files = sorted(set(_weight_map(folder).values())) if (folder / INDEX).exists() else [SINGLE]
    digest = hashlib.sha256()
    try:
        config = contained(folder, "config.json").read_bytes()
        digest.update(f"config.json {len(config)}\n".encode() + config)
        for name in files:  # as the directory calls them: the hub's cache keeps them elsewhere under other names
            _add_weights(digest, name, contained(folder, name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", name: str, path: Path) -> None:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(f"{name} {size}\n".encode() + length + header)
        start = file.tell()
        if size - start <= PIECES * PIECE_BYTES:
            digest.update(file.read())
            return
        for i in range(PIECES):
            file.seek(start + i * (size - start - PIECE_BYTES) // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))


def _why_no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if "adapter_model.safetensors" in names:
        return (
            f"{folder} is an adapter, not a model; give the model it was trained on as the model, and it as the adapter"
        )
    if pickled:
        return (
            f"{folder} holds its weights in {pickled[0]}: a pickle, which can run any code when it is opened, so it is "
            "refused; use a safetensors revision of the model, as almost every one on the hub has"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}; download the model with `tune download <org>/<name>`"


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's tensor name -> file name, checked for form only."""
    file = contained(folder, INDEX)
    try:
        index = json.loads(file.read_bytes().decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map (tensor name -> file name); download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(f"{file}: weight_map puts {name} into {shard!r}, which is no safetensors file")
    return weight_map


def _indexed_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the index from exactly the file it names; nothing more may be in those files, nothing less."""
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorInfo] = {}
    files = {shard: contained(folder, shard) for shard in sorted(set(weight_map.values()))}
    for shard, path in files.items():
        held = read_header(path).tensors
        lacking = [name for name, file in weight_map.items() if file == shard and name not in held]
        extra = [name for name in held if weight_map.get(name) != shard]
        if lacking:
            raise UserError(
                f"{folder / INDEX} puts {listed(lacking)} into {shard}, which does not hold it; download both again"
            )
        if extra:
            raise UserError(
                f"{folder / shard} holds {listed(extra)}, which {INDEX} does not place there: files of two checkpoints "
                "are mixed; download the model into an empty directory"
            )
        tensors |= held
    return tensors


def contained(folder: Path, name: str) -> Path:
    """The path of a file that must lie in `folder`. A symbolic link may lead out only into the hub's own cache.

    Raises:
        UserError: the name leads elsewhere, or there is no such file.
    """
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{folder / INDEX}: {name!r} is not a plain file name; such an index is not to be trusted")
    try:
        root, file = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise UserError(f"{folder / name} is a link that leads nowhere; replace it by the file itself") from None
    # The hub's cache: models--org--name/snapshots/<revision>/<file> is a link to models--org--name/blobs/<sha256>.
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if file.parent not in allowed:
        raise UserError(
            f"{folder / name} is a link that leads out of its directory, to {file}; replace it by the file itself"
        )
    if not file.is_file():
        raise UserError(f"{folder / name} is missing; download the model again")
    return file


def listed(names: list[str], separator: str = ", ") -> str:
    """The first few of many names, for a message."""
    more = len(names) - NAMED_AT_ONCE
    return separator.join(names[:NAMED_AT_ONCE]) + (f" and {more} more" if more > 0 else "")
