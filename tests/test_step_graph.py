"""A recorded micro-batch gives what the launches one by one give: gradients, their sums, and what later steps see."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_activations import Log
from test_fuse import ALL, adapted, batch
from test_fuse_bf16 import tokens_apart
from test_fuse_fp8 import in_fp8
from torch import Tensor

from torchft import step_graph
from torchft.config import PreferenceOptions
from torchft.data.loader import Batch
from torchft.fuse import swap
from torchft.modules.checkpointing import Probe, apply_activation_checkpointing, recompute_blocks
from torchft.modules.host_embedding import offload_embeddings, placed
from torchft.modules.int8_head import quantize_head
from torchft.modules.lora import LoraSpec, trainable_parameters
from torchft.modules.offload import Traffic
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM
from torchft.step_graph import PATIENCE, RUNS_BEFORE, StepGraph, why_not


def run_batch(model: CausalLM, rows: Batch, divisor: float | Tensor) -> Tensor:
    loss = model(rows.input_ids, positions=rows.positions, documents=rows.documents, labels=rows.labels)
    (loss / divisor).backward()
    return loss.detach()


def rows(seed: int = 0, device: str = "cpu", tokens: int = 37, documents: bool = True) -> Batch:
    """A micro-batch like test_fuse's, of other ids and labels for each seed."""
    tensors, generator = batch(tokens), torch.Generator().manual_seed(100 + seed)
    for name in ("input_ids", "labels"):
        tensors[name] = torch.where(tensors[name] >= 0, torch.randint(61, tensors[name].shape, generator=generator), -100)
    if not documents:
        tensors |= {"documents": None, "positions": torch.arange(tokens).repeat(2, 1)}
    return Batch(**tensors, num_tokens=2 * tokens, num_supervised=2 * tokens).to(device)


class Replayed:
    """In place of a graph: computes when it is replayed, into the very memory that it was given when it was recorded."""

    def replay(self) -> None:
        recorded = self.step._recorded
        kept = [param.grad for param in self.step._params]
        self.step._give_grads([None] * len(kept))
        recorded.sums.copy_(run_batch(self.model, recorded.batch, recorded.divisor))
        for grad, param in zip(recorded.grads, self.step._params, strict=True):
            grad.copy_(param.grad)
        self.step._give_grads(kept)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records on a CPU, too, as Replayed; what was recorded."""
    recorded: list[str] = []

    @contextmanager
    def graph(made: Replayed, **options: str) -> Iterator[None]:
        yield
        recorded.append("a graph")

    monkeypatch.setattr(step_graph, "why_not", lambda *args: "")
    monkeypatch.setattr(StepGraph, "_fits", lambda *args: True)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recorded


def steps(run: Callable, model: CausalLM, micro_batches: list[list[Batch]], rate: float = 0.1) -> list[Tensor]:
    """Losses and gradients of optimizer steps of these micro-batches; each step moves the adapters."""
    params, found = trainable_parameters(model), []
    for step in micro_batches:
        loss = torch.zeros((), device=step[0].input_ids.device)
        for each in step:
            loss += run(model, each, 50)
        found += [loss, *(param.grad.clone() for param in params.values())]
        with torch.no_grad():
            for param in params.values():
                param -= rate * param.grad
                param.grad.mul_(3)  # clipping changes them in place
        model.zero_grad(set_to_none=True)
    return found


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for left, right in zip(found, expected, strict=True):
        assert (left - right).norm() <= tolerance * right.norm()


def graphed(model: CausalLM) -> StepGraph:
    run = StepGraph(run_batch, model, {}, Log())
    Replayed.step, Replayed.model = run, model
    return run


PLANS = {
    "one": [[rows(n)] for n in range(6)],
    "two in a step": [[rows(n), rows(10 + n)] for n in range(4)],
    "three in a step": [[rows(n), rows(10 + n), rows(20 + n)] for n in range(3)],
    "another shape between": [[rows(n), rows(10 + n, tokens=36 if n == 3 else 37)] for n in range(6)],
    "without documents between": [[rows(n, documents=n != 4)] for n in range(7)],
}


def test_what_nobody_uses_is_gone_before_a_graph_is_recorded(recording: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is a circle, which waits for Python's collector. To free its memory may need the GPU, which is not to be asked then."""
    model, past, seen = fused(), fused(), []
    gone, graph = weakref.ref(past), torch.cuda.graph
    past.itself = [past]
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: seen.append(gone() is None) or graph(*args, **options))
    gc.disable()
    try:
        del past
        assert gone() is not None
        steps(graphed(model), model, PLANS["one"])
    finally:
        gc.enable()
    assert recording and all(seen)


