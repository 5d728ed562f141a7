"""1,000 flipped bytes and 200 structural damages of checkpoints and model directories: none is loaded as if it were whole.

PITFALLS K2 and K3. What is promised: a checkpoint has a manifest, so any change of it is refused. A model directory has none (the
hub's format): damage of a header, an index, a name or a size is refused; a changed weight cannot be seen when it is loaded,
and is seen by the fingerprint when a run is continued (whole files up to 1 MiB, else 16 pieces of 64 KiB each).
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from scale import random_of, scaled
from test_atomic import DAMAGE
from tiny_training import hide_cuda
from victim import Victim

from torchft.checkpoint import find_checkpoint
from torchft.crash import raised_in_models
from torchft.errors import UserError
from torchft.hf_checkpoint import INDEX, fingerprint
from torchft.models import build_model, read_config
from torchft.run_dir import verify_checkpoint
from torchft.weights import load_weights

SAVED = [("whole", 1), ("parts", 2)]


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The last one of a run, alone in its directory."""
    hide_cuda(monkeypatch)
    Victim(*request.param, tmp_path)
    out = tmp_path / "straight/out"
    shutil.rmtree(out / "step_000003")
    return out / "step_000005"


def assert_refused(folder: Path, what: str) -> None:
    """Neither by its name nor by `auto` is it taken."""
    try:
        verify_checkpoint(folder)
        pytest.fail(f"{what} was taken for whole")
    except UserError:
        pass
    assert find_checkpoint(folder.parent, "auto", {}, lambda text: None) is None


@pytest.mark.parametrize("checkpoint", SAVED, ids=["whole", "parts"], indirect=True)
def test_any_flipped_byte_of_a_checkpoint(checkpoint: Path, tally: Callable) -> None:
    files, random = sorted(checkpoint.iterdir()), random_of("flips", checkpoint.name)
    number = scaled(25, 400)
    for turn in range(number):
        path = files[turn % len(files)]
        with changed(path, flipped(path.read_bytes(), random)):
            assert_refused(checkpoint, path.name)
    verify_checkpoint(checkpoint)
    tally(number, "flips in checkpoints")


def flipped(content: bytes, random: Random) -> bytes:
    offset = random.randrange(len(content))
    return content[:offset] + bytes([content[offset] ^ random.randrange(1, 256)]) + content[offset + 1 :]


class changed:  # noqa: N801  (a context manager)
    """A file with another content, for the length of a `with`."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def __enter__(self) -> None:
        self.before = self.path.read_bytes()
        self.path.write_bytes(self.content)

    def __exit__(self, *exception: object) -> None:
        self.path.write_bytes(self.before)


@pytest.mark.parametrize("checkpoint", SAVED, ids=["whole", "parts"], indirect=True)
def test_structural_damage_of_a_checkpoint(checkpoint: Path, tmp_path: Path, tally: Callable) -> None:
    """Random files cut, grown, removed, added, renamed, swapped, linked, made a directory; and another checkpoint's file."""
    random, number = random_of("structure", checkpoint.name), scaled(12, 60)
    for _ in range(number):
        copy = tmp_path / "copy" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        one, other = random.sample(sorted(copy.iterdir()), 2)
        how = random.randrange(8)
        if how == 0:
            os.truncate(one, random.randrange(one.stat().st_size))
        elif how == 1:
            one.write_bytes(one.read_bytes() + random.randbytes(random.randint(1, 9)))
        elif how == 2:
            one.unlink()
        elif how == 3:
            shutil.copy(one, copy / f"x{one.name}")
        elif how == 4:
            os.rename(one, copy / f"{one.name}.bak")
        elif how == 5:
            one_bytes = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(one_bytes)
        elif how == 6:
            os.rename(one, tmp_path / "elsewhere")
            one.symlink_to(tmp_path / "elsewhere")
        else:
            one.unlink()
            one.mkdir()
        assert_refused(copy, f"{how} {one.name} {other.name}")
        shutil.rmtree(copy)
    tally(number, "structural damages of checkpoints")


