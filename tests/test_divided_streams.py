"""On a GPU the rows of a divided base travel on a stream of their own: every read of E waits for it, and it for every read. Seen by clocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_divided_blocks import LAYERS, distributed_run, divided, model_of
from test_fuse import batch, gradients
from test_step_graph import Replayed, assert_same, graphed, rows, run_batch, steps

from torchft import divided_blocks, step_graph
from torchft.divided_blocks import DividedBlocks, Linears, Slot
from torchft.modules.lora import adapters_off
from torchft.modules.transformer import CausalLM, KVCache
from torchft.step_graph import StepGraph

pytestmark = pytest.mark.usefixtures("on_the_cpu")
Clock = dict["Stream", int]  # of each stream, how many of its operations have been done by then for sure


class Stream:
    """Stands for one of CUDA's: its operations are done in order, and those of another one before, if it waits for them."""

    def __init__(self) -> None:
        self.clock: Clock = {self: 0}

    def operation(self) -> tuple["Stream", int]:
        self.clock[self] += 1
        return self, self.clock[self]

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        self.clock = {stream: max(self.clock.get(stream, 0), event.get(stream, 0)) for stream in {*self.clock, *event}}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Streams:
    """Two of them in place of CUDA's, and all that is read and written in slots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beside, self.current = Stream(), Stream()
        self.reads: dict[int, list] = {}  # by the slot's memory, since it was written; and the operations that wrote it
        self.writes: dict[int, list] = {}
        self.count = 0
        lay, extended, weights = DividedBlocks._lay, DividedBlocks.extended, DividedBlocks.weights
        fill, write_adapters = DividedBlocks._fill, divided_blocks.write_adapters

        def laid(blocks: DividedBlocks) -> None:
            lay(blocks)
            blocks._stream = self.beside

        def asked(blocks: DividedBlocks, index: int, *args: object) -> torch.Tensor:
            matrix = extended(blocks, index, *args)
            self.read(blocks._slot_of(index).memory)  # by the product that is launched now
            return matrix

        def asked_plainly(blocks: DividedBlocks, index: int) -> dict[int, torch.Tensor]:
            found = weights(blocks, index)
            self.read(blocks._slot_of(index).memory)
            return found

        def filled(blocks: DividedBlocks, matrix: torch.Tensor, group: Linears, held: list[torch.Tensor]) -> None:
            self.write(matrix)
            fill(blocks, matrix, group, held)

        def adapted(matrix: torch.Tensor, *args: object, **options: object) -> None:
            self.write(matrix)
            write_adapters(matrix, *args, **options)

        for name, function in {"_lay": laid, "extended": asked, "weights": asked_plainly, "_fill": filled}.items():
            monkeypatch.setattr(DividedBlocks, name, function)
        monkeypatch.setattr(divided_blocks, "write_adapters", adapted)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        yield
        self.current = before

    def read(self, memory: torch.Tensor) -> None:
        place = memory.untyped_storage().data_ptr()
        self.check(self.writes.get(place, []), "is read before it has arrived")
        self.reads.setdefault(place, []).append(self.current.operation())
        self.count += 1

    def write(self, memory: torch.Tensor) -> None:
        place = memory.untyped_storage().data_ptr()
        self.check(self.reads.get(place, []) + self.writes.get(place, []), "is written while it may be read")
        self.writes.setdefault(place, []).append(self.current.operation())

    def check(self, operations: list[tuple[Stream, int]], what: str) -> None:
        assert all(self.current.clock.get(stream, 0) >= number for stream, number in operations), f"a slot {what}"


    def assert_joined(self) -> None:
        assert self.current.clock[self.beside] == self.beside.clock[self.beside], "rows are on their way that nobody waits for"


def use(model: CausalLM) -> None:
    """Steps, a reference between forward and backward, answers with a cache, and what a CUDA graph does to the slots."""
    for _ in range(2):
        gradients(model)
    loss = model(**batch())
    with torch.no_grad(), adapters_off(model):
        model(**batch())
    loss.backward()
    with torch.no_grad():
        model(torch.arange(12).view(2, 6), cache=KVCache(model.config, 2, 6, torch.device("cpu")))
    model.model.layers[0].divided.forget()
    gradients(model)


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_no_slot_is_read_before_it_has_arrived_or_written_while_it_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recomputed: str
) -> None:
    streams = Streams(monkeypatch)
    monkeypatch.setattr(DividedBlocks, "_allocate", lambda blocks, numel, like: [like.new_empty(numel)])

    def work(rank: int) -> None:
        use(divided("all", (1,), copies=True, recomputed=recomputed))
        assert streams.count > 30 * LAYERS and streams.beside.clock[streams.beside] > 0

    distributed_run(1, tmp_path, work)


@pytest.mark.parametrize("variant", ["all", "one layer"])
def test_no_rows_are_on_their_way_when_a_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """A CUDA graph cannot be recorded else. Where the first layers have no adapters, backward ends above them."""
    streams = Streams(monkeypatch)
    monkeypatch.setattr(DividedBlocks, "_allocate", lambda blocks, numel, like: [like.new_empty(numel)])

    def work(rank: int) -> None:
        model = divided(variant, (1,), copies=True)
        for _ in range(2):
            gradients(model)
            streams.assert_joined()
        with torch.no_grad():
            model(**batch())
        streams.assert_joined()

    distributed_run(1, tmp_path, work)


def test_forgetting_waits_for_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is replayed then writes there, and knows nothing of what was begun before."""
    streams = Streams(monkeypatch)
    monkeypatch.setattr(DividedBlocks, "_allocate", lambda blocks, numel, like: [like.new_empty(numel)])

    def work(rank: int) -> None:
        model = divided("all", (1,), copies=True)
        gradients(model)
        blocks = model.model.layers[0].divided
        blocks.weights(2)  # and block 1 or 3 is on its way now
        blocks.forget()
        assert all(slot == Slot(slot.memory) for slot in blocks._slots)
        for slot in blocks._slots:
            streams.write(slot.memory)

    distributed_run(1, tmp_path, work)


