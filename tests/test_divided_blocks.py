"""Frozen weights of fused blocks over processes: the same losses, gradients and answers; who holds what, and when it is fetched."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from processes import problems, run_processes
from test_fuse import ALL, adapted, batch, config, gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from torchft import distributed, divided_blocks
from torchft.config import ModelConfig
from torchft.divided_blocks import DividedBlocks, divide_blocks
from torchft.fuse import swap
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.lora import LoraSpec, adapters_off, add_lora
from torchft.modules.nf4 import quantize_nf4
from torchft.modules.sharding import divided_like, local, rows_held, whole
from torchft.modules.transformer import CausalLM, KVCache

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LAYERS = 5
TOLERANCE = 1e-5


def model_of(variant: str, device: str = "cpu") -> CausalLM:
    """With adapters on all linears, on two, on those of one layer, or biases or packed linears besides; its blocks are fused."""
    few = {"few adapters": ("q_proj", "down_proj"), "one layer": ("layers.2.self_attn.v_proj", "layers.2.mlp.up_proj")}
    spec = LoraSpec(rank=4, alpha=12, target_modules=few[variant]) if variant in few else None
    others = {"packed": {"packed_qkv": True, "packed_gate_up": True}, "biased": {"qkv_bias": True, "mlp_bias": True}}.get(variant, {})
    model = adapted(spec, num_hidden_layers=LAYERS, **others).to(device)
    swap(model, ALL if device == "cpu" else ())
    return model


def divided(
    variant: str, shape: tuple[int, ...], *, copies: bool = False, recomputed: str = "none", device: str = "cpu"
) -> CausalLM:
    """The same model, of which this process holds its rows."""
    model = model_of(variant, device)
    apply_activation_checkpointing(model, recomputed)
    values = {}
    for block in model.model.layers:
        for linear in sum(block.groups().values(), []):
            values[linear] = linear.weight.detach()
            linear.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    names = ("copies", "shard")[2 - len(shape) :]
    assert divide_blocks(model, init_device_mesh(device, shape, mesh_dim_names=names), copies=copies) == len(values)
    for linear, value in values.items():
        part = value[rows_held(linear.weight)].clone()
        linear.weight = torch.nn.Parameter(divided_like(part, linear.weight), requires_grad=False)
    return model


def distributed_run(processes: int, folder: Path, work: Callable[[int], None]) -> None:
    def joined(rank: int) -> None:
        dist.init_process_group("gloo")
        work(rank)
        dist.barrier()
        dist.destroy_process_group()

    assert run_processes(processes, joined, folder) == [0] * processes, problems(folder)


def assert_near(ours: tuple, theirs: tuple) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= TOLERANCE * grad.norm(), name


@pytest.mark.parametrize("recomputed", ["none", "full", "every_2"])
@pytest.mark.parametrize("variant, shape", [("all", (2,)), ("few adapters", (4,)), ("one layer", (2,)), ("biased", (2, 2)), ("packed", (2,))])
def test_losses_and_gradients_are_those_of_the_whole_model(tmp_path: Path, variant: str, shape: tuple[int, ...], recomputed: str) -> None:
    """Three steps between which adapters change, and one without gradients: what stays in a slot has the adapters of then."""
    alone = model_of(variant)
    expected = []
    for step in range(3):
        expected.append(gradients(alone))
        with torch.no_grad():
            for param in alone.parameters():
                if param.requires_grad:
                    param.sub_(param.grad * 0.1 * (step + 1))
    with torch.no_grad():
        last = alone(**batch()).item()
    names = {name: param.detach().clone() for name, param in alone.named_parameters()}

    def work(rank: int) -> None:
        model = divided(variant, shape, recomputed=recomputed)
        for step in range(3):
            assert_near(gradients(model), expected[step])
            with torch.no_grad():
                for param in model.parameters():
                    if param.requires_grad:
                        param.sub_(param.grad * 0.1 * (step + 1))
        with torch.no_grad():
            assert model(**batch()).item() == pytest.approx(last, rel=TOLERANCE)
        assert [name for name, _ in model.named_parameters()] == list(names)
        for name, param in model.named_parameters():
            if not param.requires_grad:  # as it was loaded, to the bit, and by its rows
                assert torch.equal(whole(param), names[name]), name

    distributed_run(shape[0] if len(shape) == 1 else shape[0] * shape[1], tmp_path, work)


def test_a_reference_between_forward_and_backward(tmp_path: Path) -> None:
    """The last block's E is still there when backward begins, but with the adapters of another forward."""
    alone = model_of("all")
    expected = gradients(alone)
    with torch.no_grad(), adapters_off(alone):
        reference = alone(**batch()).item()

    def work(rank: int) -> None:
        model = divided("all", (2,))
        model.zero_grad()
        loss = model(**batch())
        with torch.no_grad(), adapters_off(model):
            assert model(**batch()).item() == pytest.approx(reference, rel=TOLERANCE)
        (loss / 50).backward()
        assert_near((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}), expected)

    distributed_run(2, tmp_path, work)


