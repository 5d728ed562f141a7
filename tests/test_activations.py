"""model.activation_checkpointing=auto: how many blocks fit, driven by memories that no machine has; results stay as they are."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import problems, run_processes
from test_fuse import VARIANTS, adapted, batch, fused, gradients
from test_fuse_fp8 import in_fp8
from tiny_training import hide_cuda

from torchft import activations, distributed
from torchft.activations import MARGIN, MEASURED_STEPS, ActivationMemory, BlockSize, Memory, blocks_that_fit
from torchft.config import DataConfig, ModelConfig, RunConfig
from torchft.modules.offload import Traffic
from torchft.modules.transformer import CausalLM

GIB = 2**30
GPU = torch.device("cuda")  # by name alone


def memory(peak: float, usable: float, allocated: float = 0.0) -> Memory:
    """In GiB, without a margin. `usable` is held in part and free in part."""
    whole = int(usable * GIB)
    return Memory(int(allocated * GIB), int(peak * GIB), whole // 3, whole - whole // 3, 0)


@pytest.mark.parametrize(
    "peak, usable, fitting",
    [
        (20.0, 20.0, 1),  # the one that was measured with
        (20.0, 20.99, 1),
        (20.0, 21.01, 2),
        (20.0, 30.5, 11),
        (20.0, 51.01, 32),
        (20.0, 1000.0, 32),
        (20.0, 19.99, 0),  # it would have to be recomputed, too
        (20.0, 3.0, 0),
    ],
)
def test_as_many_blocks_fit_as_there_is_room_for(peak: float, usable: float, fitting: int) -> None:
    block = BlockSize(GIB, tokens=8192, beside=0)
    assert blocks_that_fit(memory(peak, usable), block, 8192, 32) == fitting


def test_the_margin_is_a_share_of_the_gpu() -> None:
    block = BlockSize(GIB, tokens=8192, beside=0)
    read = Memory(allocated=0, peak=20 * GIB, reserved=22 * GIB, free=8 * GIB, total=50 * GIB)
    assert MARGIN == 0.08 and read.usable == (30 - 4) * GIB and blocks_that_fit(read, block, 8192, 32) == 7


def test_longer_rows_take_more_but_for_what_is_always_there() -> None:
    """Measured with 2,048 tokens, 8,192 may come: what grows is 4 times as large, weights and transposes are not."""
    read, block = memory(peak=17, usable=40.01, allocated=15), BlockSize(GIB, 2048, beside=0)
    assert blocks_that_fit(read, block, 2048, 99) == 24  # 17 and 23 more
    assert blocks_that_fit(read, block, 8192, 99) == 1 + 4  # 15 + 4 * 2 = 23, and 4 of 4
    assert blocks_that_fit(read, block._replace(beside=GIB), 8192, 99) == 1 + 3  # 3 of 5
    assert blocks_that_fit(read, block, 1024, 99) == 24  # a batch larger than the largest would be: nothing is taken off


@dataclass
class Log:
    """What a run prints and records."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def print(self, text: str) -> None:
        self.lines.append(text)

    def constant(self, **figures: float) -> None:
        self.figures |= figures


def memory_of(
    model: CausalLM, mode: str, offload: bool = False, device: torch.device = GPU, rows: int = 2
) -> tuple[ActivationMemory, Log]:
    cfg = ModelConfig(activation_checkpointing=mode, offload=["activations"] * offload)
    run, log = RunConfig(global_batch_size=4, micro_batch_size=rows), Log()
    return ActivationMemory(model, cfg, DataConfig(max_seq_len=37), run, device, log), log


def test_block_inputs_leave_fused_blocks_whole() -> None:
    model, log = fused(VARIANTS["llama"]()), Log()
    cfg = ModelConfig(activation_checkpointing="full", offload=["block_inputs"])
    run = RunConfig(global_batch_size=4, micro_batch_size=2)
    ActivationMemory(model, cfg, DataConfig(max_seq_len=37), run, torch.device("cpu"), log)
    assert model.model.checkpointing.offload and not any(block.split for block in model.model.layers)
    assert log.lines == ["activation checkpointing: 3 of 3 blocks are recomputed; their inputs wait in CPU memory (model.offload)"]


def recomputed(model: CausalLM) -> list[bool]:
    assert [index in model.model.checkpointing.blocks for index in range(3)] == [block.recomputed for block in model.model.layers]
    return [block.recomputed for block in model.model.layers]


