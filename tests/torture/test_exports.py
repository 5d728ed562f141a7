"""Adapter, model directory and merged model, killed or out of room at any byte and file operation: the old one or the new one.

A next export needs no help, gives the same bytes, and leaves nothing of the ones before. PITFALLS K1, K7 and 2b.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import die_at_byte, die_at_operation, fail_at_operation, list_operations, no_room_at_byte
from scale import random_of, scaled, spread
from tiny_loop import in_children

from torchft.adapter import add_adapter, init_adapter, save_adapter
from torchft.config import LoraOptions
from torchft.crash import raised_in_models
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.merge import merge
from torchft.models import build_model, read_config
from torchft.modules.lora import trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.save_model import save_model
from torchft.weights import load_weights

REFUSED = 3
Exporter = Callable[[Path], object]


def model_of(base: Path, lora: bool) -> CausalLM:
    """The base with an adapter that is not zero, or with all weights moved."""
    with torch.device("meta"):
        model = build_model(read_config(base))
    if lora:
        model.spec = add_adapter(model, LoraOptions(rank=4), range(0))[0]
    load_weights(model, base, device="cpu", dtype=torch.float32)
    if lora:
        init_adapter(model, LoraOptions(rank=4), range(0), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in trainable_parameters(model).values():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def exporters(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exporter]:
    """Name -> export into a directory; the first two replace one that is there, as a continued run does."""
    adapted, whole, tokenizer = model_of(small_model, True), model_of(small_model, False), load_tokenizer(small_model)
    adapter = tmp_path_factory.mktemp("adapter") / "adapter"
    spec = adapted.spec
    save_adapter(adapted, spec, adapter, base_path=str(small_model))
    texts = {"tokenizer": tokenizer, "template": None, "dtype": torch.float32, "max_shard_bytes": 300_000}
    return {
        "adapter": lambda out: save_adapter(adapted, spec, out, base_path=str(small_model), replace_existing=True),
        "model": lambda out: save_model(whole, small_model, out, **texts),
        "merge": lambda out: merge(small_model, adapter, out, max_shard_bytes=300_000),
    }


KINDS = ("adapter", "model", "merge")


class Place:
    """Where one exporter writes, what an earlier run left there, and what must stand there in the end."""

    def __init__(self, kind: str, exporter: Exporter, folder: Path) -> None:
        self.exporter, self.folder, self.points = exporter, folder, 0
        exporter(folder / "new/result")
        self.new = contents(folder / "new/result")
        self.old = {"config.json": b"of an earlier run"} if kind != "merge" else None
        self.operations = folder / "operations"
        self.place = folder / "place"
        self.clean()
        assert self.export(lambda: list_operations(self.place, self.operations)) == 0, self.said
        assert contents(self.place / "result") == self.new

    def clean(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.old is not None:
            (self.place / "result").mkdir()
            (self.place / "result/config.json").write_bytes(self.old["config.json"])

    def export(self, arm: Callable[[], None]) -> int:
        """Exit code of an export in a child."""

        def work() -> None:
            arm()
            try:
                self.exporter(self.place / "result")
            except UserError as error:
                refuse(error)
            except ValueError as error:  # torchft.models knows no UserError; crash.py prints its errors without a traceback too
                assert raised_in_models(error.__traceback__)
                refuse(error)

        (code,), self.said = in_children(lambda rank: work(), 1, self.folder)
        return code

    def disturb(self, codes: tuple[int, ...], arm: Callable[[], None], restart: bool = True) -> None:
        """One export under a fault, on what the one before left unless `restart`; then one without."""
        if restart or (self.old is None and (self.place / "result").exists()):  # a merge never writes over one that is there
            self.clean()
        code = self.export(arm)
        assert code in (0, *codes), self.said
        self.points += code != 0
        result = self.place / "result"
        assert not result.exists() or contents(result) in (self.old, self.new)
        if code == REFUSED:
            assert "refused: " in self.said and str(self.place) in self.said
            rest = [path for path in self.place.iterdir() if path != result]
            if "move it back" in self.said:  # the disk failed between the two renames, and then for good
                assert not result.exists() and [contents(path / "old") for path in rest] == [self.old]
            else:
                assert rest == [] and (contents(result) if result.exists() else None) in (self.old, self.new)
        shutil.rmtree(result, ignore_errors=True) if self.old is None and result.exists() else None
        assert self.export(lambda: None) == 0, self.said
        assert contents(result) == self.new
        assert [path.name for path in self.place.iterdir()] == ["result"]


def refuse(error: Exception) -> None:
    print(f"refused: {error}", flush=True)
    os._exit(REFUSED)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def place(request: pytest.FixtureRequest, exporters: dict[str, Exporter], tmp_path: Path) -> Place:
    return Place(request.param, exporters[request.param], tmp_path)


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_killed_at_any_byte(place: Place, tally: Callable) -> None:
    random = random_of("export bytes", *place.new)
    for file in random.sample(sorted(place.new), scaled(2, len(place.new))):
        size = len(place.new[file])
        limits = [random.randrange(size), 0, size - 1, *(random.randrange(size) for _ in range(7))]
        for limit in limits[: scaled(1, 10)]:
            place.disturb((-signal.SIGXFSZ,), lambda: die_at_byte(place.place, file, limit))  # noqa: B023
    tally(place.points, "kills at bytes")


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_killed_at_any_file_operation(place: Place, tally: Callable) -> None:
    """Each time anew, and then again and again on what the kills before left."""
    total = len(place.operations.read_text().splitlines())
    for number in spread(total, scaled(3, 200)):
        place.disturb((-signal.SIGKILL,), lambda: die_at_operation(place.place, number))  # noqa: B023
    for number in spread(total, scaled(1, 15)):
        place.export(lambda: die_at_operation(place.place, number))  # noqa: B023
        place.disturb((-signal.SIGKILL,), lambda: die_at_operation(place.place, max(1, number - 3)), restart=False)  # noqa: B023
    tally(place.points, "kills at file operations")


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_a_full_or_failing_disk(place: Place, tally: Callable) -> None:
    """20 offsets, and every file operation; without a traceback, and the old directory is untouched."""
    random, files = random_of("export room", *place.new), sorted(place.new)
    for number in range(scaled(2, 20)):
        file = files[number % len(files)]
        limit = random.randrange(len(place.new[file]))
        place.disturb((REFUSED,), lambda: no_room_at_byte(place.place, file, limit))  # noqa: B023
    total = len(place.operations.read_text().splitlines())
    for number in spread(total, scaled(3, 60)):
        code = random.choice([errno.ENOSPC, errno.EROFS, errno.EIO])
        place.disturb((REFUSED,), lambda: fail_at_operation(place.place, number, code))  # noqa: B023
    tally(place.points, "full or failing disks")
