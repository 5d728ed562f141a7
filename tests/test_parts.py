"""Checkpoints in parts: what is staged is what is written, a failure in the background ends the run, bad ones are refused by name."""

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from divided_run import DividedRun, on_processes
from processes import problems
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft import parts
from torchft.config import OptimConfig
from torchft.modules.compiler import missing_compiler
from torchft.modules.sharding import gathered
from torchft.optim import build_optimizer, clip_and_check, step_optimizer
from torchft.optimizer_state import flatten_optimizer
from torchft.parts import PartsWriter, load_parts
from torchft.ranks import rank, world_size
from torchft.run_dir import checkpoints, verify_checkpoint

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def run_and_save(out: Path, steps: int = 1) -> None:
    run, writer = DividedRun(), PartsWriter(out)
    for step in range(1, steps + 1):
        run.step().save(writer, step)
    writer.wait()


def test_what_is_written_is_the_step_that_was_saved(tmp_path: Path) -> None:
    """K12: the steps after it, which run while it is written, do not show in it; each process has its own file."""

    def work() -> None:
        run, writer, go = DividedRun().step(), PartsWriter(tmp_path / "out"), threading.Event()
        original = writer._write_part

        def late(*args: Any) -> None:
            assert go.wait(60)
            original(*args)

        writer._write_part = late
        saved = run.tensors()
        run.save(writer, 1)
        assert not checkpoints(tmp_path / "out")
        moved = run.step().step().tensors()  # in the meantime
        go.set()
        writer.wait()
        assert any(not torch.equal(moved[name], tensor) for name, tensor in saved.items())
        assert run.load(tmp_path / "out/step_000001") == {"data": "d", "step": 1}
        loaded = run.tensors()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())

    assert on_processes(2, tmp_path, work) == [0, 0], problems(tmp_path)
    names = sorted(path.name for path in (tmp_path / "out/step_000001").glob("shard*"))
    assert names == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]


def test_it_loads_on_any_number_of_processes(tmp_path: Path) -> None:
    def save() -> None:
        run_and_save(tmp_path / "out")
        tensors = DividedRun().step().tensors()
        if rank() == 0:
            save_file(tensors, tmp_path / "whole.safetensors")

    def load() -> None:
        run = DividedRun(7)
        run.load(tmp_path / "out/step_000001")
        expected, found = load_file(tmp_path / "whole.safetensors"), run.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        after = run.step().tensors()  # the moments are in use
        assert not torch.equal(after["0.weight"], expected["0.weight"])

    assert on_processes(3, tmp_path / "3", save) == [0, 0, 0], problems(tmp_path / "3")
    for count in (1, 2, 4):
        assert on_processes(count, tmp_path / f"{count}", load) == [0] * count, problems(tmp_path / f"{count}")


def test_only_the_newest_and_whole_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "out/step_000009.tmp").mkdir(parents=True)  # of a crash

    assert on_processes(2, tmp_path, lambda: run_and_save(tmp_path / "out", 4)) == [0, 0], problems(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step_000003", "step_000004"]
    assert verify_checkpoint(tmp_path / "out/step_000004")["step"] == 4


def test_many_tensors_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no more than one of them is in memory a second time."""
    monkeypatch.setattr(parts, "FILE_BYTES", 100)
    assert on_processes(2, tmp_path, lambda: run_and_save(tmp_path / "out")) == [0, 0], problems(tmp_path)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(path).values()) for path in (tmp_path / "out/step_000001").glob("shard*")
    ]
    assert len(sizes) > 4 and max(sizes) <= 100


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """On every process, with the disk's own words; what was saved before stays."""
    original = dcp.HuggingFaceStorageWriter.write_data

    def full(self: object, plan: object, planner: object) -> object:
        if len(checkpoints(tmp_path / "out")) == 1 and rank() == failing:
            raise OSError(28, "No space left on device")
        return original(self, plan, planner)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)

    def work() -> None:
        run, writer = DividedRun().step(), PartsWriter(tmp_path / "out")
        run.save(writer, 1)
        writer.wait()
        run.step().save(writer, 2)
        writer._saving.exception()  # waits for it
        writer.check()
        os._exit(7)  # it should have been raised

    assert on_processes(2, tmp_path, work) == [1, 1]
    assert problems(tmp_path).count("UserError: could not write ") == 2  # whichever is the first to be printed
    assert f"process {failing}: [Errno 28] No space left on device" in problems(tmp_path)
    assert problems(tmp_path).count("UserError: could not write") == 2  # whichever is heard first, without a traceback
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step_000001"]
    verify_checkpoint(tmp_path / "out/step_000001")


def test_without_memory_for_a_copy_the_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "available_memory", lambda: 100)
    monkeypatch.setattr(parts, "_copied", lambda tensors: pytest.fail("copied"))

    def work() -> None:
        run, writer = DividedRun().step(), PartsWriter(tmp_path / "out")
        run.save(writer, 1)
        if rank() == 0:  # which gives it its name
            assert checkpoints(tmp_path / "out")

    assert on_processes(2, tmp_path, work) == [0, 0], problems(tmp_path)