def test_the_ordinary_damages_are_twenty() -> None:
    assert len(DAMAGE) >= 20  # tests/test_atomic.py holds each of them by name


# ------------------------------------------------------------------------------------------------------- model directories


@pytest.fixture
def sharded(small_model: Path, tmp_path: Path) -> Path:
    """The small model in three files and an index."""
    folder = tmp_path / "sharded"
    shutil.copytree(small_model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in names if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights, or None where the directory is refused."""
    try:
        with torch.device("meta"):
            model = build_model(read_config(folder))
        load_weights(model, folder, device="cpu", dtype=torch.float32)
    except UserError:
        return None
    except ValueError as error:  # torchft.models knows no UserError; crash.py prints its errors without a traceback too
        assert raised_in_models(error.__traceback__)
        return None
    return dict(model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_flipped_bytes_of_a_model_directory(sharded: Path, tally: Callable) -> None:
    """Refused, without any effect (in unused space), or seen by the fingerprint; headers and index: refused or no effect."""
    random, expected, mark = random_of("model flips"), loaded(sharded), fingerprint(sharded)
    files, number, kinds = sorted(sharded.glob("model*")), scaled(30, 200), {"refused": 0, "no effect": 0, "seen by the fingerprint": 0}
    for turn in range(number):
        path = files[turn % len(files)]
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
        in_header = turn % 2 == 0
        damaged = flipped(content[:header], random) + content[header:] if in_header else content[:header] + flipped(content[header:] or b"{", random)
        with changed(path, damaged):
            weights = loaded(sharded)
            if weights is None:
                kinds["refused"] += 1
            elif same(weights, expected):
                kinds["no effect"] += 1
            else:
                assert not in_header, (path, damaged[:header])
                assert fingerprint(sharded) != mark
                kinds["seen by the fingerprint"] += 1
    assert fingerprint(sharded) == mark
    tally(number, "flips in model directories", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))


def test_structural_damage_of_a_model_directory(sharded: Path, tmp_path: Path, tally: Callable) -> None:
    """Files cut, grown, removed, swapped; the index without, with more or with other entries; tensors that are added or reshaped."""
    random, number = random_of("model structure"), scaled(12, 90)
    for _ in range(number):
        copy = tmp_path / "copy"
        shutil.copytree(sharded, copy)
        damage(copy, random)
        assert loaded(copy) is None, sorted(copy.iterdir())
        shutil.rmtree(copy)
    tally(number, "structural damages of model directories")


def damage(folder: Path, random: Random) -> None:
    """One of twelve, with a random file and tensor."""
    shard, other = random.sample(sorted(folder.glob("*.safetensors")), 2)
    index = json.loads((folder / INDEX).read_text())
    weight_map, how = index["weight_map"], random.randrange(12)
    name = random.choice(sorted(weight_map))
    file = folder / weight_map[name]
    if how == 0:
        os.truncate(shard, random.randrange(shard.stat().st_size))
    elif how == 1:
        shard.write_bytes(shard.read_bytes() + random.randbytes(3))
    elif how == 2:
        shard.unlink()
    elif how == 3:
        contents = shard.read_bytes(), other.read_bytes()
        shard.write_bytes(contents[1])
        other.write_bytes(contents[0])
    elif how == 4:
        del weight_map[name]
    elif how == 5:
        weight_map[f"{name}.more"] = file.name
    elif how == 6:
        weight_map[name] = next(path.name for path in (shard, other) if path != file)
    elif how == 7:
        weight_map[name] = random.choice(["../x.safetensors", "/etc/x.safetensors", "x.bin", "", None, 3, ["x"], "missing.safetensors"])
    elif how in (8, 9, 10):
        tensors = load_file(file)
        if how == 8:
            tensors["model.extra.weight"] = torch.zeros(2)
        elif how == 9:
            tensors[name] = torch.zeros(*tensors[name].shape, 2)
        else:
            del tensors[name]
        save_file(tensors, file)
    else:
        config = json.loads((folder / "config.json").read_text())
        config[random.choice(["hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size"])] += 8
        (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps(index))
