"""What blocks save for backward, in CPU memory meanwhile: sent behind a block's forward, fetched ahead of their use.

`with saved_tensors_hooks(journey.pack, journey.unpack)` around a block sends what autograd saves in it. A Journey holds the
tensors of one block; Traffic holds what the journeys of a model share: the link, the host's memory and their order.

On a GPU all copies run in order on one stream beside the one that computes, and the host never waits. Whose memory is whose:

- A tensor on its way out is referenced until the computing stream has been told to wait for its copy: at the beginning of a
  later block, or of backward. Dropped then, its memory goes to work that stands behind that wait. `record_stream` would free it
  only once the host sees the copy done, and the host runs many blocks ahead of the GPU: memory would grow with every block
  that it is ahead.
- How many blocks' tensors may be on the device: two, and one for each block to come that keeps everything, since the memory it
  will take is free until then. A forward in FP8 is faster than the link: with two alone, 24 of 32 blocks of 8B waited for it
  for 40 ms of a step, with 8 blocks' memory unused.
- A tensor on its way back is allocated by the computing stream, its copy waits for all that this stream was given before (the
  memory's former users), and whoever reads it waits for the copy. It is freed like any other.
- Pinned memory is allocated once and kept (pinning takes some 0.3 s per GiB): a buffer returns when nobody can ask for it any
  more, and its next copy stands behind its last one on the same stream. torch's own cache of pinned memory looks whether the
  copies are done, which for a host that runs ahead they are not, and would pin more in every step.

On a CPU the same is done by plain copies, which gains nothing there but tests. Left out: several devices in one process.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST = 2**20  # bytes: what is smaller stays, its copy would cost more time to launch than it frees memory
ON_THE_WAY = 2  # blocks whose tensors may be on the device anyway: one that computes, and one whose tensors are being sent

Copy = tuple[Tensor, Tensor]  # to, from


class CannotPin(RuntimeError):
    """The machine gives no more CPU memory that a GPU can read, which torchft/crash.py tells without a traceback."""

    def __init__(self, what: str, num_bytes: int, advice: str, cause: RuntimeError) -> None:
        super().__init__(
            f"model.offload: {what}: {num_bytes / 2**20:,.0f} MiB more of this machine's CPU memory could not be pinned "
            f"({str(cause).splitlines()[0]}). Raise the limit (ulimit -l, the container's), {advice}, or take it out"
        )


class Link:
    """Copies between host and device, in the order they are given, beside the computing stream. On a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, copies: list[Copy]) -> torch.cuda.Event | None:
        """Copies behind all that the computing stream has been given so far. What is returned happens when they are done."""
        if self.stream is None:
            for to, origin in copies:
                to.copy_(origin)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, origin in copies:
                to.copy_(origin, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What is computed from here on comes behind the event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class HostMemory:
    """Buffers on the host, pinned if need be, that are used again and again."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: dict[int, list[Tensor]] = {}  # by size; uint8. Buffers come back at any time, in the midst of `take` too

    def take(self, num_bytes: int) -> Tensor:
        """The smallest free buffer of at least that size, else a new one in place of the largest that was too small."""
        sizes = [num_bytes] if self.free.get(num_bytes) else [size for size, buffers in list(self.free.items()) if buffers]
        fitting = [size for size in sizes if size >= num_bytes]
        if fitting:
            return self.free[min(fitting)].pop()
        if sizes:  # rows of many lengths shall not leave a buffer for each length
            self.free[max(sizes)].pop()
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            advice = "lower run.micro_batch_size, have only block_inputs travel"
            raise CannotPin("activations", num_bytes, advice, error) from error

    def give(self, buffer: Tensor) -> None:
        """Back for others."""
        self.free.setdefault(buffer.numel(), []).append(buffer)

    def buffers(self) -> list[Tensor]:
        """All that are free."""
        return [buffer for same in self.free.values() for buffer in same]


class _Item:
    """The memory of one tensor: on the device, on the host, or on both."""

    def __init__(self, storage: torch.UntypedStorage, traffic: "Traffic") -> None:
        self.device: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # None: away
        self.num_bytes, self.place = storage.nbytes(), storage.device
        self.host: Tensor | None = None  # may be longer
        self.readers = 0  # saved tensors of it that backward has not asked for yet
        self.arrived: torch.cuda.Event | None = None  # what whoever reads it must wait for
        self.traffic = traffic

    def out(self) -> Copy:
        """The copy to the host."""
        self.host = self.traffic.memory.take(self.num_bytes)
        return self.host[: self.num_bytes], self.device

    def back(self) -> Copy:
        """The copy to the device, into new memory."""
        self.device = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.place)
        return self.device, self.host[: self.num_bytes]

    def wait(self) -> None:
        """What is computed from here on comes behind the copy back."""
        self.traffic.link.wait(self.arrived)
        self.arrived = None

    def __del__(self) -> None:
        self.wait()  # in case that nobody read it: its memory is freed now, and the copy into it may not have been made yet
        if self.host is not None:
            self.traffic.memory.give(self.host)


class _Ticket(NamedTuple):
    """What autograd keeps in place of a tensor."""

    item: _Item
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class Journey:
    """What one block saves: sent when the block has computed, fetched piece by piece as backward comes closer.

    Autograd's saved tensors keep it alive, by their hooks, and let it go. `stays`: nothing is sent, as of the last block, which
    goes backward at once.
    """

    def __init__(self, traffic: "Traffic", shared: set[int], stays: bool) -> None:
        self.traffic, self.shared, self.stays = traffic, shared, stays
        self.before: Journey | None = None  # of the block before
        self.items: dict[int, _Item] = {}  # by where their memory was; in the order in which they were saved last
        self.gone: torch.cuda.Event | None = None  # the copies out are done, for which nobody has waited

    def __del__(self) -> None:
        self.traffic.link.wait(self.gone)  # in case that nobody went backward: what was to be sent is freed now

    def pack(self, x: Tensor) -> Tensor | _Ticket:
        """Autograd's: what to keep for a tensor. Whole memories travel, each once, however many views of it are saved."""
        if not travels(x, self.shared, self.traffic.smallest):
            return x
        place = address(x)
        item = self.items.pop(place, None)
        if item is None:  # it holds that memory from here on, so that no other tensor of this block comes to lie there
            item = _Item(x.untyped_storage(), self.traffic)
        self.items[place] = item
        item.readers += 1
        return _Ticket(item, x.dtype, x.storage_offset(), x.shape, x.stride())

    def unpack(self, packed: Tensor | _Ticket) -> Tensor:
        """Autograd's: the tensor again, in its old shape and strides."""
        self.traffic.turn(self)
        if isinstance(packed, Tensor):
            return packed
        self.traffic.link.wait(self.gone)  # what has not left is read where it is, and freed behind its copy
        self.gone = None
        item = packed.item
        self.traffic.fetch([item])
        self.traffic.fetch(self._next(item))
        item.wait()
        x = torch.empty(0, dtype=packed.dtype, device=item.place)
        x.set_(item.device.untyped_storage(), packed.offset, packed.shape, packed.stride)
        item.readers -= 1
        if item.readers <= 0 and item.host is not None:
            item.device = None  # it is backward's alone; if that goes through its graph again, it is fetched again
        return x

    def _next(self, item: _Item) -> Iterator[_Item]:
        """What backward asks for behind `item`, three quarters of what a block sends: it travels while that computes.

        So a fused block's feed forward, which takes the most memory, goes backward with a quarter at most of the block before it on
        the device; and while its attention does, which is the quicker half, what that block begins with is on its way.
        """
        here, room = list(self.items.values()), sum(each.num_bytes for each in self.items.values()) * 3 // 4
        following = here[here.index(item) - 1 :: -1] if here[0] is not item else []
        following += [] if self.before is None else reversed(self.before.items.values())
        for each in following:
            if room <= 0:
                return
            room -= each.num_bytes
            if each.readers > 0:
                yield each

    def depart(self) -> None:
        """Send everything: the block has computed."""
        if self.items and not self.stays:
            self.gone = self.traffic.link.send([item.out() for item in self.items.values()])
            self.traffic.sent += sum(item.num_bytes for item in self.items.values())
        self.traffic.latest = weakref.ref(self)
        self.traffic.leaving.append(weakref.ref(self))

    def leave(self) -> None:
        """Let the device's memory go, behind the copies out."""
        if self.stays:
            return
        self.traffic.link.wait(self.gone)
        self.gone = None
        for item in self.items.values():
            item.device = None


class Traffic:
    """What the journeys of one model share. `sent`: bytes to the host so far."""

    def __init__(self, device: torch.device, link: Link | None = None, smallest: int | None = None) -> None:
        self.smallest = SMALLEST if smallest is None else smallest
        self.link = link or Link(device)
        self.memory = HostMemory(pinned=device.type == "cuda")
        self.leaving: deque[weakref.ref[Journey]] = deque()  # still on the device, in the order of their blocks
        self.latest: weakref.ref[Journey] | None = None
        self.sent = 0

    def make_room(self, unused: int) -> None:
        """Before a block computes: at most 1 + unused before it stay on the device. unused: blocks to come that keep everything."""
        while len(self.leaving) >= ON_THE_WAY + unused:
            if (leaving := self.leaving.popleft()()) is not None:
                leaving.leave()

    def journey(self, shared: set[int], stays: bool) -> Journey:
        """Of a block that is about to compute."""
        journey = Journey(self, shared, stays)
        journey.before = self.latest() if self.latest else None
        return journey

    def fetch(self, items: Iterable[_Item]) -> None:
        """Start the copies back of those that are away."""
        away = [item for item in items if item.device is None]
        if away:
            arrived = self.link.send([item.back() for item in away])
            for item in away:
                item.arrived = arrived

    def turn(self, first: Journey) -> None:
        """Backward begins, with `first`: all others leave the device."""
        while self.leaving:
            leaving = self.leaving.popleft()()
            if leaving is not None and leaving is not first:
                leaving.leave()


def travels(x: Tensor, shared: set[int], smallest: int) -> bool:
    """Whether a saved tensor is this block's own, and large: not one of the memories at the addresses `shared`."""
    if type(x) is not Tensor or not x.is_floating_point():  # DTensors and NF4 are weights, integers belong to masks
        return False
    return x.untyped_storage().nbytes() >= smallest and address(x) not in shared


def address(x: Tensor) -> int:
    """Where its memory begins, which a view of it shares."""
    return x.untyped_storage().data_ptr()


def addresses(values: Iterable[object]) -> set[int]:
    """Of the plain tensors among these."""
    return {address(value) for value in values if type(value) in (Tensor, nn.Parameter)}
