"""Offloading and `auto` on a GPU: gradients as without, copies in time and late, memory as low as it is meant to be.

The same logic with copies as late as they can be, and without a GPU: test_offload.py, tests/test_activations.py.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # tests/

from test_activations import Log  # noqa: E402
from test_fuse import adapted  # noqa: E402
from test_fuse_fp8 import in_fp8  # noqa: E402

from torchft import activations  # noqa: E402
from torchft.activations import MEASURED_STEPS, ActivationMemory  # noqa: E402
from torchft.config import DataConfig, ModelConfig, RunConfig  # noqa: E402
from torchft.fuse import swap  # noqa: E402
from torchft.modules.checkpointing import apply_activation_checkpointing, recompute_blocks  # noqa: E402
from torchft.modules.lora import trainable_parameters  # noqa: E402
from torchft.modules.offload import Link, Traffic  # noqa: E402
from torchft.modules.rope import RopeConfig  # noqa: E402
from torchft.modules.transformer import CausalLM  # noqa: E402


class SlowLink(Link):
    """Some ms before each round of copies: they are late, while the host and the computing stream run ahead."""

    cycles = 20_000_000

    def send(self, copies: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(self.cycles)
        return super().send(copies)


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
LARGE |= {"rope": RopeConfig(128), "max_position_embeddings": 4096, "num_hidden_layers": 8}
LARGE_MODELS: dict[str, Callable[[], CausalLM]] = {
    "llama": lambda: adapted(dtype=torch.bfloat16, **LARGE),
    "qk_norm": lambda: adapted(dtype=torch.bfloat16, qk_norm=True, **LARGE),
    "nf4": lambda: adapted(dtype=torch.bfloat16, nf4=True, **LARGE),
    "fp8": lambda: in_fp8(dtype=torch.bfloat16, **LARGE),
}


def large_model(variant: str) -> CausalLM:
    """Fused, on the GPU, and laid as it stays: not among what tests before it left in the allocator's cache, whose rest nobody could use."""
    torch.cuda.empty_cache()
    model = LARGE_MODELS[variant]().cuda()
    assert swap(model, ()).blocks == 8
    large_step(model, "whole")
    return model


def large_step(model: CausalLM, rows: str) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and the bytes that the step took at most."""
    model.zero_grad()
    ids = torch.randint(61, (2, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    documents = torch.arange(2048, device="cuda")[None].expand(2, -1) // 700 if rows == "packed" else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(ids, documents=documents, labels=ids.roll(-1, 1))
    loss.backward()
    torch.cuda.synchronize()
    grads = [param.grad for param in trainable_parameters(model).values()]
    return loss.item(), grads, torch.cuda.max_memory_allocated() - before


@contextmanager
def fixed_order() -> Iterator[None]:
    """Attention's backward adds in one order, which by itself it does not: no bit may differ."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Attention's backward adds in no fixed order on a GPU, and nothing else may differ."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("variant", LARGE_MODELS)
def test_gradients_on_cuda_with_copies_in_time_and_late(variant: str, rows: str, late: bool) -> None:
    """In FP8 to the bit, with attention in a fixed order: of a last bit of its gradients e4m3's ties make percents, 8 blocks on.

    (Those of whole rows: 2% on an H200, where bf16 stays below 1%. FlexAttention, of packed ones, has an order.)
    """
    torch._dynamo.reset()  # the ninth form of one function would run uncompiled
    model, exact = large_model(variant), variant == "fp8" and rows == "whole"
    device = torch.device("cuda", torch.cuda.current_device())
    with fixed_order() if exact else nullcontext():
        loss, expected, without = large_step(model, rows)
        expected = [grad.clone() for grad in expected]
        apply_activation_checkpointing(model, "full", offload=True)
        traffic = model.model.checkpointing.traffic = Traffic(device, SlowLink(device) if late else None)
        for _ in range(3):  # buffers are pinned in the first, and used again at once in the others
            found_loss, found, taken = large_step(model, rows)
            assert found_loss == (loss if exact else pytest.approx(loss, rel=1e-3))
            assert_close(found, expected)
            assert not exact or all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    whole, block = 2 * 2048 * 1024 * 2, 2 * 2048 * (1024 * 4 + 2 * 512 + 2 * 4096) * 2  # h; all that one block keeps
    assert traffic.sent >= 3 * 7 * 3 * whole  # h, delta, q, the attention's output, and more, of 7 blocks
    assert all(buffer.is_pinned() for buffer in traffic.memory.buffers())
    assert taken < without - 3 * block  # of 8; late or not: the computing stream waits, memory does not grow


