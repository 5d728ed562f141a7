"""8-bit AdamW with its states divided over processes: one curve, what a checkpoint holds, resume at any number of them.

torch.compile is left out of all but one test: torchao's update is the same op by op.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import problems, run_processes
from safetensors.torch import load_file
from test_lora_distributed import BASE
from test_lora_single_device import log_records, options
from tiny_training import hide_cuda
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft.checkpoint import load_checkpoint, save_checkpoint
from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.distributed import join_processes, leave_processes
from torchft.errors import ConfigError
from torchft.modules.compiler import missing_compiler
from torchft.modules.sharding import local
from torchft.optim import blocks_fit, build_optimizer, clip_and_check, set_lr, step_optimizer
from torchft.parts import PartsWriter, load_parts
from torchft.ranks import rank, world_size
from torchft.recipes import lora_distributed, lora_single_device

needs_compiler = pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="8-bit AdamW needs a C compiler")
pytestmark = needs_compiler
# The states of these are in 8 bits (True) or fp32 on 1, 2 and 4 processes.
IN_8BIT = {
    "0.weight": (True, True, True),  # 90 x 256: a row is a block; 23, 23, 23 and 21 rows on 4
    "1.weight": (True, True, False),  # 256 x 90: equal parts, of whole blocks on 2
    "2.weight": (True, True, True),  # 96 x 256
    "3.weight": (True, False, False),  # 104 x 96: 19.5 blocks in a half
    "4.weight": (False, False, False),  # 104: a norm
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


class Run:
    """A small model on all processes that there are, each with the same batches."""

    def __init__(self, name: str = "adamw_8bit", seed: int = 0) -> None:
        torch.manual_seed(seed)
        sizes = ((256, 90), (90, 256), (256, 96), (96, 104))
        self.model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes), nn.RMSNorm(104))
        if distributed.is_initialized():
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size(),)))
        self.params = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.params, OptimConfig(name=name))
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> "Run":
        for step in range(first, last):
            batch = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
            loss = (self.model(batch) - batch[:, :104]).square().mean()
            loss.backward()
            _, found_inf = clip_and_check(self.params, 1.0, loss)
            set_lr(self.optimizer, 2e-3)
            step_optimizer(self.optimizer, found_inf)
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def save(self, out: Path, step: int) -> Path:
        state = {"state": {}, "config": {"optim": {"name": "adamw_8bit"}}, "keep_last": 9}
        return save_checkpoint(out, step, params=self.params, optimizer=self.optimizer, **state)

    def load(self, path: Path) -> "Run":
        load_checkpoint(path, params=self.params, optimizer=self.optimizer, unchanged={})
        return self


def on(processes: int, work: Callable[[], Any], folder: Path, divided: bool = False) -> Any:
    """What `work()` gives on the first of so many processes; on 1, this one, nothing is divided unless `divided`."""
    if processes == 1 and not divided:
        return work()

    def joined(number: int) -> None:
        join_processes(ModelConfig(), OptimConfig(), RunConfig())
        result = work()
        leave_processes()
        if number == 0:
            torch.save(result, folder / "result.pt")

    codes = run_processes(processes, joined, folder)
    assert codes == [0] * processes, problems(folder)
    return torch.load(folder / "result.pt", weights_only=False)


def file_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "optimizer.safetensors")


@pytest.fixture(scope="module")
def at_step_3(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A checkpoint after 3 steps on 1, 2 and 4 processes."""
    with pytest.MonkeyPatch.context() as patch:
        hide_cuda(patch)
        patch.setattr(torch, "compile", lambda function, **options: function)
        folder = tmp_path_factory.mktemp("saved")
        return {n: on(n, lambda: Run().train(0, 3).save(folder / f"{n}", 3), folder / f"on{n}") for n in (1, 2, 4)}  # noqa: B023


