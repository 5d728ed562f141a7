"""Frozen weights of fused blocks, divided over processes: each holds some rows, and reads the others' a block ahead of use.

    num_divided = divide_blocks(model, mesh, copies=True)     # on meta, in place of modules/sharding.py

FSDP2 gathers what is trained as well as what is not: into one buffer by NCCL, out of it into the parameters, from where a fused
block copied them into its matrix E (kernels/lora_linear.py). For 8B on two H200s those copies took 66 ms of a step of 550, and
NCCL's kernels the multiprocessors of products that are laid out for all of them. What nobody trains stays as it was loaded, so that
it may be read at any time, without a word to its holder. So each process keeps its rows as they stand in E, and

    copies=True    a GPU copies the others' rows into E, out of their memory, by its copy engines beside the products: no
                   multiprocessor works for that, and no process waits for another (symmetric memory: one host, NVLink or PCIe)
    copies=False   all_gather does, on processes of several hosts, on CPUs, with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, and
                   with model.kernels={peers: eager}; there all must compute the same blocks in the same order

E of two blocks is there at a time: of the one that computes, and of the next one in its direction. Adapters, norms, embedding and
head are whole on each process, the last two as FSDP2 would hold them from forward to backward, too; gradients of adapters are
averaged by torchft.distributed.mean_gradients.

A weight remains a DTensor, a view of its process's rows of E; it can be read and written in place, but not replaced after the
first forward. Left out: NF4, whose traffic is a quarter, and FP8 (FSDP2 divides those); training of more than adapters.

Legend: O output width, D input width, P padded rank of a group of linears with one input; n processes that share a block.
https://docs.pytorch.org/docs/stable/symmetric_memory.html
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from torchft.fused_block import FusedBlock, adapter_of
from torchft.kernels.lora_linear import padded_rank, write_adapters
from torchft.modules.sharding import divided_like, local, on_mesh
from torchft.modules.transformer import CausalLM

ALIGNMENT = 512  # elements at which an E begins
all_gather = vars(dist).get("all_gather_single", dist.all_gather_into_tensor)  # which was its name before torch 2.13


class Piece(NamedTuple):
    """One linear, and where its rows lie."""

    linear: nn.Linear
    row: int  # of E, its first one
    held: int  # where a process's rows of it begin, in that process's memory; elements


class Linears(NamedTuple):
    """A group of linears of one block with the same input."""

    pieces: list[Piece]
    shape: tuple[int, int]  # of E: (O + P, D + P)
    start: int  # of E, in a slot; elements


class Layout(NamedTuple):
    """Where a block's weights lie, in a slot and in the memory of a process."""

    groups: dict[str, Linears]  # by the name of their first linear
    slot_numel: int
    held_numel: int


@dataclass
class Slot:
    """Room for the E of all groups of a block."""

    memory: Tensor  # flat
    block: int | None = None  # whose weights are in it, or on their way
    ready: torch.cuda.Event | None = None  # they have arrived
    scales: dict[str, float] = field(default_factory=dict)  # groups whose adapters are in it, and what A is multiplied by there


def divide_blocks(model: CausalLM, mesh: DeviceMesh, *, copies: bool) -> int:
    """Divide the frozen linears of all fused blocks of a model on meta; the number of those weights.

    mesh: one dimension of processes that share the rows of a weight, or two, (copies of the model, parts).
    """
    blocks, parts = list(model.model.layers), mesh.size(mesh.ndim - 1)
    placements = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
    linears = [linear for block in blocks for group in block.groups().values() for linear in group]
    for linear in linears:
        linear.weight = nn.Parameter(_on_meta(linear.weight, parts, mesh, placements), requires_grad=False)
    divided = DividedBlocks(blocks, mesh, copies)
    for index, block in enumerate(blocks):
        block.divided, block.index = divided, index
    return len(linears)


