"""What is recomputed and what waits in CPU memory, as model.activation_checkpointing and model.offload say; `auto` finds out.

    activations = ActivationMemory(model, cfg.model, cfg.data, run, device, log)    # when the model stands, still on meta
    activations.step()                                                             # after each optimizer step

auto, on a GPU: all blocks but the last are recomputed for two steps. (In the first one the optimizer has no moments yet.) Then
what the last one kept is known, and the peak of memory with it, and as many more keep everything as fit below the
memory there is less a margin: nobody recomputes what fits. It is decided once, for the largest batch that the options
allow, on all processes as the one with the least memory must. On a CPU nothing is recomputed.

Which blocks are recomputed does not matter at the end of forward, when all that is kept lies there together. But to recompute
one makes all of it for a moment, and by then the blocks behind it have let go of theirs: so the first ones are
recomputed. And what of those is offloaded has the others' time to travel.

After torch.cuda.set_per_process_memory_fraction(f), in a recipe of one's own, `auto` keeps to that share of the GPU.

Left out: blocks that keep different amounts in one model; memory that others take later on the same GPU.
"""

import math
from typing import NamedTuple

import torch

from torchft.config import DataConfig, ModelConfig, RunConfig
from torchft.data.loader import resolve_micro_batch_size
from torchft.distributed import highest
from torchft.metrics import RunLogger
from torchft.modules.checkpointing import Probe, apply_activation_checkpointing, recompute_blocks
from torchft.modules.transformer import CausalLM
from torchft.ranks import world_size

MARGIN = 0.08  # share of the GPU's memory left free: what the allocator cannot use for its gaps, and validation's own needs
MEASURED_STEPS = 2
GIB = 2**30


class Memory(NamedTuple):
    """Of one GPU, in bytes."""

    allocated: int  # tensors, now: between two steps
    peak: int  # tensors, at most so far
    reserved: int  # held by PyTorch, tensors included
    free: int  # held by nobody
    total: int  # this process may have (torch.cuda.set_per_process_memory_fraction; as a rule all)

    @property
    def usable(self) -> float:
        """For tensors, at most."""
        return self.reserved + self.free - MARGIN * self.total


class BlockSize(NamedTuple):
    """What one more block that is not recomputed takes, in bytes."""

    measured: int  # by a batch of `tokens`
    tokens: int
    beside: int  # whatever the batch


class ActivationMemory:
    """Sets up the blocks of a model, and with `auto` again once their memory is known. Prints and records what it does."""

    def __init__(
        self, model: CausalLM, cfg: ModelConfig, data: DataConfig, run: RunConfig, device: torch.device, log: RunLogger
    ) -> None:
        self._model, self._device, self._log = model, device, log
        rows = resolve_micro_batch_size(run.global_batch_size, run.micro_batch_size, world_size())
        self._tokens = rows * data.max_seq_len  # of the largest batch
        self._splits = "activations" in cfg.offload
        self._offload = self._splits or "block_inputs" in cfg.offload
        self._measures = cfg.activation_checkpointing == "auto" and device.type == "cuda"
        self._steps, self._sent = 0, 0
        if self._measures:
            self._recompute(len(model.model.layers) - 1)
            model.model.checkpointing.probe = Probe(len(model.model.layers) - 1)
            log.print(f"{self._line()}, for {MEASURED_STEPS} steps that measure what fits (auto)")
        elif cfg.activation_checkpointing == "auto":
            log.print(f"activation checkpointing: none on a CPU (auto){', and nothing waits elsewhere' if self._offload else ''}")
        else:
            apply_activation_checkpointing(model, cfg.activation_checkpointing, self._offload, self._splits)
            if model.model.checkpointing.blocks:
                log.print(self._line())

    def step(self) -> None:
        """An optimizer step ended, its gradients are gone, and its record is about to be written."""
        self._steps += 1
        checkpointing = self._model.model.checkpointing
        sent, self._sent = checkpointing.bytes_offloaded - self._sent, checkpointing.bytes_offloaded
        if checkpointing.blocks or self._measures:
            self._log.constant(recomputed_blocks=len(checkpointing.blocks), offloaded_gib=round(sent / GIB, 3))
        if self._measures and self._steps == MEASURED_STEPS:
            self._decide(checkpointing.probe)

    def _decide(self, probe: Probe) -> None:
        """Let as many blocks as fit keep everything; the same number on all processes."""
        memory, layers = read_memory(self._device), self._model.model.layers
        taken = probe.num_bytes - (0 if self._offload else probe.input_bytes)
        block = BlockSize(taken, probe.tokens, layers[-1].bytes_beside())
        self._recompute(highest(len(layers) - blocks_that_fit(memory, block, self._tokens, len(layers))))
        self._sent = 0
        self._log.print(
            f"{self._line()} (auto: another block would take {taken / GIB:.2f} GiB for {probe.tokens:,} tokens, of which up to "
            f"{self._tokens:,} come; the peak was {memory.peak / GIB:.1f} of {memory.usable / GIB:.1f} usable GiB)"
        )

    def _recompute(self, first: int) -> None:
        recompute_blocks(self._model, range(first), self._offload and first > 0, self._splits)

    def _line(self) -> str:
        """What of which blocks is recomputed, and what travels."""
        layers = self._model.model.layers
        count = sum(block.recomputed for block in layers)
        line = f"activation checkpointing: {f'{count} of {len(layers)} blocks are' if count else 'nothing is'} recomputed"
        if not count or not self._offload:
            return line
        if any(block.split for block in layers):
            return f"{line}, but only their gate and up; what else they keep waits in CPU memory (model.offload)"
        return f"{line}; their inputs wait in CPU memory (model.offload)"


def blocks_that_fit(memory: Memory, block: BlockSize, tokens: int, count: int) -> int:
    """How many of `count` blocks need not be recomputed for a batch of `tokens`, where `memory` was measured with one such.

    What is not there between two steps grows with the tokens. 0: not even that one.
    """
    growth = max(1.0, tokens / block.tokens)
    peak = memory.allocated + (memory.peak - memory.allocated) * growth
    fitting = 1 + math.floor((memory.usable - peak) / (block.measured * growth + block.beside))
    return min(max(fitting, 0), count)


def read_memory(device: torch.device) -> Memory:
    """Of this process's GPU; does not wait for it."""
    free, total = torch.cuda.mem_get_info(device)
    total = int(total * torch.cuda.get_per_process_memory_fraction(device))
    reserved = torch.cuda.memory_reserved(device)
    allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return Memory(allocated, peak, reserved, min(free, total - reserved), total)