@pytest.mark.gpu
def test_pinned_memory_is_made_once_and_nothing_stays_on_the_device() -> None:
    model = large_model("llama")
    apply_activation_checkpointing(model, "full", offload=True)
    large_step(model, "whole")
    buffers = {buffer.data_ptr() for buffer in model.model.checkpointing.traffic.memory.buffers()}
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        large_step(model, "whole")
    assert {buffer.data_ptr() for buffer in model.model.checkpointing.traffic.memory.buffers()} == buffers
    model.zero_grad()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_plain_blocks_on_cuda_send_their_inputs() -> None:
    model = adapted(dtype=torch.bfloat16, **LARGE).cuda()
    loss, expected, without = large_step(model, "whole")
    expected = [grad.clone() for grad in expected]
    apply_activation_checkpointing(model, "full", offload=True)
    found_loss, found, taken = large_step(model, "whole")
    assert found_loss == pytest.approx(loss, rel=1e-3) and taken < without / 2
    assert_close(found, expected)
    assert model.model.checkpointing.bytes_offloaded == 7 * 2 * 2048 * 1024 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_auto_fills_what_the_process_may_have_and_no_more(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for three and a half blocks more than the one that was measured with: four of eight keep everything."""
    monkeypatch.setattr(activations, "MARGIN", 0.3)  # gaps between blocks of so small a model are large
    model, log = large_model("llama"), Log()
    loss, expected, _ = large_step(model, "whole")
    expected = [grad.clone() for grad in expected]
    device = torch.device("cuda", torch.cuda.current_device())
    cfg = ModelConfig(activation_checkpointing="auto", offload=["activations"] * offload)
    run = RunConfig(global_batch_size=2, micro_batch_size=2)
    found = ActivationMemory(model, cfg, DataConfig(max_seq_len=2048), run, device, log)
    probe = model.model.checkpointing.probe
    try:
        for step in range(1, MEASURED_STEPS + 1):
            large_step(model, "whole")
            model.zero_grad()
            if step == MEASURED_STEPS:
                taken = probe.num_bytes - (0 if offload else probe.input_bytes)
                usable = torch.cuda.max_memory_allocated() + 3.5 * taken
                torch.cuda.empty_cache()
                total = torch.cuda.mem_get_info()[1]
                torch.cuda.set_per_process_memory_fraction(usable / 0.7 / total)
            found.step()
        assert "4 of 8 blocks are recomputed" in log.lines[-1], log.lines
        for _ in range(2):
            found_loss, grads, _ = large_step(model, "whole")
            assert found_loss == pytest.approx(loss, rel=1e-3)
            assert_close(grads, expected)
        assert usable - 2 * taken < torch.cuda.max_memory_allocated() <= usable
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", LARGE_MODELS)
def test_a_probe_counts_what_a_block_takes_on_cuda(variant: str) -> None:
    """Against the allocator: what stays allocated behind a forward, with one block more."""
    model, held = large_model(variant), []
    ids = torch.randint(61, (2, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    found = ActivationMemory(
        model,
        ModelConfig(activation_checkpointing="auto"),
        DataConfig(max_seq_len=2048),
        RunConfig(global_batch_size=2, micro_batch_size=2),
        torch.device("cuda", torch.cuda.current_device()),
        Log(),
    )
    probe = model.model.checkpointing.probe
    for blocks in (range(8), range(7)):
        recompute_blocks(model, blocks, offload=False)
        model.model.checkpointing.probe = probe if len(blocks) == 7 else None
        before = torch.cuda.memory_allocated()
        loss = model(ids, labels=ids)
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        model.zero_grad()
        del loss
    assert found is not None
    assert probe.num_bytes - probe.input_bytes == pytest.approx(held[1] - held[0], rel=0.03)
