"""Activation checkpointing: keep only a block's input and compute the rest again in backward.

No wrapper modules: the decoder's loop calls `Checkpointing.run`, so names in the state dict stay as they are, and a
block that was compiled in place runs compiled both times. The variant is `torch.utils.checkpoint`'s non-reentrant one,
which gives gradients though the block's input needs none (a frozen base below an adapter). The random state is
replayed, so that dropout, wherever it hides, draws the same mask again; that costs the CPU some 0.1 ms per block, and is left
out for blocks that say they draw nothing.

Legend: B batch, T tokens, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class _Offloaded:
    """One block's input (B, T, D) in CPU memory, pinned and copied on a side stream where it came from a GPU.

    In backward the blocks run last to first, so fetching one starts the copy of the one before it, which then travels
    while the fetched block computes.
    """

    def __init__(self, x: Tensor, before: "_Offloaded | None", stream: torch.cuda.Stream | None) -> None:
        self.before = before  # of the block earlier in the same forward
        self.device = x.device
        self.stream = stream
        self.arriving: Tensor | None = None  # the copy back, under way
        if stream is None:
            self.kept = x.clone()
            return
        self.kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.kept.copy_(x, non_blocking=True)
        x.record_stream(stream)  # x's memory is not given to anyone else before the copy is done

    def start(self) -> None:
        """Begin the copy back to the device, behind whatever copies the side stream still holds."""
        if self.arriving is not None:
            return
        if self.stream is None:
            self.arriving = self.kept.clone()
            return
        with torch.cuda.stream(self.stream):
            self.arriving = self.kept.to(self.device, non_blocking=True)

    def fetch(self) -> Tensor:
        """The input, back on its device; the copy of the block before is started."""
        self.start()
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            self.arriving.record_stream(current)
        if self.before is not None:
            self.before.start()
        arrived, self.arriving, self.before = self.arriving, None, None
        return arrived


@dataclass
class Checkpointing:
    """Which blocks are checkpointed, and how. An attribute of the decoder, read by its loop."""

    every: int = 0  # 0 = none, 1 = every block, n = blocks 0, n, 2n, ...
    offload: bool = False  # keep the inputs of those blocks in CPU memory
    stream: torch.cuda.Stream | None = None  # for the copies, made when first needed
    last: _Offloaded | None = None  # input of the latest checkpointed block of this forward

    def run(self, index: int, block: nn.Module, h: Tensor, *args: object) -> Tensor:
        """`block(h, *args)`, checkpointed if block number `index` is one of those and a gradient is wanted."""
        if self.every == 0 or index % self.every != 0 or not torch.is_grad_enabled():
            return block(h, *args)
        if index == 0:
            self.last = None

        replayed = False

        def recompute(h: Tensor) -> Tensor:  # the tables and masks in `args` are shared by all blocks: not saved again
            nonlocal replayed
            block.replayed, replayed = replayed, True
            try:
                return block(h, *args)
            finally:
                block.replayed = False

        # Not stopped early, by an exception amid the block's last op: it would save one addition, and is lost (a SystemError) where
        # CUDA's allocations are recorded.
        options = {"use_reentrant": False, "early_stop": False, "preserve_rng_state": block.draws}
        if not self.offload:
            return checkpoint(recompute, h, **options)
        if h.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(h.device)
        with saved_tensors_hooks(self._pack, _Offloaded.fetch):
            return checkpoint(recompute, h, **options)

    def _pack(self, x: Tensor) -> _Offloaded:
        self.last = _Offloaded(x, self.last, self.stream if x.is_cuda else None)
        return self.last


def apply_activation_checkpointing(model: nn.Module, mode: str, offload: bool = False) -> None:
    """Set how `model` (a CausalLM) trades compute for memory.

    mode: "none", "full", or "every_<n>" for one block in n. Raises ValueError for anything else, or if `offload` is
    asked for without checkpointing.
    """
    every = _blocks_apart(mode)
    if offload and every == 0:
        raise ValueError(
            "model.offload: [activations] moves the inputs of checkpointed blocks to CPU memory, and with "
            'model.activation_checkpointing: none there are none. Set it to "full" or "every_<n>".'
        )
    model.model.checkpointing = Checkpointing(every=every, offload=offload)
    for index, block in enumerate(model.model.layers):
        block.recomputed = every > 0 and index % every == 0


def _blocks_apart(mode: str) -> int:
    fixed = {"none": 0, "full": 1}
    if mode in fixed:
        return fixed[mode]
    prefix, _, number = mode.partition("_")
    if prefix == "every" and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    raise ValueError(
        f"model.activation_checkpointing: {mode!r} is not none, full or every_<n> (every_2: every second block)."
    )