def test_generating_with_a_cache(tmp_path: Path) -> None:
    """The plain forward, between two fused ones."""
    alone, ids = model_of("all"), torch.arange(12).view(2, 6)

    def logits(model: CausalLM) -> torch.Tensor:
        cache = KVCache(model.config, 2, 6, torch.device("cpu"))
        with torch.no_grad():
            return torch.cat([model(ids[:, :4], cache=cache), model(ids[:, 4:], cache=cache)], dim=1)

    wanted, expected = logits(alone), gradients(alone)

    def work(rank: int) -> None:
        model = divided("all", (2,))
        for _ in range(2):
            torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
            assert_near(gradients(model), expected)
        assert all(isinstance(model.model.layers[0].get_submodule(name).weight, DTensor) for name in ("self_attn.q_proj", "mlp.up_proj"))

    distributed_run(2, tmp_path, work)


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_a_block_is_fetched_while_the_one_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recomputed: str) -> None:
    """In forward and backward alike; nothing twice. Only the very first block is waited for."""
    events, fetch, use = [], DividedBlocks._fetch, DividedBlocks.extended

    def spy_fetch(self: DividedBlocks, index: int) -> object:
        events.append(("fetch", index))
        return fetch(self, index)

    def spy_use(self: DividedBlocks, index: int, *args: object) -> torch.Tensor:
        result = use(self, index, *args)
        events.append(("use", index))
        return result

    monkeypatch.setattr(DividedBlocks, "_fetch", spy_fetch)
    monkeypatch.setattr(DividedBlocks, "extended", spy_use)

    def work(rank: int) -> None:
        model = divided("all", (2,), recomputed=recomputed)
        for step in range(2):
            events.clear()
            gradients(model)
            fetched = [index for kind, index in events if kind == "fetch"]
            # block 0 and 1 are still there when the second step begins, and 4 and 3 when backward does
            assert fetched == [*([0, 1] if step == 0 else []), 2, 3, 4, 2, 1, 0], fetched
            for place, (kind, index) in enumerate(events):
                if kind == "fetch" and (step, place) != (0, 0):
                    used = [other for what, other in events[place:] if what == "use"]
                    assert used[0] != index and index in used, (place, events)
        slots = model.model.layers[0].divided._slots
        assert len(slots) == 2 and all(block.divided is model.model.layers[0].divided for block in model.model.layers)

    distributed_run(2, tmp_path, work)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)])
def test_rows_copied_out_of_the_others_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Here in memory that the processes share. Each holds its part of the weights and no more; of two copies each reads its own."""
    parts, expected = shape[-1], gradients(model_of("all"))
    processes = parts * (shape[0] if len(shape) == 2 else 1)
    shared = [[torch.empty(2**18).share_memory_() for _ in range(processes)] for _ in range(LAYERS)]

    def work(rank: int) -> None:
        of_this_copy = slice(rank - rank % parts, rank - rank % parts + parts)
        blocks = iter(shared)

        def allocate(self: DividedBlocks, wanted: int, like: torch.Tensor) -> list[torch.Tensor]:
            return [memory[:wanted] for memory in next(blocks)[of_this_copy]]

        monkeypatch.setattr(DividedBlocks, "_allocate", allocate)
        monkeypatch.setattr(divided_blocks, "all_gather", None)  # nothing is gathered
        model = divided("all", shape, copies=True)
        assert_near(gradients(model), expected)
        assert_near(gradients(model), expected)
        for block, memory in zip(model.model.layers, shared, strict=True):
            for linear in sum(block.groups().values(), []):
                part = local(linear.weight)
                assert part.shape[0] == linear.out_features // parts
                assert part.untyped_storage().data_ptr() == memory[rank].untyped_storage().data_ptr()

    distributed_run(processes, tmp_path, work)


def test_memory_that_is_not_what_it_seems_is_no_wrong_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 sees another block of process 0's, as where a pool of memory is used again in another order."""
    shared = [[torch.empty(2**18).share_memory_() for _ in range(2)] for _ in range(LAYERS)]

    def work(rank: int) -> None:
        places = iter(range(LAYERS))

        def allocate(self: DividedBlocks, wanted: int, like: torch.Tensor) -> list[torch.Tensor]:
            place = next(places)
            of_0 = {2: 3, 3: 2}.get(place, place) if rank == 1 else place
            return [shared[of_0][0][:wanted], shared[place][1][:wanted]]

        monkeypatch.setattr(DividedBlocks, "_allocate", allocate)
        model = divided("all", (2,), copies=True)
        if rank == 0:
            gradients(model)
        else:
            with pytest.raises(RuntimeError, match="process 1 of 2 .* what process 0 holds, of 2 of 5 blocks.*peers: eager"):
                gradients(model)

    distributed_run(2, tmp_path, work)


def in_this_process(monkeypatch: pytest.MonkeyPatch, rendezvous: Callable[..., object]) -> None:
    """Symmetric memory without a GPU, for a process that is alone."""
    monkeypatch.setattr(symmetric, "get_mempool_allocator", lambda device: None)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator, **options: object())
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: nullcontext())


