"""Model directories that are damaged, incomplete, mixed or hostile: each refused with its file named.

PITFALLS K2, K3, S3 and S5.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import edit_tensors, linked_as_the_hub_does, load_base, make_base, refused_load

from torchft.errors import UserError
from torchft.hf_checkpoint import INDEX, SINGLE, open_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """One file."""
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three files and an index."""
    model = make_base(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="600KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 3
    return tmp_path / "sharded"


def edit_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


# Damaged files (K2)


def rewrite_header(file: Path, edit: Callable[[dict], object] | None = None, raw: bytes | None = None) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    if raw is None:
        fields = json.loads(header)
        edit(fields)
        raw = json.dumps(fields).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def swap_offsets(fields: dict) -> None:
    up, gate = fields[NAME], fields[NAME.replace("up", "gate")]
    up["data_offsets"] = gate["data_offsets"]


HEADER_EDITS: dict[str, Callable[[dict], object]] = {
    "unknown dtype": lambda fields: fields[NAME].update(dtype="F31"),
    "dtype of another size": lambda fields: fields[NAME].update(dtype="BF16"),
    "shape too large": lambda fields: fields[NAME].update(shape=[257, 128]),
    "negative shape": lambda fields: fields[NAME].update(shape=[-256, -128]),
    "shape of floats": lambda fields: fields[NAME].update(shape=[256.0, 128]),
    "boolean shape": lambda fields: fields[NAME].update(shape=[True, 32768]),
    "overlap": swap_offsets,
    "three offsets": lambda fields: fields[NAME]["data_offsets"].append(0),
    "reversed offsets": lambda fields: fields[NAME]["data_offsets"].reverse(),
    "beyond the end": lambda fields: fields[NAME].update(data_offsets=[10**9, 10**9 + 131072]),
    "tensor dropped from the header": lambda fields: fields.pop(NAME),
    "extra field": lambda fields: fields[NAME].update(stride=[1]),
    "missing field": lambda fields: fields[NAME].pop("shape"),
    "entry is a list": lambda fields: fields.update({NAME: [1, 2]}),
    "metadata is no object": lambda fields: fields.update(__metadata__=[]),
    "metadata of numbers": lambda fields: fields.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("what", HEADER_EDITS)
def test_damaged_header_is_refused(base: Path, what: str) -> None:
    rewrite_header(base / SINGLE, HEADER_EDITS[what])
    refused_load(base, SINGLE, "not an intact safetensors file")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"__metadata__": "x"}']
)
def test_header_that_is_no_object_is_refused(base: Path, raw: bytes) -> None:
    rewrite_header(base / SINGLE, raw=raw)
    refused_load(base, SINGLE, "not an intact safetensors file")


def test_a_name_that_occurs_twice_is_refused(base: Path) -> None:
    """safetensors itself loads the second one."""
    content = (base / SINGLE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    twice = json.dumps(fields)[:-1] + f', "{NAME}": {json.dumps(fields[NAME])}' + "}"
    rewrite_header(base / SINGLE, raw=twice.encode())
    refused_load(base, "names", NAME, "twice")


def test_truncated_and_prolonged_files_are_refused(base: Path) -> None:
    content = (base / SINGLE).read_bytes()
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        (base / SINGLE).write_bytes(content[:size])
        refused_load(base, SINGLE, "not an intact safetensors file")
    (base / SINGLE).write_bytes(content + b"\0")
    refused_load(base, "follow the header")
    (base / SINGLE).write_bytes((2**62).to_bytes(8, "little") + content[8:])
    refused_load(base, "announce a header of")


def test_a_flipped_bit_in_the_header_never_loads_other_weights(base: Path) -> None:
    """200 random flips: refused, or (in a metadata string, say) without any effect."""
    content, expected = bytearray((base / SINGLE).read_bytes()), load_base(base).state_dict()
    size = int.from_bytes(content[:8], "little")
    places = torch.randint(8 * (8 + size), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    num_refused = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (base / SINGLE).write_bytes(flipped)
        try:
            loaded = load_base(base).state_dict()
        except UserError:
            num_refused += 1
        else:
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert num_refused > 180


# The index (K3, S5)


def first_shard(weight_map: dict[str, str]) -> str:
    return sorted(set(weight_map.values()))[0]


def other_shard(weight_map: dict[str, str], name: str) -> str:
    return next(shard for shard in sorted(set(weight_map.values())) if shard != weight_map[name])


INDEX_EDITS: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "entry removed": (lambda m: m.pop(NAME), NAME),
    "entry added": (lambda m: m.update({"model.extra.weight": first_shard(m)}), "model.extra.weight"),
    "entry renamed": (lambda m: m.update({"x." + NAME: m.pop(NAME)}), NAME),
    "other shard": (lambda m: m.update({NAME: other_shard(m, NAME)}), NAME),
    "shard that is missing": (lambda m: m.update({NAME: "model-9.safetensors"}), "model-9.safetensors is missing"),
    "whole shard unlisted": (lambda m: [m.pop(n) for n in [n for n, s in m.items() if s == m[NAME]]], "lacks"),
    "empty": (lambda m: m.clear(), "has no weight_map"),
    "null file": (lambda m: m.update({NAME: None}), "no safetensors file"),
    "number": (lambda m: m.update({NAME: 3}), "no safetensors file"),
    "pickle": (lambda m: m.update({NAME: "pytorch_model.bin"}), "no safetensors file"),
    "empty name": (lambda m: m.update({NAME: ""}), "no safetensors file"),
    "two files swapped": (lambda m: m.update({n: other_shard(m, n) for n in list(m)}), "does not hold it"),
}  # fmt: skip


@pytest.mark.parametrize("what", INDEX_EDITS)
def test_index_mutations_are_refused(sharded: Path, what: str) -> None:
    edit, words = INDEX_EDITS[what]
    edit_index(sharded, edit)
    refused_load(sharded, words)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"weight_map": []}', '{"metadata": {}}', "[" * 100_000, "\udcff"]
)
def test_index_that_is_no_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    refused_load(sharded, INDEX)


