"""Activation checkpointing: of what a block's backward needs, keep little, and compute the rest again or have the host keep it.

    recomputed              only the block's input is kept, all else is computed again
    recomputed, offloaded   the input waits in CPU memory (offload.py). Of a fused block, if it is split, so does what its attention
                            half saves, and the feed forward's input; computed again are gate and up alone, its largest tensors
    neither                 everything is kept

8B at 8,192 tokens, bf16, a block: gate and up are 448 MiB and one product; all else is 288 MiB, 5.5 ms over a pinned link, and
three products and the attention. The input alone is 64 MiB, for contexts of which CPU memory holds no more.

No wrapper modules: the decoder's loop calls `Checkpointing.run`, so names in the state dict stay as they are, and a
block that was compiled in place runs compiled both times. The variant is `torch.utils.checkpoint`'s non-reentrant one,
which gives gradients though the block's input needs none (a frozen base below an adapter). The random state is
replayed, so that dropout, wherever it hides, draws the same mask again; that costs the CPU some 0.1 ms per block, and is left
out for blocks that say they draw nothing.

Legend: B batch, T tokens, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchft.modules.offload import Traffic, address, addresses, travels


def run_again(function: Callable[..., Tensor], *inputs: Tensor, draws: bool) -> Tensor:
    """`function(*inputs, replayed)`, of which only the inputs are kept: False now, True when backward has it run once more.

    That second time what it saves is wanted and not what it returns. `draws`: whether it may draw random numbers.
    """
    replayed = False

    def run(*inputs: Tensor) -> Tensor:
        nonlocal replayed
        now, replayed = replayed, True
        return function(*inputs, now)

    # Not stopped early, by an exception amid the block's last op: it would save one addition, and is lost (a SystemError) where
    # CUDA's allocations are recorded.
    return checkpoint(run, *inputs, use_reentrant=False, early_stop=False, preserve_rng_state=draws)


@dataclass
class Probe:
    """Measures what one block, of which nothing is recomputed, keeps for backward: of the largest batch so far."""

    index: int  # of the block
    tokens: int = 0  # B * T
    num_bytes: int = 0  # of all memory that is neither a weight nor shared by blocks
    input_bytes: int = 0  # of the block's input, which is part of it

    def run(self, block: nn.Module, h: Tensor, *args: object) -> Tensor:
        """`block(h, *args)`, measured."""
        saved: dict[int, Tensor] = {}  # by the address of their memory, which they hold: no other one comes to lie there

        def count(x: Tensor) -> Tensor:
            if travels(x, set(), 1):
                saved.setdefault(address(x), x)
            return x

        with saved_tensors_hooks(count, lambda x: x):
            out = block(h, *args)
        if h.shape[0] * h.shape[1] > self.tokens:
            self.tokens, self.input_bytes = h.shape[0] * h.shape[1], h.numel() * h.element_size()
            shared = addresses([*args, *block.parameters()])  # now: a fused block has laid its weights anew
            self.num_bytes = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in shared)
        saved.clear()  # autograd may hold `count` as long as what it saved
        return out


@dataclass
class Checkpointing:
    """Which blocks are recomputed, and how. An attribute of the decoder, read by its loop."""

    blocks: range = range(0)  # that are recomputed
    offload: bool = False  # what is kept of those waits in CPU memory
    count: int = 0  # blocks of the model
    probe: Probe | None = None  # its block is not recomputed
    traffic: Traffic | None = None  # made when first needed

    @property
    def bytes_offloaded(self) -> int:
        """Sent to CPU memory so far, in all steps."""
        return self.traffic.sent if self.traffic else 0

    def run(self, index: int, block: nn.Module, h: Tensor, *args: object) -> Tensor:
        """`block(h, *args)`, checkpointed if block number `index` is one of those and a gradient is wanted."""
        if not torch.is_grad_enabled():
            return block(h, *args)
        assert block.recomputed == (index in self.blocks), "only recompute_blocks changes which: a block goes by it too"
        if self.traffic is not None:
            self.traffic.make_room(sum(other not in self.blocks for other in range(index + 1, self.count)))
        if self.probe is not None and index == self.probe.index:
            return self.probe.run(block, h, *args)
        if index not in self.blocks:
            return block(h, *args)

        def whole(h: Tensor, replayed: bool) -> Tensor:  # `args`, the tables and masks, are all blocks': not saved again
            block.replayed = replayed
            try:
                return block(h, *args)
            finally:
                block.replayed = False

        if not self.offload:
            return run_again(whole, h, draws=block.draws)
        self.traffic = self.traffic or Traffic(h.device)
        # Not the weights: a fused block saves none but its norms', and lays them anew in its first forward, memory and all.
        journey = self.traffic.journey(addresses(args), stays=index == self.count - 1)
        with saved_tensors_hooks(journey.pack, journey.unpack):
            out = block(h, *args) if block.split else run_again(whole, h, draws=block.draws)
        journey.depart()
        return out


def apply_activation_checkpointing(model: nn.Module, mode: str, offload: bool = False, splits: bool = True) -> None:
    """Set how `model` (a CausalLM) trades compute for memory.

    mode: "none", "full", or "every_<n>" for one block in n; `offload`, `splits`: see `recompute_blocks`. Raises ValueError
    for any other mode, or if `offload` is asked for without checkpointing.
    """
    every, count = _blocks_apart(mode), len(model.model.layers)
    if offload and every == 0:
        raise ValueError(
            "model.offload: [activations] moves what checkpointed blocks keep to CPU memory, and with "
            'model.activation_checkpointing: none there are none. Set it to "full" or "every_<n>".'
        )
    recompute_blocks(model, range(0, count if every else 0, every or 1), offload, splits)


def recompute_blocks(model: nn.Module, blocks: range, offload: bool, splits: bool = True) -> None:
    """These blocks of `model` (a CausalLM) are recomputed from here on, and no others.

    offload: what they keep waits in CPU memory; of fused blocks that is most of what they compute, or, without `splits`, their
    input.
    """
    layers = model.model.layers
    model.model.checkpointing = Checkpointing(blocks, offload, len(layers))
    for index, block in enumerate(layers):
        block.recomputed = index in blocks
        block.split = offload and splits and block.recomputed and block.splits


def _blocks_apart(mode: str) -> int:
    fixed = {"none": 0, "full": 1}
    if mode in fixed:
        return fixed[mode]
    prefix, _, number = mode.partition("_")
    if prefix == "every" and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    raise ValueError(
        f"model.activation_checkpointing: {mode!r} is not none, full or every_<n> (every_2: every second block); auto is for "
        "torchft.activations.ActivationMemory."
    )