ROOMS = [("llama", -1, 3), ("llama", 0, 2), ("llama", 1, 1), ("llama", 1.9, 1), ("llama", 2.5, 0), ("llama", 99, 0)]
ROOMS += [("qk_norm", 1, 1), ("nf4", 1, 1), ("fp8", 0, 2), ("fp8", 99, 0)]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("variant, room, expected", ROOMS)
def test_two_steps_are_measured_and_then_it_is_decided(
    variant: str, room: float, expected: int, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first blocks are recomputed, as many as do not fit; no result changes by a bit."""
    model = fused(in_fp8() if variant == "fp8" else VARIANTS[variant]())
    loss, grads = gradients(model)
    found, log = memory_of(model, "auto", offload)
    block = {}

    def read_memory(device: torch.device) -> Memory:
        probe = model.model.checkpointing.probe
        assert device == GPU and probe.tokens == 2 * 37
        block["bytes"] = probe.num_bytes - (0 if offload else 2 * 37 * 128 * 4)
        return Memory(10**9, 2 * 10**9, 0, int(2 * 10**9 + room * block["bytes"]), 0)

    monkeypatch.setattr(activations, "read_memory", read_memory)
    for step in range(1, 5):
        assert recomputed(model) == ([True, True, False] if step <= MEASURED_STEPS else [index < expected for index in range(3)])
        found_loss, again = gradients(model)
        assert found_loss == loss and all(torch.equal(again[name], grad) for name, grad in grads.items())
        found.step()
    assert len(log.lines) == 2 and "2 of 3 blocks are recomputed" in log.lines[0] and "for 2 steps that measure" in log.lines[0]
    said = f"{expected} of 3 blocks are recomputed" if expected else "nothing is recomputed"
    assert said in log.lines[1] and ("gate and up" in log.lines[1]) == (offload and expected > 0)
    assert model.model.checkpointing.probe is None


def test_what_a_fused_block_keeps_is_counted_by_hand() -> None:
    """Numbers per token, in fp32: h, q, k, v, the attention's output, the residual sum, gate and up; x A^T four times."""
    model = fused(adapted())
    memory_of(model, "auto")
    gradients(model)
    large, small = 128 + (128 + 64 + 64) + 128 + 128 + 512, 4 * 64 + 2 + 4
    mask = 2 * 37 * 37  # SDPA's on a CPU
    assert model.model.checkpointing.probe.num_bytes == 4 * (2 * 37 * (large + small) + mask)


def test_transposes_of_fp8_weights_count_beside_what_is_saved() -> None:
    model = fused(in_fp8())
    memory_of(model, "auto")
    gradients(model)
    assert [len(block.flipped) for block in model.model.layers] == [0, 0, 4]
    held = sum(flipped.numel() for flipped in model.model.layers[2].flipped.values())
    assert model.model.layers[2].bytes_beside() == held > 0 and adapted().model.layers[2].bytes_beside() == 0


def test_the_largest_batch_is_what_the_options_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """micro_batch_size is an upper bound: of 4 rows a step, 3 at a time are 2. And rows of 37 tokens may come in threes of 12."""
    sizes = []
    monkeypatch.setattr(activations, "read_memory", lambda device: Memory(0, 1, 1, 1, 0))
    monkeypatch.setattr(activations, "blocks_that_fit", lambda *given: sizes.append(given[1:]) or 1)
    model = fused(adapted())
    found, _ = memory_of(model, "auto", rows=3)
    for tokens in (21, 30, 25):
        model(**batch(tokens)).backward()
    for _ in range(MEASURED_STEPS):
        found.step()
    (block, largest, count), = sizes
    assert block.tokens == 60 and largest == 2 * 37 and count == 3


def test_on_a_cpu_nothing_is_recomputed() -> None:
    model = adapted()
    found, log = memory_of(model, "auto", offload=True, device=torch.device("cpu"))
    for _ in range(3):
        gradients(model)
        found.step()
    assert recomputed(model) == [False] * 3 and log.lines == ["activation checkpointing: none on a CPU (auto), and nothing waits elsewhere"]
    assert not log.figures


def test_the_other_modes_say_what_they_do_and_records_hold_how_much() -> None:
    model = fused(adapted())
    for mode, offload, words in (
        ("none", False, None),
        ("full", False, "3 of 3 blocks are recomputed"),
        ("every_2", False, "2 of 3 blocks are recomputed"),
        ("every_2", True, "2 of 3 blocks are recomputed, but only their gate and up; what else they keep waits in CPU memory (model.offload)"),
    ):
        found, log = memory_of(model, mode, offload)
        assert log.lines == ([f"activation checkpointing: {words}"] if words else [])
        if offload:
            model.model.checkpointing.traffic = Traffic(torch.device("cpu"), smallest=1)
        gradients(model)
        found.step()
        blocks = {"none": {}, "full": {"recomputed_blocks": 3}, "every_2": {"recomputed_blocks": 2}}[mode]
        assert log.figures == ({**blocks, "offloaded_gib": log.figures["offloaded_gib"]} if blocks else {})
    plain = adapted()
    assert "their inputs wait in CPU memory" in memory_of(plain, "full", True)[1].lines[0]


def test_the_gib_of_a_step_are_recorded() -> None:
    model = fused(adapted())
    found, log = memory_of(model, "full", offload=True)
    traffic = model.model.checkpointing.traffic = Traffic(torch.device("cpu"))
    for sent in (3 * GIB, 3 * GIB, GIB // 2):
        traffic.sent += sent
        found.step()
        assert log.figures == {"recomputed_blocks": 3, "offloaded_gib": sent / GIB}


def test_all_processes_recompute_what_the_fullest_one_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_cuda(monkeypatch)

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        distributed._host_group.append(dist.group.WORLD)
        model = fused(adapted())
        found, log = memory_of(model, "auto")
        for _ in range(MEASURED_STEPS):
            gradients(model)
            size = model.model.checkpointing.probe.num_bytes
            monkeypatch.setattr(activations, "read_memory", lambda device, size=size: Memory(0, 10**9, 0, 10**9 + (2 - rank) * size, 0))
            found.step()
        assert recomputed(model) == [True, False, False], log.lines  # alone, the first would recompute none
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)