def test_a_directory_that_not_all_processes_see_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        PartsWriter(tmp_path / f"disk of node {rank()}" / "out")

    (tmp_path / "disk of node 1/out").mkdir(parents=True)
    assert on_processes(2, tmp_path, work) == [1, 1]
    assert "is not there for process(es) 1: each writes its part" in problems(tmp_path)


def refusal(tmp_path: Path, change: Callable[[DividedRun, Path], None]) -> str:
    """What loading on one process says after `change` to the run or its checkpoint."""

    def work() -> None:
        run = DividedRun(8 if change is wider else 7)
        before = {name: param.detach().to_local().clone() for name, param in run.params.items()}
        change(run, tmp_path / "out/step_000001")
        try:
            run.load(tmp_path / "out/step_000001")
        finally:
            assert all(torch.equal(run.params[name].to_local(), tensor) for name, tensor in before.items() if name in run.params)

    assert on_processes(1, tmp_path / "save", lambda: run_and_save(tmp_path / "out")) == [0], problems(tmp_path / "save")
    assert on_processes(1, tmp_path / "load", work) == [1]
    return problems(tmp_path / "load")


def wider(run: DividedRun, path: Path) -> None:
    """The model has other shapes."""


def one_less(run: DividedRun, path: Path) -> None:
    run.params.pop("1.weight")


def other_optimizer(run: DividedRun, path: Path) -> None:
    run.optimizer = torch.optim.SGD(run.params.values())


def other_data(run: DividedRun, path: Path) -> None:
    run.load = lambda path: load_parts(path, params=run.params, optimizer=run.optimizer, unchanged={"data": "e"})


def flipped_bit(run: DividedRun, path: Path) -> None:
    file = next(path.glob("shard*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (wider, "parameter 0.weight is (7, 5) torch.float32 in the checkpoint, (8, 5) torch.float32 in this run"),
        (one_less, "parameter 1.weight is in the checkpoint but not trained now"),
        (other_optimizer, "was saved with the optimizer AdamW"),
        (other_data, "was saved with another data ('d' then, 'e' now)"),
        (flipped_bit, "is damaged: its sha256 is not the manifest's"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, change: Callable[[DividedRun, Path], None], message: str
) -> None:
    assert message in refusal(tmp_path, change)


def test_nothing_of_the_libraries_reaches_the_screen(tmp_path: Path) -> None:
    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_and_save(tmp_path / "out")
            DividedRun().load(tmp_path / "out/step_000001")
        assert dist.is_initialized()

    assert on_processes(1, tmp_path, work) == [0], problems(tmp_path)


def test_random_states_are_restored(tmp_path: Path) -> None:
    """Each process its own, where there are as many; else masks that no step so far has had."""

    def work() -> None:
        run, writer = DividedRun().step(), PartsWriter(tmp_path / "out")
        torch.manual_seed(rank())
        run.save(writer, 1)
        writer.wait()
        expected = torch.rand(3)
        torch.manual_seed(5)
        run.load(tmp_path / "out/step_000001")
        assert torch.equal(torch.rand(3), expected)

    assert on_processes(2, tmp_path, work) == [0, 0], problems(tmp_path)


@pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="8-bit AdamW needs a C compiler")
def test_8_bit_states_on_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are whole blocks on both sides, codes and scales stay what they are; here on 2, 1 and 4 processes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    class Run8(DividedRun):
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(256, 90, bias=False), nn.Linear(90, 3))
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size(),)))
            self.params = dict(self.model.named_parameters())
            self.optimizer = build_optimizer(self.params, OptimConfig(name="adamw_8bit", lr=0.1))

        def step(self) -> "Run8":
            loss = self.model(torch.ones(3, 256)).square().mean()
            loss.backward()
            step_optimizer(self.optimizer, clip_and_check(self.params, 0.0, loss)[1])
            self.optimizer.zero_grad()
            return self

        def states(self) -> dict[str, torch.Tensor]:
            tensors, _ = flatten_optimizer(self.optimizer, self.params)
            return tensors | {name: gathered(param.detach()) for name, param in self.params.items()}

    def save() -> None:
        run, writer = Run8().step().step(), PartsWriter(tmp_path / "out")
        run.save(writer, 2)
        states = run.states()
        writer.wait()
        if rank() == 0:
            assert states["0.weight/exp_avg/codes"].dtype == torch.uint8  # else this would show nothing
            save_file({name: tensor.contiguous() for name, tensor in states.items()}, tmp_path / "whole.safetensors")

    def load() -> None:
        run = Run8()
        run.load(tmp_path / "out/step_000002")
        found = run.states()
        if rank() == 0:
            expected = load_file(tmp_path / "whole.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name].flatten(), tensor.flatten()) for name, tensor in expected.items())
        run.step()

    assert on_processes(2, tmp_path / "save", save) == [0, 0], problems(tmp_path / "save")
    for count in (1, 2, 4):
        assert on_processes(count, tmp_path / f"{count}", load) == [0] * count, problems(tmp_path / f"{count}")
