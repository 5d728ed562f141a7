"""`tune check`: nothing differs as things are, and what is made wrong is named: the option, the kernel, the tensor."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import problems, run_processes

from torchft import fused_block, invariances, tune_check
from torchft.checks import KERNELS
from torchft.cli import main
from torchft.data.loader import Batch
from torchft.divided_blocks import DividedBlocks
from torchft.errors import UserError
from torchft.fuse import swap
from torchft.invariances import Subject, difference

VERDICT = "nothing differs: a step on this machine does not depend on how it is computed"


@pytest.fixture
def config(small_model: Path, chat_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """config("full", key=value, ...) -> arguments of `tune check` for the small model."""

    def write(kind: str, *overrides: str) -> list[str]:
        file = tmp_path / f"x_{kind}.yaml"
        file.write_text(f"model: {{path: {small_model}}}\ndata: {{train: {chat_data}, max_seq_len: 128}}\n")
        return [str(file), *overrides]

    return write


def table(printed: str) -> dict[str, str]:
    """Check -> what stands behind its name."""
    lines = printed.splitlines()
    rows = lines[next(number for number, line in enumerate(lines) if line.startswith("check ")) + 1 : -1]
    return {line[:24].strip(): line[24:].strip() for line in rows}


def printed_by(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What `tune check` prints, and it leaves with `code`."""
    left = 0
    try:
        main(["check", *arguments])
    except SystemExit as error:
        left = error.code
    printed = capsys.readouterr().out
    assert left == code, printed
    return printed


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, str]:
    return table(printed_by(arguments, capsys, code))


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would need two GPUs, and no kernel be skipped")


