"""What travels to the host and back changes no bit, whenever its copies are made, and is where it may be at every moment."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

sys.path.append(str(Path(__file__).resolve().parent.parent))  # tests/

from processes import problems, run_processes  # noqa: E402
from test_fuse import ALL, VARIANTS, adapted, batch, fused, gradients  # noqa: E402
from test_fuse_fp8 import in_fp8  # noqa: E402
from tiny_training import hide_cuda  # noqa: E402

from torchft import fused_block  # noqa: E402
from torchft.crash import describe  # noqa: E402
from torchft.fuse import swap  # noqa: E402
from torchft.generate import generate  # noqa: E402
from torchft.modules.checkpointing import apply_activation_checkpointing, recompute_blocks  # noqa: E402
from torchft.modules.host_embedding import placed  # noqa: E402
from torchft.modules.lora import LoraSpec, adapters_off, trainable_parameters  # noqa: E402
from torchft.modules.offload import CannotPin, HostMemory, Journey, Link, Traffic  # noqa: E402
from torchft.modules.sharding import place, shard_model, whole  # noqa: E402
from torchft.modules.transformer import CausalLM  # noqa: E402

CPU = torch.device("cpu")
NAN = 0xFF  # four of these bytes are a NaN, and so are two


class LateLink(Link):
    """Makes each copy when it is waited for and no sooner, in order: the worst that a GPU's copying stream may do.

    `wrong`: copies that found their memory on the device given away.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.waiting: list[tuple[weakref.ref, Tensor, bool]] = []  # (on the device, on the host, outwards)
        self.made, self.wrong = 0, []
        self.hosts: dict[int, Tensor] = {}  # held: else another's memory on the "device" might come to lie there

    def send(self, copies: list[tuple[Tensor, Tensor]]) -> int:
        for to, origin in copies:
            outwards = origin.untyped_storage().data_ptr() not in self.hosts
            device, host = (origin, to) if outwards else (to, origin)
            self.hosts[host.untyped_storage().data_ptr()] = host
            to.fill_(NAN)  # what is read too early
            self.waiting.append((weakref.ref(device), host, outwards))
        return self.made + len(self.waiting)

    def wait(self, event: int | None) -> None:
        while event is not None and self.made < event:
            device, host, outwards = self.waiting.pop(0)
            self.made += 1
            if device() is None:
                self.wrong.append((self.made, outwards))
            elif outwards:
                host.copy_(device())
            else:
                device().copy_(host)


def offloaded(model: CausalLM, mode: str = "full", link: Link | None = None) -> CausalLM:
    """Everything of it travels, as small as it is."""
    apply_activation_checkpointing(model, mode, offload=True)
    model.model.checkpointing.traffic = Traffic(CPU, link or LateLink(), smallest=1)
    return model