def test_one_curve_on_1_2_and_4_processes(tmp_path: Path) -> None:
    """Apart by less than a quarter of what 8 bits change: some states are in 8 bits on fewer processes alone."""
    curves = {n: on(n, lambda: Run().train(0, 12).losses, tmp_path / f"{n}") for n in (1, 2, 4)}
    in_fp32 = Run("adamw").train(0, 12).losses
    noise = max(abs(one - other) for one, other in zip(curves[1], in_fp32, strict=True))
    assert curves[1][-1] < 0.9 * curves[1][0] and noise > 0
    for n in (2, 4):
        assert curves[n][:2] == pytest.approx(curves[1][:2], rel=1e-5)  # the first update starts from zeros
        assert max(abs(one - other) for one, other in zip(curves[n], curves[1], strict=True)) <= noise


def test_which_states_are_in_8_bits(at_step_3: dict[int, Path]) -> None:
    for column, path in enumerate(at_step_3.values()):
        saved = file_of(path)
        for name, kinds in IN_8BIT.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                assert (f"{name}/{moment}/codes" in saved) == kinds[column]
                assert (f"{name}/{moment}" in saved) != kinds[column]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_number_of_processes_continues_bit_for_bit(
    processes: int, at_step_3: dict[int, Path], tmp_path: Path
) -> None:
    straight = on(processes, lambda: Run().train(0, 6).save(tmp_path / "straight", 6), tmp_path / "a")
    work = lambda: Run(seed=9).load(at_step_3[processes]).train(3, 6).save(tmp_path / "resumed", 6)  # noqa: E731
    resumed = on(processes, work, tmp_path / "b")
    for name in ("params.safetensors", "optimizer.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize("before, after", [(1, 4), (2, 1), (2, 4), (4, 2)])
def test_another_number_of_processes_reads_the_same_states(
    before: int, after: int, at_step_3: dict[int, Path], tmp_path: Path
) -> None:
    """Codes and scales are kept, or decoded exactly; what was fp32 and is now in 8 bits is off by a step of their table."""
    then = file_of(at_step_3[before])
    now = file_of(on(after, lambda: Run(seed=9).load(at_step_3[before]).save(tmp_path / "out", 3), tmp_path / "p"))
    columns = {1: 0, 2: 1, 4: 2}
    for name, kinds in IN_8BIT.items():
        was, is_now = kinds[columns[before]], kinds[columns[after]]
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"{name}/{moment}"
            if was and is_now:
                assert torch.equal(now[f"{key}/codes"], then[f"{key}/codes"]), key
                assert torch.equal(now[f"{key}/scale"].flatten(), then[f"{key}/scale"].flatten()), key
                continue
            one, other = decoded(then, key), decoded(now, key)
            if is_now:  # steps of the table are at most 2 * 0.9 / 64 of a block's largest value (0.1 .. 1 in 64 steps)
                blocks = one.view(-1, 256)
                assert ((other.view(-1, 256) - blocks).abs() <= 0.015 * blocks.abs().amax(1, keepdim=True)).all(), key
            else:
                assert torch.equal(one, other), key


def decoded(saved: dict[str, Tensor], key: str) -> Tensor:
    if key in saved:
        return saved[key]
    codes, scale = saved[f"{key}/codes"], saved[f"{key}/scale"].flatten()
    return (saved[f"{key}/qmap"][codes.int()].view(-1, 256) * scale[:, None]).view(codes.shape)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 2), (2, 1)])