@pytest.mark.parametrize("plan", PLANS)
def test_sums_of_gradients_are_those_of_the_plain_step(plan: str, recording: list[str]) -> None:
    expected = steps(run_batch, fused(), PLANS[plan])
    model = fused()
    found = steps(graphed(model), model, PLANS[plan])
    assert recording == ["a graph"]
    assert_same(found, expected, 1e-6)


def fused(**others: object) -> CausalLM:
    model = adapted(**others)
    assert swap(model, ALL).blocks == 3
    return model


def test_only_a_shape_that_stays_is_recorded(recording: list[str]) -> None:
    model = fused()
    run = graphed(model)
    for n in range(3 * RUNS_BEFORE):
        run(model, rows(n, tokens=36 + n % RUNS_BEFORE), 50)
    for n in range(2 * RUNS_BEFORE):  # a graph would be in the way of longer ones
        run(model, rows(n, tokens=36), 50)
    assert not recording
    for n in range(RUNS_BEFORE + 1):
        run(model, rows(n, tokens=38), 50)
        assert len(recording) == (n == RUNS_BEFORE)
    before = run._recorded
    recompute_blocks(model, range(2), offload=False)  # as `auto` decides after two steps
    run(model, rows(0, tokens=38), 50)
    assert run._shape[-2] == range(0) and run._recorded is before
    run(model, rows(0, tokens=39), 50)
    assert run._recorded is None and run._log.lines[0].startswith("CUDA graph: micro-batches of 2 x 38 tokens")


def test_that_there_is_none_is_said(recording: list[str]) -> None:
    model = fused()
    run = graphed(model)
    for n in range(PATIENCE):
        assert not run._log.lines
        run(model, rows(n, tokens=30 + n % 2), 50)
    assert run._log.lines == ["CUDA graph: none so far, since no 4 of the largest micro-batches came in a row and in one shape"]


def test_nothing_is_recorded_while_auto_measures(recording: list[str]) -> None:
    """When it has decided, what is sent to CPU memory is counted anew, and its buffers are made: in steps that are not recorded."""
    model = fused()
    offloaded(model)
    run, probe = graphed(model), Probe(2)
    model.model.checkpointing.probe = probe
    for n in range(2 * RUNS_BEFORE):
        run(model, rows(n), 50)
    offloaded(model)
    for n in range(RUNS_BEFORE):
        run(model, rows(n), 50)
        assert not recording
    sent = model.model.checkpointing.bytes_offloaded // RUNS_BEFORE
    for n in range(3):
        run(model, rows(n), 50)
    assert recording == ["a graph"] and run._recorded.offloaded == sent and run._recorded.held


def test_what_cannot_be_recorded_says_why() -> None:
    assert why_not(fused(), {"graph": "eager"}) == why_not(fused(), {"cross_entropy": "eager"}) == "model.kernels says so"
    assert why_not(fused(), {}) == "the model is not on a GPU"
    torch.use_deterministic_algorithms(True)
    try:
        assert why_not(fused(), {}).startswith("run.deterministic")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_step_that_cannot_be_recorded_names_the_switch(recording: list[str]) -> None:
    model, said = fused(), []

    def fails(*args: object) -> Tensor:
        if said:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run_batch(*args)

    run = StepGraph(fails, model, {}, Log())
    for n in range(RUNS_BEFORE):
        run(model, rows(n), 50)
    said.append("from here on it fails")
    with pytest.raises(RuntimeError) as caught:
        run(model, rows(9), 50)
    assert "model.kernels={graph: eager}" in caught.value.__notes__[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make, reason",
    [
        (adapted, "its blocks are not fused"),
        (lambda: fused(rope=RopeConfig(32, kind="dynamic", factor=2.0)), "its RoPE goes by the lengths of the documents"),
        (lambda: fused(final_logit_softcapping=30.0), "its logits are capped"),
    ],
)
def test_a_step_that_waits_or_draws_is_not_recorded(make: Callable[[], CausalLM], reason: str) -> None:
    log = Log()
    StepGraph(run_batch, make().cuda(), {}, log)
    assert log.lines == [f"CUDA graph: none, {reason}"]


def offloaded(model: CausalLM) -> None:
    apply_activation_checkpointing(model, "full", offload=True)
    model.model.checkpointing.traffic = Traffic(torch.device("cpu"), smallest=1)


def smallest() -> CausalLM:
    """4-bit linears, head in 8 bits, embedding in CPU memory, everything else sent there."""
    model = tokens_apart(adapted(nf4=True))
    table = model.model.embed_tokens.weight
    quantize_head(model)
    offload_embeddings(model)
    model = model.cuda()
    model.model.embed_tokens.weight = torch.nn.Parameter(placed(table.detach(), "cuda"), requires_grad=False)
    return model


