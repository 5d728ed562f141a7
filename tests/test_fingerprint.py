"""The identity of a model directory: what keeps it, and what changes it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import edit_tensors, linked_as_the_hub_does, make_base

from torchft.errors import UserError
from torchft.hf_checkpoint import INDEX, PIECE_BYTES, PIECES, SINGLE, fingerprint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shard_size", ["5GB", "600KB"])
def test_a_copy_elsewhere_has_the_same_fingerprint(shard_size: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make_base(tmp_path / "one file").save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / INDEX).exists() == (shard_size == "600KB")
    expected = fingerprint(folder)
    assert len(expected) == 64 and expected == fingerprint(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text("{}")  # not weights, nor what they mean
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"an unused one, as Mistral's directories have")
    os.utime(tmp_path / "copy" / "config.json", (0, 0))
    assert fingerprint(tmp_path / "copy") == expected
    assert fingerprint(linked_as_the_hub_does(folder, tmp_path)) == expected


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename_shard(base: Path) -> None:
    (base / SINGLE).rename(base / "weights.safetensors")
    names = open_names(base / "weights.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "weights.safetensors")}))


def open_names(file: Path) -> list[str]:
    content = file.read_bytes()
    fields = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [name for name in fields if name != "__metadata__"]


def replace_once(file: Path, old: str, new: str) -> None:
    """Of the same length, so that no file's size gives it away."""
    content = file.read_bytes()
    assert len(old) == len(new) and old.encode() in content
    file.write_bytes(content.replace(old.encode(), new.encode(), 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "config": lambda base: replace_once(base / "config.json", '"llama"', '"qwen3"'),
    "renamed tensor": lambda base: replace_once(base / SINGLE, NAME, NAME[:-1] + "T"),
    "dtype in the header": lambda base: replace_once(base / SINGLE, '"BF16"', '"F16" '),
    "metadata": lambda base: replace_once(base / SINGLE, '"format":"pt"', '"format":"PT"'),
    "last byte": lambda base: flip_last_byte(base / SINGLE),
    "one weight": lambda base: edit_tensors(base, lambda tensors: tensors[NAME][0, 0].add_(1)),
    "file's name": rename_shard,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_has_another_fingerprint(tmp_path: Path, what: str) -> None:
    make_base(tmp_path, dtype=torch.bfloat16)
    assert (tmp_path / SINGLE).stat().st_size < PIECES * PIECE_BYTES, "all of it is read"
    before = fingerprint(tmp_path)
    CHANGES[what](tmp_path)
    assert fingerprint(tmp_path) != before


def test_a_large_file_is_read_in_pieces_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    """Each of the 16 pieces counts, and a byte between two of them does not: the trade of the docstring."""
    num_bytes = 2 * PIECES * PIECE_BYTES
    make_base(tmp_path)
    (tmp_path / SINGLE).unlink()
    header = json.dumps({"x": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    start = 8 + len(header)
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    before = fingerprint(tmp_path)

    def changed_at(place: int) -> bool:
        with (tmp_path / SINGLE).open("r+b") as file:
            file.seek(start + place)
            file.write(b"1")
            file.flush()
            after = fingerprint(tmp_path)
            file.seek(start + place)
            file.write(b"\0")
        return after != before

    stride = (num_bytes - PIECE_BYTES) / (PIECES - 1)
    assert all(changed_at(int(i * stride) + PIECE_BYTES // 2) for i in range(PIECES))
    assert changed_at(0) and changed_at(num_bytes - 1)
    assert not changed_at(PIECE_BYTES + 100)


def test_a_fingerprint_needs_a_sound_model_directory(tmp_path: Path) -> None:
    base = tmp_path
    make_base(base)
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        fingerprint(base)
    (base / SINGLE).write_bytes((base / SINGLE).read_bytes()[:-1])
    with pytest.raises(UserError, match="not an intact safetensors file"):
        fingerprint(base)