def test_a_graph_fills_the_slots_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording computes nothing, and a replay leaves in them what it pleases (here NaN): steps before, between and behind go by neither."""
    plan = [[rows(n), rows(10 + n, tokens=36 if n == 5 else 37)] for n in range(7)]
    expected = steps(run_batch, model_of("all"), plan)
    streams = Streams(monkeypatch)
    monkeypatch.setattr(DividedBlocks, "_allocate", lambda blocks, numel, like: [like.new_empty(numel)])

    def work(rank: int) -> None:
        model, recorded = divided("all", (1,), copies=True), []
        blocks = model.model.layers[0].divided

        def spoil() -> None:
            for slot in blocks._slots:
                slot.memory.fill_(float("nan"))

        class Graph(Replayed):
            def replay(self) -> None:
                streams.assert_joined()
                before = [(slot.block, slot.ready, dict(slot.scales)) for slot in blocks._slots]
                super().replay()
                for slot, known in zip(blocks._slots, before, strict=True):  # a graph tells Python nothing
                    slot.block, slot.ready, slot.scales = known
                spoil()

        @contextmanager
        def graph(made: Graph, **options: str) -> Iterator[None]:
            streams.assert_joined()
            assert all(slot.block is None for slot in blocks._slots), "what the graph needs must be fetched in it"
            yield
            recorded.append(made)
            spoil()

        monkeypatch.setattr(step_graph, "why_not", lambda *args: "")
        monkeypatch.setattr(StepGraph, "_fits", lambda *args: True)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        assert_same(steps(graphed(model), model, plan), expected, 1e-5)
        assert len(recorded) == 1

    distributed_run(1, tmp_path, work)
