"""Dividing a model over processes: who holds which rows, how much memory that takes, and that the model stays what it is."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import problems, run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from torchft.checks import KERNELS
from torchft.fuse import swap
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.lora import LoraSpec, add_lora, init_lora
from torchft.modules.nf4 import NF4Tensor, quantize_nf4, storage
from torchft.modules.rope import RopeConfig
from torchft.modules.sharding import ShardReport, cut, gathered, local, place, rows_held, shard_model, whole
from torchft.modules.transformer import CausalLM, TransformerConfig

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
CONFIG = TransformerConfig(
    vocab_size=61,
    num_hidden_layers=2,
    rms_norm_eps=1e-5,
    rope=RopeConfig(64),
    max_position_embeddings=64,
    tie_word_embeddings=False,
    **SIZES,
)


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def nf4_model() -> CausalLM:
    model = CausalLM(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    add_lora(model, LoraSpec(rank=4, alpha=12))
    quantize_nf4(model)
    init_lora(model, torch.Generator().manual_seed(1))
    return model


def loss_of(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(40).view(1, 40) % 61
    return model(ids, labels=ids.roll(-1))


@pytest.mark.parametrize("processes, fused", [(2, False), (4, False), (2, True)])
def test_nf4_parts_are_bitwise_parts_and_take_their_share_of_memory(tmp_path: Path, processes: int, fused: bool) -> None:
    alone = nf4_model()
    expected = loss_of(alone)
    expected.backward()

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model, values = nf4_model(), {}
        for name, module in model.named_modules():  # on meta again, as a recipe has it; the whole values aside
            for leaf, param in list(module.named_parameters(recurse=False)):
                values[f"{name}.{leaf}"] = param.detach()
        with torch.device("meta"):
            empty = CausalLM(CONFIG)
        add_lora(empty, LoraSpec(rank=4, alpha=12))
        quantize_nf4(empty)
        if fused:
            swap(empty, tuple(name for name in KERNELS if name != "lora"))
            apply_activation_checkpointing(empty, "every_2")
        report = shard_model(empty, init_device_mesh("cpu", (processes,)))
        assert not report.kept_whole
        for name, value in values.items():
            module, _, leaf = name.rpartition(".")
            place(empty.get_submodule(module), leaf, value)
        divided = 0
        for name, param in empty.named_parameters():
            part = local(param)
            assert isinstance(param, DTensor)
            if isinstance(part, NF4Tensor):
                divided += 1
                codes, *_ = storage(part)
                assert torch.equal(codes, values[name].quantized_data.chunk(processes)[rank])
                assert codes.untyped_storage().nbytes() == values[name].quantized_data.nbytes // processes, name
            else:
                assert torch.equal(whole(param), values[name])
        assert divided == 14
        loss = loss_of(empty)
        loss.backward()
        assert abs(loss.item() - expected.item()) < 1e-4
        for (name, param), twin in zip(empty.named_parameters(), alone.parameters(), strict=True):
            if param.requires_grad:  # each process had the same tokens: FSDP2's mean is the gradient of one
                torch.testing.assert_close(whole(param.grad), twin.grad, rtol=1e-4, atol=1e-5, msg=name)
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(processes, work, tmp_path) == [0] * processes, problems(tmp_path)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_rows_are_dealt_as_fsdp2_deals_them(tmp_path: Path, processes: int) -> None:
    """Fewer rows than processes, uneven rows, even rows; empty parts too."""

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (processes,))
        for rows in (1, 2, 3, 5, 8, 13):
            value = torch.arange(rows * 6.0).view(rows, 6)
            linear = nn.Linear(6, rows, bias=False)
            linear.weight = nn.Parameter(value.clone())
            fully_shard(linear, mesh=mesh)
            held = rows_held(linear.weight)
            assert torch.equal(local(linear.weight), value[held])
            assert torch.equal(local(cut(value, linear.weight)), value[held])
            assert torch.equal(whole(cut(value, linear.weight)), value)
            everything = gathered(linear.weight.detach())
            assert torch.equal(everything, value) if rank == 0 else everything.numel() == 0
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(processes, work, tmp_path) == [0] * processes, problems(tmp_path)


def test_an_ordinary_tensor_is_all_held_here() -> None:
    value = torch.arange(12.0).view(3, 4)
    assert rows_held(value) == slice(0, 3)
    assert local(value) is value and whole(value) is value and cut(value, value) is value and gathered(value) is value


def test_the_tables_are_gathered_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block for its forward and for its backward; what lies around them stays from one to the other, and no longer."""
    original = _fsdp_param_group.foreach_all_gather

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        calls = []
        monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", lambda *args: calls.append(1) or original(*args))
        model = CausalLM(CONFIG)
        model.init_weights(torch.Generator().manual_seed(0))
        shard_model(model, init_device_mesh("cpu", (2,)))
        for _ in range(2):
            loss_of(model).backward()
            assert all(isinstance(param, DTensor) for param in model.parameters())
        assert len(calls) == 2 * (2 * CONFIG.num_hidden_layers + 1)
        dist.destroy_process_group()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)


def test_the_report_says_how_many_hold_what():
    assert str(ShardReport(2, 2, 38, ())) == "38 tensors divided over 2 processes, 2 copies"
    assert str(ShardReport(1, 2, 38, ())) == "38 tensors whole on each of 2 processes"
