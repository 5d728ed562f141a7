"""A mixture of experts on two processes: streamed in part by part, the loss and gradients of one, NF4 codes bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import problems, run_processes
from small_models import gpt_oss, qwen3_moe
from tiny_models import on_meta, sample_ids
from tiny_training import hide_cuda
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from torchft.adapter import save_adapter, verify_adapter
from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.nf4 import NF4Tensor, quantize_nf4, storage
from torchft.modules.sharding import local, shard_model, whole
from torchft.modules.transformer import CausalLM
from torchft.stored import Piece
from torchft.weights import load_weights

SIZES = {"vocab_size": 97, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
SPEC = LoraSpec(4, 10.0)


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, so that two processes hold one and a half each."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("moe") / "base"
    hf = qwen3_moe(**SIZES, moe_intermediate_size=256, num_experts=3)
    if request.param == "gpt-oss":
        hf = gpt_oss(**SIZES | {"intermediate_size": 256}, num_local_experts=3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), dtype=torch.float32)
    for name, param in model.named_parameters():
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.5 if "embed" in name else 0.08)
    model.save_pretrained(path)
    return path


def build(base: Path, kind: str, processes: int = 1) -> CausalLM:
    model = on_meta(base)
    if kind != "full":
        add_lora(model, SPEC)
    if kind == "nf4":
        quantize_nf4(model)
    if processes > 1:
        shard_model(model, init_device_mesh("cpu", (processes,)))
    load_weights(model, base, device="cpu", dtype=torch.float32)
    init_lora(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:  # the same numbers on any number of processes
                param.copy_((param * 0 + 1) * 0.01)
    return model


def loss_of(model: CausalLM) -> torch.Tensor:
    ids = sample_ids(tokens=20)
    return model(ids, labels=ids.roll(-1, 1))


@pytest.mark.parametrize(
    "base, kind", [("qwen3-moe", "full"), ("qwen3-moe", "lora"), ("qwen3-moe", "nf4"), ("gpt-oss", "full"), ("gpt-oss", "nf4")],
    indirect=["base"],
)  # fmt: skip
def test_two_processes_are_one(base, kind, tmp_path, monkeypatch):
    hide_cuda(monkeypatch)
    alone = build(base, kind)
    expected = loss_of(alone)
    expected.backward()

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = build(base, kind, 2)
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor) or (kind == "nf4" and "self_attn" in name), name  # too small to be cut
            twin, part = alone.get_parameter(name).data, local(param)
            if isinstance(part, NF4Tensor) and not isinstance(param, DTensor):
                assert torch.equal(storage(part)[0], storage(twin)[0])
            elif isinstance(part, NF4Tensor):
                codes, scalers = storage(part)[:2]
                assert torch.equal(codes, storage(twin)[0].chunk(2)[rank]) and torch.equal(scalers, storage(twin)[1].chunk(2)[rank])
            else:
                assert torch.equal(whole(param), twin), name
        loss = loss_of(model)
        loss.backward()
        assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
        for name, param in trainable_parameters(model).items():
            grad = alone.get_parameter(name).grad
            assert (whole(param.grad) - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name
        if kind != "full":
            save_adapter(model, SPEC, tmp_path / "adapter", base_path=str(base))
            dist.barrier()
            assert verify_adapter(model, SPEC, tmp_path / "adapter").num_tensors == len(trainable_parameters(model))
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(2, work, tmp_path / "ranks") == [0, 0], problems(tmp_path / "ranks")
    if kind != "full":
        assert verify_adapter(alone, SPEC, tmp_path / "adapter").max_difference < 1e-4


def test_a_process_reads_only_its_rows_of_an_expert():
    expert = Piece("experts.2.up_proj.weight", 20, 30, (10, 3))  # rows 20 .. 30 of the stack
    stored = torch.arange(30.0).view(10, 3)
    for start, stop in ((0, 60), (0, 25), (25, 27), (27, 60), (0, 20), (30, 60), (0, 7)):
        inside = [row - 20 for row in range(start, stop) if 20 <= row < 30]
        held = expert.rows_of(stored, start, stop)
        assert torch.equal(held, stored[inside])
        assert held.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()  # a view: nothing else is read
    assert torch.equal(expert.cut(torch.arange(180.0).view(60, 3)), torch.arange(60.0, 90.0).view(10, 3))


def test_a_process_reads_only_its_experts_of_a_stack():
    """(E, in, out) in the files; some rows of it, the borders within experts."""
    rows = torch.arange(180.0).view(60, 3)
    stack = Piece("experts.up_proj", 0, 60, (6, 3, 10), "transposed", 6)
    stored, taken = stack.cut(rows), []
    assert stored.shape == (6, 3, 10) and torch.equal(stored[2], rows[20:30].T)

    class Watched:
        def __getitem__(self, experts: slice) -> torch.Tensor:
            taken.append((experts.start, experts.stop))
            return stored[experts]

    for start, stop in ((0, 60), (0, 25), (25, 27), (27, 60), (30, 30), (10, 20)):
        assert torch.equal(stack.rows_of(Watched(), start, stop), rows[start:stop]), (start, stop)
    assert taken == [(0, 6), (0, 3), (2, 3), (2, 6), (3, 3), (1, 2)]