def _on_meta(weight: Tensor, parts: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    part = weight.detach()[: len(weight) // parts]
    assert part.is_meta, "divided before it is filled"
    return on_mesh(part, mesh, placements, shape=weight.shape, stride=weight.stride())


class DividedBlocks:
    """The weights of all blocks: which ones are here, and what fetches the others. Shared by the blocks."""

    def __init__(self, blocks: list[FusedBlock], mesh: DeviceMesh, copies: bool) -> None:
        self._group = mesh.get_group(mesh.ndim - 1)
        self._rank, self._parts, self.copies = self._group.rank(), self._group.size(), copies
        self._blocks, self._layouts = blocks, [_layout(block, self._parts) for block in blocks]
        self._held: list[list[Tensor]] = []  # by block, then by process (without copies: this one's alone), flat
        self._slots: list[Slot] = []
        self._stream: torch.cuda.Stream | None = None
        self._pool: torch.cuda.MemPool | None = None  # of what others read
        self._now, self._step = 0, 1  # the block that computes, and where the next one is
        self._lowest = next(index for index, block in enumerate(blocks) if block.adapted)  # where backward ends

    def extended(self, index: int, key: str, a: list[Tensor], b: list[Tensor], scale: float) -> Tensor:
        """E (O + P, D + P) of a group of block number `index` with these adapters in it, until another block's is asked for.

        They are written while it is fetched; here only if they have changed since.
        """
        slot = self._arrived(index)
        matrix = self._matrix(slot, self._layouts[index].groups[key])
        if slot.scales.get(key) != scale:
            write_adapters(matrix, a, b, scale, eager=not matrix.is_cuda)
            slot.scales[key] = scale
        return matrix

    def forward_begins(self) -> None:
        """Adapters may be others than they were when what is in the slots was fetched: an optimizer's step shows in no counter."""
        for slot in self._slots:
            slot.scales.clear()

    def forget(self) -> None:
        """What is in the slots counts no more: a CUDA graph is about to fill them, or has done so."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        for slot in self._slots:
            slot.block = slot.ready = None
            slot.scales.clear()

    def weights(self, index: int) -> dict[int, Tensor]:
        """The whole weights of a block, by the id of their linear, until another block's are asked for."""
        slot, found = self._arrived(index), {}
        for group in self._layouts[index].groups.values():
            matrix = self._matrix(slot, group)
            for linear, row, _ in group.pieces:
                found[id(linear)] = matrix[row : row + linear.out_features, : linear.in_features]
        return found

    def _arrived(self, index: int) -> Slot:
        """The slot of block `index`, with its weights in it; the next block's are on their way then."""
        if not self._slots:
            self._lay()
        last = len(self._layouts) - 1
        if index in (0, last):
            self._step = 1 if index == 0 else -1
        elif index != self._now:
            self._step = 1 if index > self._now else -1
        self._now = index
        slot = self._slot_of(index) or self._fetch(index)
        if slot.ready is not None:
            torch.cuda.current_stream().wait_event(slot.ready)
        ahead, end = index + self._step, 0 if self._step > 0 else self._lowest  # what nobody waits for would spoil a CUDA graph
        if end <= ahead <= last and self._slot_of(ahead) is None:
            self._fetch(ahead)
        return slot

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    @torch.no_grad()
    def _fetch(self, index: int) -> Slot:
        """Begin to fill the slot that does not hold the computing block. What used it before has been launched already."""
        slot = next(slot for slot in self._slots if slot.block is None or slot.block != self._now)
        slot.block = index
        slot.scales.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for key, group in self._layouts[index].groups.items():
                matrix = self._matrix(slot, group)
                self._fill(matrix, group, self._held[index])
                a, b = zip(*(adapter_of(piece.linear) for piece in group.pieces), strict=True)
                slot.scales[key] = self._blocks[index].scale
                write_adapters(matrix, list(a), list(b), slot.scales[key], eager=not matrix.is_cuda)
            if self._stream is not None:
                slot.ready = self._stream.record_event()
        return slot

    def _fill(self, matrix: Tensor, group: Linears, held: list[Tensor]) -> None:
        for piece in group.pieces:
            parts = [self._rows(memory, group, piece) for memory in held]
            rows, everything = len(parts[0]), matrix[piece.row : piece.row + piece.linear.out_features]
            if self.copies:
                for turn in range(self._parts):  # each begins elsewhere, so that not all read from one
                    other = (self._rank + turn) % self._parts
                    everything[other * rows : (other + 1) * rows].copy_(parts[other])
            else:
                all_gather(everything, parts[0], group=self._group)

    def _rows(self, memory: Tensor, group: Linears, piece: Piece) -> Tensor:
        """A process's rows of a linear, as they stand in E, in that process's memory."""
        rows, width = piece.linear.out_features // self._parts, group.shape[1]
        return memory[piece.held : piece.held + rows * width].view(rows, width)

    @staticmethod
    def _matrix(slot: Slot, group: Linears) -> Tensor:
        return slot.memory[group.start : group.start + group.shape[0] * group.shape[1]].view(group.shape)

    @torch.no_grad()
    def _lay(self) -> None:
        """Move this process's rows to where they stand as in E, and others can read them; block by block, so that none is there twice."""
        like = local(next(iter(self._layouts[0].groups.values())).pieces[0].linear.weight)
        for layout in self._layouts:
            held = self._allocate(layout.held_numel, like)
            for group in layout.groups.values():
                self._move(group, held[self._rank if self.copies else 0])
            self._held.append(held)
        numel = max(layout.slot_numel for layout in self._layouts)
        self._slots = [Slot(like.new_empty(numel)) for _ in self._layouts[:2]]
        if like.is_cuda:
            self._stream = torch.cuda.Stream()
        if self.copies:
            self._compare_sums()

    def _compare_sums(self) -> None:
        """Wait until everyone's rows lie there: from then on they are read at any time. Raise RuntimeError if they are not what
        their holders have: a wrong address would make a wrong loss, and no error.
        """
        mine = torch.stack([_sum(held[self._rank]) for held in self._held])  # by block
        told = [torch.empty_like(mine) for _ in range(self._parts)]
        dist.all_gather(told, mine, group=self._group)
        for other, sums in enumerate(told):
            seen = torch.stack([_sum(held[other]) for held in self._held])
            if not torch.equal(seen, sums):
                raise RuntimeError(
                    f"The GPU of process {self._rank} of {self._parts} that share a weight does not see what process {other} holds, "
                    f"of {int((seen != sums).sum())} of {len(sums)} blocks. Report it; model.kernels={{peers: eager}} does without."
                )

    def _move(self, group: Linears, held: Tensor) -> None:
        """This process's rows of a group into `held`; from then on the weights are views of it."""
        for piece in group.pieces:
            linear, place = piece.linear, self._rows(held, group, piece)[:, : piece.linear.in_features]
            place.copy_(local(linear.weight))
            linear.weight = nn.Parameter(divided_like(place, linear.weight), requires_grad=False)

    def _allocate(self, numel: int, like: Tensor) -> list[Tensor]:
        """Memory of this process's, or with copies everyone's as this one sees it, by rank."""
        if not self.copies:
            return [like.new_empty(numel)]
        import torch.distributed._symmetric_memory as symmetric  # here: it takes its time

        torch.cuda.empty_cache()  # of what was just moved: this memory comes from the driver, which asks no cache for what it lacks
        try:
            if self._pool is None:
                # A pool, so that it counts as allocated, and not torch's own: that gives memory of a model before this one out
                # again, which rendezvous takes for what it was then, each process in an order of its own.
                allocator = symmetric.get_mempool_allocator(like.device)
                self._pool = torch.cuda.MemPool(allocator, use_on_oom=False, no_split=True)
            with torch.cuda.use_mem_pool(self._pool):
                mine = like.new_empty(numel)
            handle = symmetric.rendezvous(mine, self._group)
        except RuntimeError as error:
            error.add_note("This came up while GPUs opened their memory to each other; model.kernels={peers: eager} does without.")
            raise
        return [mine if other == self._rank else handle.get_buffer(other, (numel,), like.dtype) for other in range(self._parts)]


def _layout(block: FusedBlock, parts: int) -> Layout:
    groups, start, held = {}, 0, 0
    for key, linears in block.groups().items():
        pad = padded_rank([adapter_of(linear)[1] for linear in linears])
        pieces, row, width = [], 0, linears[0].in_features + pad
        for linear in linears:
            pieces.append(Piece(linear, row, held + row // parts * width))
            row += linear.out_features
        groups[key] = Linears(pieces, (row + pad, width), start)
        start += _aligned((row + pad) * width)
        held += _aligned(row // parts * width)
    return Layout(groups, start, held)


def _sum(memory: Tensor) -> Tensor:
    """Of its bits, eight bytes at a time, modulo 2^64: of a narrower dtype torch would make a copy in int64 first."""
    return memory.view(torch.int64).sum()


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
