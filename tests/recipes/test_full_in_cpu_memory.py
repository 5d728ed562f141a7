"""model.offload=[weights]: the very same run with weights, gradients and moments in CPU memory.

Without a GPU the device that computes is the CPU too, and nothing could show what is left on the wrong side. So the mesh
says that it is of GPUs here (`of_gpus`): whatever would put a part of a weight there fails, as no GPU is found.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import problems, run_processes
from test_full_finetune_distributed import dcp_tensors, dying_run, exported, options, train
from test_full_new_tokens import CHATML
from test_lora_single_device import log_records
from tiny_training import assert_same
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from torchft import adapter, distributed, generate
from torchft.config import ModelConfig, OptimConfig, RunConfig
from torchft.errors import ConfigError
from torchft.modules.sharding import compute_device, on_mesh
from torchft.recipes import full_finetune_distributed as recipe
from torchft.weights import load_weights

OFFLOADED = "model.offload=[weights]"


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def of_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on the mesh calls itself cuda, over gloo, and FSDP2 computes on the CPU. Returns who asks where that is."""
    asked: list[str] = []
    init, handle = distributed.init_device_mesh, SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 8)
    monkeypatch.setattr(device_mesh, "_get_device_handle", lambda kind: handle)
    monkeypatch.setattr(distributed, "init_device_mesh", lambda _, *more, **names: init("cuda", *more, **names))
    monkeypatch.setattr(_fully_shard, "_get_device_from_mesh", lambda mesh: torch.device("cpu"))
    for module in (adapter, generate):
        answer = lambda tensor, name=module.__name__: asked.append(name) or torch.device("cpu")  # noqa: E731
        monkeypatch.setattr(module, "compute_device", answer)
    return asked


def same_run(ours: Path, theirs: Path) -> None:
    assert log_records(ours) == log_records(theirs)
    assert_same(exported(ours), exported(theirs))
    assert_same(dcp_tensors(ours / "step_000004"), dcp_tensors(theirs / "step_000004"))


VARIANTS = {
    "one process": (1, ["model.dtype=float32"]),
    "two, computing in bf16": (2, ["model.dtype=bfloat16", "run.micro_batch_size=1", *CHATML]),  # tables of uneven parts
    "two copies, recomputed": (4, ["model.shard=2", "model.activation_checkpointing=full"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_as_on_the_device(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Steps, clipping, validation, answers, checkpoints in parts, and the result."""
    processes, more = VARIANTS[variant]
    expected = train(processes, small_model, chat_data, tmp_path / "device", "optim.max_grad_norm=0.1", *more)
    of_gpus(monkeypatch)
    same_run(train(processes, small_model, chat_data, tmp_path / "host", "optim.max_grad_norm=0.1", *more, OFFLOADED), expected)


def test_a_run_goes_on_where_its_weights_move(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun on the device, killed after step 2, and continued in CPU memory, bit for bit; then the best step is read back."""
    more = ("run.save_every=2", "run.resume=auto", "run.eval_every=1", "run.keep_best=true")
    straight = train(2, small_model, chat_data, tmp_path / "straight", *more)
    cfg = options(small_model, chat_data, tmp_path / "moved", *more)
    assert run_processes(2, lambda _: dying_run(cfg, 4), tmp_path / "moved") == [9, 9]
    of_gpus(monkeypatch)
    same_run(train(2, small_model, chat_data, tmp_path / "moved", *more, OFFLOADED), straight)


def test_everything_lies_in_cpu_memory(
    small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and moments, on one process too; nobody takes where a weight lies for where it computes."""
    asked = of_gpus(monkeypatch)
    cfg, original, devices = options(small_model, chat_data, tmp_path, OFFLOADED, "run.max_steps=1"), recipe.step_optimizer, []

    def spy(optimizer: torch.optim.Optimizer, *more: torch.Tensor) -> None:
        original(optimizer, *more)
        for param, state in optimizer.state.items():
            assert isinstance(param, DTensor) and compute_device(param).type == "cuda"
            assert {tensor.device.type for tensor in (param, param.grad, *state.values(), *more)} == {"cpu"}
        assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups) > 10

    def load(*args: object, device: torch.device, **options: object) -> object:
        devices.append(device)
        return load_weights(*args, device=device, **options)

    def work(_: int) -> None:
        monkeypatch.setattr(recipe, "step_optimizer", spy)
        monkeypatch.setattr(recipe, "load_weights", load)
        monkeypatch.setattr(recipe, "setup_device", lambda *_: torch.device("cpu", 0))  # another one than where weights go
        recipe.main(cfg)
        assert [str(device) for device in devices] == ["cpu"] and set(asked) == {"torchft.adapter", "torchft.generate"}

    assert run_processes(1, work, tmp_path) == [0], problems(tmp_path)


def test_a_part_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DTensor.from_local moves it to the mesh's device, which a GPU's memory would not hold."""
    of_gpus(monkeypatch)

    def work(_: int) -> None:
        torch.distributed.init_process_group("gloo")
        mesh = distributed.init_device_mesh("cuda", (2,), mesh_dim_names=("shard",))
        everything, rows = torch.arange(10.0).view(5, 2), slice(0, 3) if mesh.get_rank() == 0 else slice(3, 5)
        whole = on_mesh(everything[rows], mesh, [Shard(0)], shape=everything.shape, stride=everything.stride())
        assert whole.device.type == "cpu" and compute_device(whole).type == "cuda"
        assert torch.equal(whole.full_tensor(), everything)
        assert on_mesh(torch.tensor(2.0), mesh, [Partial()]).full_tensor() == 4.0
        torch.distributed.destroy_process_group()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)


@pytest.mark.parametrize(
    "gpus, offload, backend", [(True, ["weights"], "cpu:gloo,cuda:nccl"), (True, [], "nccl"), (False, ["weights"], "gloo")]
)
def test_tensors_in_cpu_memory_have_a_backend(
    gpus: bool, offload: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the mesh is of GPUs, NCCL alone could not gather them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    asked = []

    def stop(backend: str, **options: object) -> None:
        asked.append(backend)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", stop)
    with pytest.raises(InterruptedError):
        distributed.join_processes(ModelConfig(offload=offload), OptimConfig(), RunConfig())
    assert asked == [backend]


@pytest.mark.parametrize(
    "more, message",
    [
        (["optim.name=adamw_8bit"], "optim.name is adamw_8bit, and the optimizer works in CPU memory"),
        (["optim.name=adamw_bf16", "model.dtype=bfloat16"], "its rounding is a kernel for GPUs, and takes 300 times as long"),
        (["optim.in_backward=true", "optim.max_grad_norm=0", "run.micro_batch_size=8"], "in_backward and model.offload cannot go"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    small_model: Path, chat_data: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        options(small_model, chat_data, tmp_path, OFFLOADED, *more)