def assert_same_bits(expected: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


MODELS: dict[str, Callable[[], CausalLM]] = {
    **{name: VARIANTS[name] for name in ("llama", "biases", "qk_norm", "window", "packed", "nf4", "one layer without rope")},
    "two linears": lambda: adapted(LoraSpec(rank=4, alpha=12, target_modules=("q_proj", "v_proj"))),
    "bf16": lambda: adapted(dtype=torch.bfloat16),
    "fp8": in_fp8,
    "fp8 bf16": lambda: in_fp8(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["full", "every_2"])
@pytest.mark.parametrize("variant", MODELS)
def test_no_bit_changes_however_late_copies_are_made(variant: str, mode: str) -> None:
    model = fused(MODELS[variant]())
    expected = gradients(model)
    traffic = offloaded(model, mode).model.checkpointing.traffic
    for _ in range(2):  # again in the same buffers
        assert_same_bits(expected, gradients(model))
    assert traffic.link.made > 20 and not traffic.link.wrong
    buffers = len(traffic.memory.buffers())
    gradients(model)
    assert len(traffic.memory.buffers()) == buffers > 5 and not traffic.leaving


def test_plain_blocks_send_their_inputs_alone_and_compute_all_else_again() -> None:
    model = adapted()
    expected = gradients(model)
    traffic = offloaded(model).model.checkpointing.traffic
    assert_same_bits(expected, gradients(model))
    assert traffic.sent == 2 * 2 * 37 * 128 * 4 and not traffic.link.wrong  # the third block's goes nowhere


@pytest.mark.parametrize("variant", ["llama", "fp8", "nf4", "packed"])
def test_fused_blocks_that_are_not_split_send_their_inputs_alone(variant: str) -> None:
    model = fused(MODELS[variant]())
    expected = gradients(model)
    apply_activation_checkpointing(model, "full", offload=True, splits=False)
    traffic = model.model.checkpointing.traffic = Traffic(CPU, LateLink(), smallest=1)
    assert_same_bits(expected, gradients(model))
    assert traffic.sent == 2 * 2 * 37 * 128 * 4 and not traffic.link.wrong


def test_fused_blocks_compute_gate_and_up_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("attend", "lora_norm_linear", "lora_linear", "lora_swiglu_linear"):
        function = getattr(fused_block, name)
        monkeypatch.setattr(
            fused_block, name, lambda *inputs, name=name, function=function: called.append(name) or function(*inputs)
        )
    for offload, splits, again in ((False, True, 2), (True, True, 1), (True, False, 2)):
        model = fused(adapted())
        apply_activation_checkpointing(model, "full", offload, splits)
        called.clear()
        gradients(model)
        counts = {name: called.count(name) for name in set(called)}
        once = 3 * again  # of 3 blocks; lora_norm_linear is qkv's and gate and up's
        assert counts == {"attend": once, "lora_linear": once, "lora_norm_linear": once + 6, "lora_swiglu_linear": 6}


def on_the_device(journeys: list[weakref.ref]) -> list[int]:
    """Bytes, of each journey that has any there."""
    alive = [journey() for journey in journeys if journey() is not None]
    held = [sum(item.num_bytes for item in journey.items.values() if item.device is not None) for journey in alive]
    return [num_bytes for num_bytes in held if num_bytes]


def test_at_most_two_blocks_are_on_the_device_and_little_more_than_one_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(num_hidden_layers=7)
    assert swap(model, ALL).blocks == 7
    offloaded(model)
    traffic, journeys, forward, backward = model.model.checkpointing.traffic, [], [], []
    begin, unpack = Traffic.journey, Journey.unpack

    def journey(self: Traffic, *args: object, **named: object) -> Journey:
        made = begin(self, *args, **named)
        forward.append(len(on_the_device(journeys)))
        journeys.append(weakref.ref(made))
        return made

    def watched(self: Journey, packed: object) -> Tensor:
        x, before = unpack(self, packed), journeys[: journeys.index(weakref.ref(self))]
        if isinstance(packed, Tensor):  # it never left; torch 2.11 asks for one before backward asks for anything else
            return x
        begins = packed.item is list(self.items.values())[-1]  # what attention adds, which the second half is recomputed from
        backward.append((begins, sum(on_the_device(journeys)), sum(on_the_device(before))))
        return x

    monkeypatch.setattr(Traffic, "journey", journey)
    monkeypatch.setattr(Journey, "unpack", watched)
    loss = model(**batch())
    assert forward == [0, 1, 1, 1, 1, 1, 1]  # of others, when a block begins
    block = traffic.sent // 6
    loss.backward()
    at_its_feed_forward = [ahead for begins, _, ahead in backward if begins]
    assert len(at_its_feed_forward) == 7 and 0 < max(at_its_feed_forward) <= block / 4
    assert block < max(held for _, held, _ in backward) <= 1.85 * block
    assert max(ahead for *_, ahead in backward) > 0.7 * block  # on its way while the attention goes backward
    assert on_the_device(journeys) == []


@pytest.mark.parametrize("blocks, on_their_way", [(range(5), [0, 1, 2, 3, 4, 4, 3, 2, 1]), (range(0, 9, 2), [0, 1, 1, 2, 2, 2, 2, 1, 1])])
def test_copies_have_the_time_until_kept_blocks_take_their_room(
    blocks: range, on_their_way: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks on the device whenever one begins: never more, with those that stay, than at the end, where all must have gone but one."""
    model = adapted(num_hidden_layers=9)
    assert swap(model, ALL).blocks == 9
    expected = gradients(model)
    offloaded(model)
    recompute_blocks(model, blocks, offload=True)
    traffic, journeys, found = Traffic(CPU, LateLink(), smallest=1), [], []
    model.model.checkpointing.traffic = traffic
    begin, make_room = Traffic.journey, Traffic.make_room

    def journey(self: Traffic, *args: object, **named: object) -> Journey:
        journeys.append(weakref.ref(made := begin(self, *args, **named)))
        return made

    def room(self: Traffic, unused: int) -> None:
        make_room(self, unused)
        found.append(len(on_the_device(journeys)))

    monkeypatch.setattr(Traffic, "journey", journey)
    monkeypatch.setattr(Traffic, "make_room", room)
    assert_same_bits(expected, gradients(model))
    assert found == on_their_way and not traffic.link.wrong


def test_what_blocks_share_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of RoPE, masks and weights; what travels is each memory once: h, q, k, v, the attention's output, delta."""
    model = fused(adapted())
    gradients(model)  # lays the weights anew
    traffic = offloaded(model, link=Link(CPU)).model.checkpointing.traffic
    places, shared = [], set()
    depart = Journey.depart

    def watched(self: Journey) -> None:
        places.append(set(self.items))
        shared.update(self.shared)
        depart(self)

    def note(module: torch.nn.Module, args: tuple) -> None:
        assert {args[1].data_ptr(), args[2].data_ptr(), args[3].data_ptr()} <= tables
        tables_seen.append(args[1].data_ptr())

    tables, tables_seen = set(), []
    monkeypatch.setattr(Journey, "depart", watched)
    begin = Traffic.journey
    monkeypatch.setattr(Traffic, "journey", lambda self, at, stays: tables.update(at) or begin(self, at, stays))
    for block in model.model.layers:
        block.register_forward_pre_hook(note)
    loss = model(**batch())
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert len(tables_seen) == 3 and shared == tables
    assert not any(place & (tables | weights) for place in places)
    rows, small = 2 * 37, 2 * 37 * (2 * 64 + 4 + 1) * 4 + 2 * 37 * 37 * 4  # x A^T twice, log-sums, 1/rms; SDPA's mask, of a CPU
    large = rows * (3 * 128 + 128 + 64 + 64) * 4
    assert traffic.sent == 2 * (large + small)
    loss.backward()


def test_what_is_small_stays() -> None:
    model = fused(adapted())
    traffic = offloaded(model).model.checkpointing.traffic
    traffic.smallest = 2 * 37 * 128 * 4
    gradients(model)
    assert traffic.sent == 2 * (2 * 37 * 4 * 128) * 4  # h, q, the attention's output, delta


def test_two_forwards_before_a_backward_and_one_that_never_comes() -> None:
    model = fused(adapted())

    def difference() -> list[Tensor]:
        model.zero_grad()
        (model(**batch(37)) - model(**batch(21))).backward()
        return [param.grad.clone() for param in trainable_parameters(model).values()]

    expected = difference()
    traffic = offloaded(model).model.checkpointing.traffic
    assert all(map(torch.equal, difference(), expected))
    buffers = len(traffic.memory.buffers())
    model(**batch(37))
    assert all(map(torch.equal, difference(), expected)) and not traffic.link.wrong
    assert len(traffic.memory.buffers()) == buffers


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("blocks", [range(5), range(3), range(0, 5, 2), range(1, 5, 2)])
def test_whatever_is_computed_between_forward_and_backward(blocks: range, splits: bool) -> None:
    """Rows of other lengths, forwards without gradients or without a backward, graphs gone through twice and in another order."""
    model = adapted(num_hidden_layers=5)
    swap(model, ALL)

    def mixed() -> list[Tensor]:
        model.zero_grad()
        model(**batch(25))
        first = model(**batch(37))
        model(**batch(30))
        with torch.no_grad():
            model(**batch(21))
        second = model(**batch(21))
        (first / 50).backward(retain_graph=True)
        second.backward()
        first.backward()
        return [param.grad.clone() for param in trainable_parameters(model).values()]

    expected = mixed()
    recompute_blocks(model, blocks, offload=True, splits=splits)
    traffic = model.model.checkpointing.traffic = Traffic(CPU, LateLink(), smallest=1)
    for _ in range(3):
        assert all(map(torch.equal, mixed(), expected)) and not traffic.link.wrong


@pytest.mark.parametrize("mode", ["none", "full", "offloaded"])
def test_a_graph_that_is_kept_can_be_gone_through_again(mode: str) -> None:
    """Only what is computed or fetched for one backward may be written over in it."""
    model = fused(adapted())
    expected = gradients(model)[1]
    apply_activation_checkpointing(model, "none" if mode == "none" else "full")
    traffic = offloaded(model).model.checkpointing.traffic if mode == "offloaded" else None
    loss = model(**batch()) / 50
    for keep in (True, False):
        model.zero_grad()
        try:
            loss.backward(retain_graph=keep)
        except RuntimeError as error:  # autograd's own check of what was written over; a kernel's writing escapes it
            pytest.fail(str(error))
        assert all(torch.equal(param.grad, expected[name]) for name, param in trainable_parameters(model).items())
    assert traffic is None or not traffic.link.wrong


def test_per_token_logprobs_and_a_reference_without_adapters() -> None:
    """As DPO does: nothing is sent without gradients, and the policy's gradients are the same."""
    model = fused(adapted())

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.no_grad(), adapters_off(model):
            reference = model(**batch(), per_token=True)
        policy = model(**batch(), per_token=True)
        torch.sigmoid(policy - reference).sum().backward()
        return [reference, policy.detach(), *(param.grad.clone() for param in trainable_parameters(model).values())]

    expected = step()
    traffic = offloaded(model).model.checkpointing.traffic
    assert all(map(torch.equal, step(), expected)) and not traffic.link.wrong
    sent = traffic.sent
    with torch.no_grad():
        model(**batch(), per_token=True)
    assert traffic.sent == sent


def test_generation_sends_nothing() -> None:
    model = fused(adapted())
    prompts = [[1, 2, 3], [4, 5]]
    expected = generate(model, prompts, max_new_tokens=4, stop_ids=set())
    traffic = offloaded(model).model.checkpointing.traffic
    assert generate(model, prompts, max_new_tokens=4, stop_ids=set()) == expected and traffic.sent == 0


def test_buffers_are_reused_and_not_one_for_each_length() -> None:
    memory = HostMemory(pinned=False)
    small, large = memory.take(10), memory.take(30)
    memory.give(large)
    memory.give(small)
    assert memory.take(11) is large and memory.take(9) is small and not memory.buffers()
    memory.give(small)
    assert memory.take(20).numel() == 20 and not memory.buffers()  # in the place of the smaller one
    model = offloaded(fused(adapted()))
    for tokens in (20, 37, 25, 30, 21):
        model(**batch(tokens)).backward()
    buffers = model.model.checkpointing.traffic.memory.buffers()
    model(**batch(37)).backward()
    model(**batch(22)).backward()
    assert {id(buffer) for buffer in model.model.checkpointing.traffic.memory.buffers()} == {id(buffer) for buffer in buffers}
    assert len(buffers) == 2 * 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned there")
def test_memory_that_cannot_be_pinned_is_told() -> None:
    with pytest.raises(CannotPin, match="model.offload: activations: 3 MiB more .* could not be pinned"):
        HostMemory(pinned=True).take(3 * 2**20)
    with pytest.raises(CannotPin, match="model.offload: embeddings: 3 MiB more .* leave more of it free"):
        placed(torch.empty(3, 2**18), "cuda")
    text, code = describe(CannotPin, CannotPin("embeddings", 2**30, "leave more of it free", RuntimeError("no driver\nat all")), None)
    assert text.startswith("error: model.offload: embeddings: 1,024 MiB more") and "(no driver). Raise" in text and code == 1


def test_divided_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers a block's weights for the second half, too, which runs inside backward."""
    hide_cuda(monkeypatch)
    loss, grads = gradients(fused(adapted()))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = fused(adapted())
        values = {name: param.detach() for name, param in model.named_parameters()}
        for name, value in values.items():  # on meta again, as a recipe has it
            module, _, leaf = name.rpartition(".")
            kept = getattr(model.get_submodule(module), leaf).requires_grad
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value.to("meta"), requires_grad=kept))
        offloaded(model)
        shard_model(model, init_device_mesh("cpu", (2,)))
        for name, value in values.items():
            module, _, leaf = name.rpartition(".")
            place(model.get_submodule(module), leaf, value)
        found = model(**batch())
        (found / 50).backward()
        assert found.item() == pytest.approx(loss, rel=1e-6)
        assert model.model.checkpointing.bytes_offloaded > 0 and not model.model.checkpointing.traffic.link.wrong
        for name, param in trainable_parameters(model).items():
            assert (whole(param.grad) - grads[name]).norm() <= 1e-5 * grads[name].norm(), name
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)


def test_a_link_copies_behind_the_computing_stream_and_tells_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a GPU is given: by streams that only write down."""
    said: list[object] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            said.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            said.append("event")
            return "event"

    class Noted:
        def copy_(self, origin: object, non_blocking: bool) -> None:
            said.append(("copy on", inside[-1].name, non_blocking))

    inside = [Stream("compute")]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        inside.append(stream)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: inside[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    link = Link(CPU)
    link.stream = Stream("side")
    link.wait(link.send([(Noted(), None), (Noted(), None)]))
    copies = [("copy on", "side", True)] * 2
    assert said == ["side waits for compute", *copies, "event", "compute waits for event"]