def test_index_with_a_name_twice_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{NAME}": "model-00001-of-00003.safetensors",')
    )
    refused_load(sharded, "twice", NAME)


def test_stale_tensor_in_a_shard_is_refused(sharded: Path) -> None:
    """A shard left over from another download holds a tensor that the index places elsewhere."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    shard = other_shard(weight_map, NAME)
    edit_tensors(sharded, lambda tensors: tensors.update({NAME: torch.zeros(256, 128)}), shard)
    refused_load(sharded, shard, NAME, "two checkpoints")


HOSTILE_NAMES = [
    *("../outside.safetensors", "../../outside.safetensors", "/etc/outside.safetensors", "./../outside.safetensors"),
    *("sub/outside.safetensors", "sub/../model.safetensors", "..\\outside.safetensors", "~/outside.safetensors"),
    *("outside\0.safetensors", "http://host/outside.safetensors", "$HOME.safetensors", "//host/x.safetensors"),
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_index_names_outside_the_directory_are_never_opened(sharded: Path, name: str) -> None:
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(next(sharded.glob("model-00001*")), outside)
    edit_index(sharded, lambda weight_map: weight_map.update({NAME: name}))
    message = refused_load(sharded, "not a plain file name" if "/" in name or "\0" in name else "is missing")
    assert "outside" not in message or repr(name) in message or name in message


def test_links_that_lead_out_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.move(base / SINGLE, tmp_path / "secret.safetensors")
    (base / SINGLE).symlink_to(tmp_path / "secret.safetensors")
    refused_load(base, "leads out of its directory")
    (base / SINGLE).unlink()
    (base / SINGLE).symlink_to(base / SINGLE)  # a circle
    with pytest.raises(UserError):
        open_checkpoint(base)


def test_the_hub_caches_own_links_are_followed(base: Path, tmp_path: Path) -> None:
    expected = load_base(base).state_dict()
    snapshot = linked_as_the_hub_does(base, tmp_path)
    loaded = load_base(snapshot).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    shutil.copy(base / SINGLE, tmp_path / SINGLE)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / SINGLE)
    refused_load(snapshot, "leads out")


# Directories (S3)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_by_name_and_never_opened(base: Path, tmp_path: Path, name: str) -> None:
    (base / SINGLE).unlink()
    canary = tmp_path / "executed"
    (base / name).write_bytes(pickle.dumps(Bomb(canary)))
    (base / name).chmod(0)
    refused_load(base, name, "pickle", "refused", "safetensors")
    assert not canary.exists()


def test_pickle_renamed_to_safetensors_is_not_unpickled(base: Path, tmp_path: Path) -> None:
    (base / SINGLE).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused_load(base, "not an intact safetensors file")
    assert not (tmp_path / "executed").exists()


def test_directories_without_weights_say_what_to_do(base: Path, tmp_path: Path) -> None:
    (base / SINGLE).unlink()
    refused_load(base, "holds neither model.safetensors", "tune download")
    (base / "adapter_model.safetensors").touch()
    refused_load(base, "is an adapter, not a model", "as the adapter")
    with pytest.raises(UserError, match="nowhere is no model directory; `tune download"):
        open_checkpoint(tmp_path / "nowhere")


def test_single_file_beside_a_foreign_index_is_refused(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("model-00001*")), sharded / SINGLE)
    refused_load(sharded, "two checkpoints; delete one")