def test_checkpoints_in_parts_hold_them_too(before: int, after: int, at_step_3: dict[int, Path], tmp_path: Path) -> None:
    """As the full recipe writes them: loaded, they give what a whole checkpoint of the same run gives there."""

    def write() -> None:
        run, writer = Run().train(0, 3), PartsWriter(tmp_path / "parts")
        writer.save(3, params=run.params, optimizer=run.optimizer, state={}, config={}, keep_last=9)
        writer.wait()

    def read() -> Path:
        run = Run(seed=9)
        load_parts(tmp_path / "parts/step_000003", params=run.params, optimizer=run.optimizer, unchanged={})
        return run.save(tmp_path / "from_parts", 3)

    on(before, write, tmp_path / "write", divided=True)
    got = file_of(on(after, read, tmp_path / "read", divided=True))
    work = lambda: Run(seed=9).load(at_step_3[before]).save(tmp_path / "whole", 3)  # noqa: E731
    expected = file_of(on(after, work, tmp_path / "other", divided=True))
    assert got.keys() == expected.keys() and any(name.endswith("/codes") for name in got)
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_non_finite_step_is_skipped_on_all(tmp_path: Path) -> None:
    def work() -> tuple[dict, dict]:
        run = Run().train(0, 1)
        before = {name: param.detach().clone() for name, param in run.params.items()}
        loss = run.model(torch.randn(8, 256)).square().mean()
        loss.backward()
        if rank() == 1:
            local(run.params["1.weight"].grad)[0, 0] = math.nan
        step_optimizer(run.optimizer, clip_and_check(run.params, 1.0, loss)[1])
        steps = {run.optimizer.state[param]["step"].item() for param in run.params.values()}
        same = all(torch.equal(local(param), local(before[name])) for name, param in run.params.items())
        assert same and steps == {1.0}
        return same, steps

    assert on(2, work, tmp_path) == (True, {1.0})


def test_torchaos_compiled_update_takes_divided_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of one shape on one process, which is divided too, since each compilation takes seconds."""
    plain = torch.compile
    monkeypatch.undo()
    hide_cuda(monkeypatch)
    compiled = torch.compile
    assert compiled is not plain

    def work() -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 64, bias=False))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        params = dict(model.named_parameters())
        results = []
        for function in (compiled, plain):
            torch.compile = function
            with torch.no_grad():
                local(params["0.weight"]).fill_(0.5)
            optimizer = build_optimizer(params, OptimConfig(name="adamw_8bit", lr=1e-2))
            for step in range(3):
                model(torch.randn(4, 256, generator=torch.Generator().manual_seed(step))).square().mean().backward()
                step_optimizer(optimizer, torch.zeros(()))
                optimizer.zero_grad()
            results.append(params["0.weight"].detach().full_tensor().clone())
        return torch.stack(results)

    with_compiler, without = on(1, work, tmp_path, divided=True)
    assert (with_compiler - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(with_compiler, without, rtol=0, atol=1e-4)  # a code may fall to the other side


@pytest.mark.parametrize("shard", ["all", "1"])
def test_lora_trains_and_continues_with_it(small_model: Path, chat_data: Path, tmp_path: Path, shard: str) -> None:
    more = (*BASE, "optim.name=adamw_8bit", "lora.rank=64")
    lora_single_device.main(options(small_model, chat_data, tmp_path / "one", *more))
    for out, steps in (("straight", (4,)), ("stopped", (2, 4))):
        for last in steps:
            more_still = (f"run.max_steps={last}", "run.resume=auto", "optim.schedule=constant", f"model.shard={shard}")
            cfg = options(small_model, chat_data, tmp_path / out, *more, *more_still)
            codes = run_processes(2, lambda _: lora_distributed.main(cfg), tmp_path / out)  # noqa: B023
            assert codes == [0, 0], problems(tmp_path / out)
    files = [tmp_path / out / "step_000004/optimizer.safetensors" for out in ("straight", "stopped")]
    assert any(name.endswith("/codes") for name in load_file(files[0])) and files[0].read_bytes() == files[1].read_bytes()
    assert log_records(tmp_path / "straight")[1] == pytest.approx(log_records(tmp_path / "one")[1], rel=1e-3)


def test_what_needs_one_process_is_refused_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="optim.in_backward=true works on one process, and --nproc_per_node .* make 2"):
        join_processes(ModelConfig(), OptimConfig(in_backward=True), RunConfig())


def test_whole_blocks_by_hand() -> None:
    shapes = {(16, 256): True, (15, 256): False, (4096,): True, (4095,): False, (100, 41): False, (0, 256): False}
    for shape, fits in shapes.items():
        assert blocks_fit(torch.empty(shape)) == fits, shape