ON_GPU: dict[str, tuple[Callable[[], CausalLM], str, bool]] = {
    "fp32": (lambda: adapted().cuda(), "none", False),
    "bf16": (lambda: tokens_apart(adapted(dtype=torch.bfloat16)).cuda(), "none", False),
    "recomputed": (lambda: tokens_apart(adapted(dtype=torch.bfloat16)).cuda(), "full", False),
    "offloaded": (lambda: tokens_apart(adapted(dtype=torch.bfloat16)).cuda(), "full", True),
    "smallest": (smallest, "full", True),
    "qk_norm": (lambda: tokens_apart(adapted(dtype=torch.bfloat16, qk_norm=True)).cuda(), "none", False),
    "biases": (lambda: tokens_apart(adapted(dtype=torch.bfloat16, qkv_bias=True, o_bias=True, mlp_bias=True)).cuda(), "none", False),
    "fp8": (lambda: tokens_apart(in_fp8(dtype=torch.bfloat16)).cuda(), "full", True),
    "nothing quantised, rank 70": (lambda: adapted(LoraSpec(rank=70, alpha=12)).cuda(), "none", False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [37, 256])
@pytest.mark.parametrize("kind", ON_GPU)
def test_a_graph_computes_what_its_launches_do(kind: str, tokens: int) -> None:
    make, mode, offload = ON_GPU[kind]
    plan = [[rows(n, "cuda", tokens), rows(10 + n, "cuda", tokens)] for n in range(4)]
    plan += [[rows(9, "cuda", tokens - 1)], [rows(8, "cuda", tokens)]]
    results, sent = [], []
    for recorded in (False, True):
        model = make()
        swap(model, ())
        apply_activation_checkpointing(model, mode, offload)
        if offload:
            model.model.checkpointing.traffic = Traffic(torch.device("cuda"), smallest=1)
        log = Log()
        run = StepGraph(run_batch, model, {}, log) if recorded else run_batch
        results.append(steps(run, model, plan, rate=0.001))
        sent.append(model.model.checkpointing.bytes_offloaded)
    assert len(log.lines) == 1 and log.figures["graph_gib"] > 0
    assert bool(run._recorded.held) == offload
    assert sent[0] == sent[1] and bool(sent[0]) == offload
    # The order of some sums is not fixed in attention's backward; large steps would let the difference grow.
    assert_same(results[1], results[0], 1e-5 if kind == "fp32" else 0.02)


def pairs(seed: int, device: str, tokens: int = 256) -> Batch:
    """One row with a prompt and two answers, another one with two such pairs."""
    generator, column = torch.Generator().manual_seed(seed), torch.arange(tokens)
    branches = torch.stack([(column >= 100).int() + (column >= 180), (column % 128 >= 50).int() + (column % 128 >= 90)])
    documents = torch.stack([torch.zeros(tokens), (column >= 128).float()]).int()
    sequences = 2 * torch.tensor([[0], [1]]) + 2 * documents + branches - 1
    sequences = torch.where(branches > 0, sequences, 6)
    labels = torch.where(branches > 0, torch.randint(61, (2, tokens), generator=generator), -100)
    starts = torch.tensor([[0, 100, 80], [0, 50, 40]])  # how far a branch's positions lie behind its columns
    shift = torch.where(branches == 2, starts[:, 2:], 0)
    positions = torch.stack([column, column % 128]) - shift
    ids = torch.randint(61, (2, tokens), generator=generator)
    return Batch(ids, labels, positions, documents, 2 * tokens, 2 * tokens, branches.int(), sequences, 6).to(device)


@pytest.mark.gpu
def test_a_step_of_preferences_is_recorded_with_its_reference() -> None:
    from torchft.recipes.dpo_distributed import run_batch as dpo_batch

    results, log = [], Log()
    for recorded in (False, True):
        model = tokens_apart(adapted(dtype=torch.bfloat16)).cuda()
        swap(model, ())
        run = StepGraph(dpo_batch, model, {}, log) if recorded else dpo_batch
        found = []
        for n in range(7):
            found.append(run(model, pairs(n, "cuda"), 3, model, PreferenceOptions()))
            found += [param.grad.clone() for param in trainable_parameters(model).values()]
            model.zero_grad(set_to_none=True)
        results.append(found)
    assert len(log.lines) == 1 and run._recorded is not None
    assert_same(results[1], results[0], 0.02)


@pytest.mark.gpu
def test_no_graph_where_there_is_no_room_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = fused().cuda(), Log()
    run = StepGraph(run_batch, model, {}, log)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2**40))
    for n in range(RUNS_BEFORE + 2):
        run(model, rows(n, "cuda"), 50)
    assert run._recorded is None and len(log.lines) == 1 and log.lines[0].startswith("CUDA graph: none, it wants")