@needs_no_gpu
def test_nothing_differs_on_two_processes_either(config: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """As users call it; on a machine without a GPU the kernels are skipped with the reason."""
    printed = printed_by([*config("lora", "lora.dropout=0.2"), "--rows", "3"], capsys)
    assert printed.splitlines()[-1] == VERDICT and "exempt: lora.dropout=0.2" in printed
    found = table(printed)
    assert found["two processes"].endswith("equal") and found["kernel lora"].endswith("equal")
    assert found["kernel rope"] == "skipped: Triton needs a GPU" and found["the same again"] == "0.0e+00  equal"
    assert found["offloaded"].endswith("equal") and len(found) == 18


SMALLEST = ["model.quantize=nf4_int8_head", "model.offload=[embeddings]"]
ADDED = ["data.new_tokens=['<|a|>']"]


@pytest.mark.parametrize("kind, more", [("full", ADDED), ("qlora", SMALLEST), ("lora", ["lora.dora=true"])])
def test_nothing_differs(
    kind: str, more: list[str], config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(invariances, "_why_not_divided", lambda subject: "not here")
    found = run(config(kind, *more), capsys)
    assert {"one row at a time", "packed rows", "recomputed, full", "recomputed, auto", "offloaded"} <= {name for name, text in found.items() if text.endswith("equal")}
    if kind == "full":
        assert found["kernel lora"] == "skipped: their own weights are trained"


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out all other checks but the first, against which they are held."""
    original = tune_check.list_checks

    def few(subject: Subject) -> Iterator[invariances.Check]:
        return (one for number, one in enumerate(original(subject)) if number == 0 or one.name == name)

    monkeypatch.setattr(tune_check, "list_checks", few)


def two_processes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That check and no other, in forks, which need no seconds to start."""

    def fork(work: Callable, arguments: tuple, nprocs: int, **how: object) -> SimpleNamespace:
        assert run_processes(nprocs, lambda number: work(number, *arguments), tmp_path) == [0] * nprocs, problems(tmp_path)
        return SimpleNamespace(join=lambda: True)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", fork)
    only("two processes", monkeypatch)


@needs_no_gpu
def test_two_processes_with_a_model_each_are_checked(
    config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on GPUs that a whole model fits."""

    two_processes_alone(tmp_path, monkeypatch)
    found = run([*config("lora", "model.shard=1", "lora.modules_to_save=[lm_head]"), "--rows", "3"], capsys)
    assert len(found) == 2 and found["two processes"].endswith("equal")


@needs_no_gpu
def test_two_processes_divide_as_a_run_does(
    config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fused blocks are not FSDP2's: what goes wrong there is seen. Here without Triton."""
    plain = tuple(name for name in KERNELS if name != "lora")
    monkeypatch.setattr(invariances, "fuse", lambda model, switches, device: swap(model, plain))
    two_processes_alone(tmp_path, monkeypatch)
    arguments = [*config("lora", "model.shard=all"), "--rows", "2"]
    assert run(arguments, capsys)["two processes"].endswith("equal")
    original = DividedBlocks._fill

    def fill(self: DividedBlocks, matrix: torch.Tensor, *args: object) -> None:
        original(self, matrix, *args)
        matrix[0].mul_(1.001)

    monkeypatch.setattr(DividedBlocks, "_fill", fill)
    assert "DIFFERS: --nproc_per_node 2" in run(arguments, capsys, code=1)["two processes"]


@needs_no_gpu
def test_a_kernel_that_is_wrong_is_named(
    config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotated values 1 in 1,000 too large: nothing that a loss curve shows. In Triton's interpreter."""
    original = fused_block.rope_split

    def rope_split(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *sizes: int, eager: bool = False) -> object:
        return original(qkv * (1.0 if eager else 1.001), cos, sin, *sizes, eager=eager)

    monkeypatch.setattr(fused_block, "rope_split", rope_split)
    monkeypatch.setattr(invariances, "why_no_kernels", lambda device: "")
    names = ("kernel rope", "kernel swiglu")
    original_list = tune_check.list_checks
    monkeypatch.setattr(
        tune_check, "list_checks", lambda subject: (one for n, one in enumerate(original_list(subject)) if n == 0 or one.name in names)
    )
    found = run([*config("lora"), "--rows", "1", "--layers", "1"], capsys, code=1)
    assert "DIFFERS: model.kernels={rope: eager}, most of all in model.layers." in found["kernel rope"]
    assert found["kernel swiglu"].endswith("equal")


def test_packing_that_forgets_the_documents_is_named(
    config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Subject.batches

    def forgetful(self: Subject, groups: object, packing: bool = False) -> Iterator[Batch]:
        for batch in original(self, groups, packing):
            yield replace(batch, documents=None) if packing else batch

    monkeypatch.setattr(Subject, "batches", forgetful)
    monkeypatch.setattr(invariances, "_why_not_divided", lambda subject: "not here")
    found = run(config("lora"), capsys, code=1)
    assert [name for name, text in found.items() if "DIFFERS" in text] == ["packed rows"]
    assert "DIFFERS: data.packing=true" in found["packed rows"]


def test_a_step_that_is_not_repeated_bit_for_bit_is_named(
    config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = invariances.gradients, []

    def drifting(*args: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {name: tensor * (1 + 1e-6 * len(calls)) for name, tensor in original(*args).items()}

    monkeypatch.setattr(invariances, "gradients", drifting)
    only("the same again", monkeypatch)
    monkeypatch.setattr(tune_check, "list_checks", lambda subject, few=tune_check.list_checks: [*few(subject)] * 2)
    assert "DIFFERS: run.deterministic" in run(config("lora"), capsys, code=1)["the same again"]


def test_a_large_model_is_checked_by_its_first_layers(
    config: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("one row at a time", monkeypatch)
    main(["check", *config("lora"), "--layers", "1", "--rows", "1"])
    printed = capsys.readouterr().out
    assert "1 of 2 layers, random weights" in printed and "data:  1 row of the first step" in printed
    monkeypatch.setattr(tune_check, "available_memory", lambda: 10**6)
    main(["check", *config("lora")])
    assert "1 of 2 layers, random weights" in capsys.readouterr().out


def test_what_cannot_be_checked_is_an_error(config: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--layers", "9"], "--layers is 9, the model has 2"),
        (["--rows", "0"], "--rows is 0"),
        (["optim.lrr=1"], "optim.lrr is not an option"),
    ):
        with pytest.raises(SystemExit):
            main(["check", *config("lora"), *more])
        assert message in capsys.readouterr().err


def test_the_difference_is_relative_to_each_tensor() -> None:
    """D6: per tensor, tiny ones against the norm of all; NaN is no agreement."""
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1e-9])}
    assert difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 1e-9])}, expected) == (pytest.approx(0.1), "a")
    assert difference({"a": expected["a"], "b": torch.tensor([0.0, 5e-1])}, expected) == (pytest.approx(0.1), "b")
    small = {"a": expected["a"], "b": torch.tensor([0.0, 1e-3])}
    assert difference({"a": expected["a"], "b": torch.tensor([0.0, 2e-3])}, small) == (pytest.approx(1.0), "b")
    assert difference({"a": torch.tensor([3.0, float("nan")]), "b": expected["b"]}, expected)[0] == float("inf")
    with pytest.raises(UserError, match="all zero"):
        difference({"a": torch.zeros(2)}, {"a": torch.zeros(2)})
    assert set(KERNELS) == {"lora", "rms_norm", "rope", "swiglu", "nf4", "fp8", "cross_entropy", "embedding"}  # each but fp8 has a line


CHECK_ALONE = """
from torchft import cli, tune_check
from torchft.invariances import Check, _on_two_processes
tune_check.list_checks = lambda subject: [Check("two processes", "", lambda: _on_two_processes(subject))] * 2
cli.main(["check", "tiny/lora"])
"""


def test_an_interruption_while_the_processes_import_leaves_none_of_them(tmp_path):
    """Ctrl-C goes to all processes of a terminal. They are two, and multiprocessing's resource tracker."""
    command = [sys.executable, "-c", CHECK_ALONE]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while len(children.read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # of the seconds that torch takes
    try:
        told = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=20)
        assert (process.returncode, printed) == (130, "interrupted\n")
        assert time.monotonic() - told < 2  # and not after the imports
        assert list(tmp_path.iterdir()) == []
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left of the session
            os.killpg(process.pid, signal.SIGKILL)