def test_what_is_moved_does_not_stay_in_the_allocators_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that others read comes from the driver, which fails where a cache holds the rest: 70B on two H200s is there once, not twice."""
    expected, events = gradients(model_of("all")), []
    in_this_process(monkeypatch, lambda mine, group: events.append("taken"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))

    def work(rank: int) -> None:
        assert_near(gradients(divided("all", (1,), copies=True)), expected)
        assert events == ["emptied", "taken"] * LAYERS

    distributed_run(1, tmp_path, work)


def test_no_model_is_given_the_memory_of_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a model are in one pool, which no other model has."""
    pools = []
    in_this_process(monkeypatch, lambda mine, group: None)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: nullcontext(pools.append(pool)))

    def work(rank: int) -> None:
        for _ in range(2):
            gradients(divided("all", (1,), copies=True))
        assert [pools.index(pool) for pool in pools] == [0] * LAYERS + [LAYERS] * LAYERS

    distributed_run(1, tmp_path, work)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_sees_a_bit_and_takes_no_memory_beside_it(dtype: torch.dtype) -> None:
    """By then the GPU may be full."""
    memory = torch.randn(2**16, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        before = divided_blocks._sum(memory)
    assert 0 < sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 1000
    memory.view(torch.int16)[12345] ^= 1
    assert not torch.equal(divided_blocks._sum(memory), before)


@pytest.mark.parametrize("where", ["get_mempool_allocator", "MemPool", "rendezvous"])
def test_gpus_that_cannot_open_their_memory_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA driver error: operation not permitted")

    in_this_process(monkeypatch, fail)
    if where != "rendezvous":
        monkeypatch.setattr(torch.cuda if where == "MemPool" else symmetric, where, fail)

    def work(rank: int) -> None:
        with pytest.raises(RuntimeError, match="not permitted") as caught:
            gradients(divided("all", (1,), copies=True))
        assert "model.kernels={peers: eager}" in caught.value.__notes__[0]

    distributed_run(1, tmp_path, work)


@pytest.mark.parametrize(
    "switches, backend, expandable, why",
    [
        ({}, "native", False, ""),
        ({"peers": "eager"}, "native", False, "model.kernels"),
        ({}, "native", True, "PYTORCH_CUDA_ALLOC_CONF"),
        ({}, "cudaMallocAsync", False, "PYTORCH_CUDA_ALLOC_CONF"),
    ],
)
def test_memory_that_others_cannot_read(
    monkeypatch: pytest.MonkeyPatch, switches: dict[str, str], backend: str, expandable: bool, why: str
) -> None:
    """torch's pool of it refuses expandable_segments ("MemPool doesn't currently support"), and other backends have no pools."""
    monkeypatch.setattr(distributed, "_sees_peers", lambda parts, device: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    settings = {"allocator_settings": {"expandable_segments": expandable}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: settings)
    reason = distributed._why_gathered(ModelConfig(kernels=switches), 2, torch.device("cuda"))
    assert why in reason and bool(why) == bool(reason)


def test_what_is_divided_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 has models with quantised or plain blocks, uneven rows, more than adapters trained, and adapters that are large."""

    def report(nf4: bool = False, kernels: bool = True, trained: str = "", **others: int) -> str:
        with torch.device("meta"):
            model = CausalLM(config(**{"hidden_size": 256, "intermediate_size": 512} | others))
        add_lora(model, LoraSpec(rank=4, alpha=12))
        if nf4:
            quantize_nf4(model)
        if kernels:
            swap(model, ALL)
        for name, param in model.named_parameters():
            if trained and name.startswith(trained):
                param.requires_grad_(True)
        return str(distributed.divide(model, ModelConfig(shard="all"), torch.device("cpu")))

    def work(rank: int) -> None:
        alone = "21 tensors divided over 2 processes, gathered (this process cannot read the others' memory) while the block before"
        assert report() == f"{alone} computes; all else is whole on each"
        for case in ({"nf4": True}, {"kernels": False}, {"intermediate_size": 511}, {"trained": "lm_head"}):
            assert "gathered" not in report(**case) and "divided over 2" in report(**case), case
        monkeypatch.setattr(distributed, "ADAPTERS_FIT", 0)
        monkeypatch.setattr(distributed.math, "inf", 10**12)
        assert "gathered" not in report()

    distributed_run(2, tmp_path, work)


@pytest.mark.parametrize(
    "rank, local_rank, on_host, parts, seen",
    [(0, 0, 2, 2, True), (1, 1, 2, 2, True), (0, 0, 1, 2, False), (3, 1, 2, 4, False), (3, 1, 2, 2, True), (5, 1, 4, 4, True), (2, 2, 3, 4, False)],
)
def test_whose_memory_can_be_read(monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, on_host: int, parts: int, seen: bool) -> None:
    """Those of the same host, whose GPUs say so."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_host))
    asked = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: asked.append((mine, other)) or True)
    assert distributed._sees_peers(parts, torch.device("cuda")) is seen
    assert all(mine == local_rank and 0 <= other < on_host and other != mine for mine, other in asked)
    assert not distributed._sees_peers(parts, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: False)
    assert not distributed._sees_peers(parts, torch.device("cuda"))
