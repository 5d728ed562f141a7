"""The router's auxiliary loss: transformers' for one batch; one gradient however a step is cut, packed, computed or divided."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import problems, run_processes
from small_models import CASES, make_twins
from test_moe_distributed import SIZES
from test_parity import assert_same_gradients
from tiny_training import hide_cuda
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from torchft.balance import balance_routers
from torchft.config import ModelConfig, OptimConfig, RunConfig, SourceConfig
from torchft.data.dataset import Dataset
from torchft.data.loader import Batch, make_batch
from torchft.distributed import join_processes, leave_processes
from torchft.invariances import difference, gradients
from torchft.models import build_model, build_reward_model, model_config
from torchft.modules.attention import PADDING
from torchft.modules.balance import RouterBalance
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.compiler import missing_compiler
from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.nf4 import quantize_nf4
from torchft.modules.offload import Traffic
from torchft.modules.routing import route
from torchft.modules.sharding import cut, local, shard_model
from torchft.modules.transformer import CausalLM
from torchft.weights import random_weights

CPU = torch.device("cpu")
COEF = 20.0  # large, so that the loss has a part in every gradient
MIXTURES = [name for name, case in CASES.items() if case["model_type"] in ("qwen3_moe", "mixtral", "gpt_oss")]
LENGTHS = (70, 41)  # of two rows


def balanced(case: dict, coef: float = COEF) -> dict:
    return case | {"output_router_logits": True, "router_aux_loss_coef": coef}


@pytest.mark.parametrize("name", MIXTURES)
def test_one_batch_equals_transformers(name):
    """The auxiliary loss and the gradients of the sum, with padding."""
    reference, ours, ids = make_twins(balanced(CASES[name]))
    real = torch.arange(70) < torch.tensor(LENGTHS)[:, None]
    labels = torch.randint(reference.config.vocab_size, ids.shape).masked_fill(~real, -100)
    labels[0, :9] = -100
    out = reference(ids, attention_mask=real.long(), output_router_logits=True)
    loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()) + COEF * out.aux_loss
    loss.backward()

    documents, positions = torch.where(real, 0, PADDING).int(), torch.arange(70).expand(2, -1)
    batch = Batch(ids, labels, positions, documents, sum(LENGTHS), int((labels >= 0).sum()))
    found = balance_routers(ours, [batch], CPU)["aux_loss"]
    assert found.item() == pytest.approx(out.aux_loss.item(), rel=1e-5)
    (ours(ids, positions=positions, documents=documents, labels=labels) / batch.num_supervised).backward()
    assert_same_gradients(ours, reference)


def test_the_loss_is_felt_and_scales():
    """So that what is equal below is not equal for want of it; the value returned is the cross entropy alone."""
    steps = {}
    for coef in (None, COEF, 2 * COEF):
        _, model, ids = make_twins(CASES["qwen3-moe"] if coef is None else balanced(CASES["qwen3-moe"], coef))
        batch = Batch(ids, ids.roll(-1, 1), torch.arange(70).expand(2, -1), None, 140, 140)
        balance_routers(model, [batch], CPU)
        loss = model(ids, labels=batch.labels)
        loss.backward()
        steps[coef] = (loss.item(), {name: param.grad for name, param in model.named_parameters()})
    assert steps[None][0] == steps[COEF][0]
    plain, once, twice = (steps[coef][1] for coef in (None, COEF, 2 * COEF))
    for name, grad in plain.items():
        if "gate.weight" in name or "embed" in name:
            assert (once[name] - grad).norm() > 0.01 * grad.norm(), name
        torch.testing.assert_close(twice[name] - grad, 2 * (once[name] - grad), rtol=1e-3, atol=1e-3)


def test_by_itself_it_evens_the_experts_out():
    """Nothing is supervised: what is left of the gradient is the auxiliary loss's. Each token takes one of five experts."""
    _, model, ids = make_twins(balanced(CASES["mixtral-one"], 1.0))
    batch, found = Batch(ids, torch.full_like(ids, -100), torch.arange(70).expand(2, -1), None, 140, 0), []
    for _ in range(40):
        found.append(balance_routers(model, [batch], CPU)["aux_loss"].item())
        model(ids, labels=batch.labels).backward()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param -= 1.0 * param.grad if name.endswith("block_sparse_moe.gate.weight") else 0.0
                param.grad = None
    assert found[0] > 1.05 and abs(found[-1] - 1) < 0.2 * (found[0] - 1), found  # 1: all are equally busy


def samples() -> Dataset:
    """Eight of uneven length, the second half of each trained."""
    lengths = np.array([30, 7, 21, 16, 40, 11, 25, 18], np.int64)
    drawn = np.random.default_rng(0)
    return Dataset(
        ids=drawn.integers(1, 97, lengths.sum()).astype(np.int32),
        supervised=np.concatenate([(np.arange(n) >= n // 2) & (np.arange(n) < n - 1) for n in lengths]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        source=np.zeros(8, np.int64),
        row=np.arange(8),
        sources=[SourceConfig(path="x.jsonl")],
        reports=[],
        key="data.train",
    )


DATA = samples()
SUPERVISED = int(DATA.num_supervised.sum())


def batches(groups: list[list[int]], packing: bool = False) -> list[Batch]:
    """One batch a group: rows of one sample each, or with `packing` one row of all its samples."""
    return [
        make_batch(
            DATA,
            [np.array(group)] if packing else [np.array([sample]) for sample in group],
            num_rows=1 if packing else max(1, len(group)),
            max_seq_len=112,
            packing=packing,
        )
        for group in groups
    ]


def mixture(kind: str, prepare: Callable[[CausalLM], object] = lambda model: None) -> CausalLM:
    """Of two layers; all weights trained, or adapters everywhere, over NF4 too."""
    case = {"gpt_oss": CASES["gpt-oss"], "mixtral": CASES["mixtral"]}.get(kind, CASES["qwen3-moe"])
    sizes = {"moe_intermediate_size" if "moe_intermediate_size" in case else "intermediate_size": 128}
    with torch.device("meta"):
        model = build_model(balanced({key: value for key, value in (case | SIZES | sizes).items() if value is not None}))
    adapted = kind in ("lora", "nf4")
    if adapted:
        add_lora(model, LoraSpec(4, 10.0))
    if kind == "nf4":
        assert any("experts" in name for name in quantize_nf4(model).quantized)
    prepare(model)
    random_weights(model, seed=0, device=CPU, dtype=torch.float32)
    init_lora(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, param in trainable_parameters(model).items() if adapted else ():
            value = 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
            param.copy_(cut(value, param))
    return model


def recompute(model: CausalLM) -> None:
    apply_activation_checkpointing(model, "full")


def offload(model: CausalLM) -> None:
    apply_activation_checkpointing(model, "full", offload=True)
    model.model.checkpointing.traffic = Traffic(CPU, smallest=1)


def compile_last(model: CausalLM) -> None:
    model.model.layers[-1].compile(backend="aot_eager")


WHOLE = [list(range(8))]
CUTS = {
    "two batches": batches([[0, 1, 2, 3], [4, 5, 6, 7]]),
    "four batches": batches([[0, 7], [1, 6], [2, 5], [3, 4]]),
    "packed": batches([[0, 1, 2, 3], [4, 5, 6, 7]], packing=True),
    "packed in one row": batches([[4, 0, 2, 1]], packing=True) + batches([[3, 5], [6, 7]]),
    "a batch of padding": [*batches(WHOLE), make_batch(DATA, [], num_rows=2, max_seq_len=112, packing=True)],
}


@pytest.fixture(scope="module")
def expected() -> Callable[[str], dict]:
    """The gradients of the step as one batch, by kind of model."""
    made = {}

    def once(kind: str) -> dict:
        if kind not in made:
            made[kind] = gradients(mixture(kind), batches(WHOLE), SUPERVISED, CPU)
        return made[kind]

    return once


@pytest.mark.parametrize("kind", ["full", "lora", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", CUTS)
def test_a_step_does_not_depend_on_how_it_is_cut(expected, kind, name):
    found = difference(gradients(mixture(kind), CUTS[name], SUPERVISED, CPU), expected(kind))
    assert found[0] <= 1e-5, found


@pytest.mark.parametrize("prepare", [recompute, offload])
@pytest.mark.parametrize("kind", ["full", "nf4", "gpt_oss"])
def test_nor_on_what_is_computed_again(expected, kind, prepare):
    found = difference(gradients(mixture(kind, prepare), CUTS["two batches"], SUPERVISED, CPU), expected(kind))
    assert found[0] <= 1e-5, found


def test_two_processes_are_one(expected, tmp_path, monkeypatch):
    """Divided by FSDP2, of uneven shares, in two batches each; all weights, and adapters over NF4."""
    hide_cuda(monkeypatch)
    shares = [batches([[0, 1, 2], [3, 4]]), batches([[5], [6, 7]])]
    wanted = {kind: expected(kind) for kind in ("full", "nf4")}

    def work(rank: int) -> None:
        join_processes(ModelConfig(), OptimConfig(), RunConfig(global_batch_size=2))
        for kind, alone in wanted.items():
            model = mixture(kind, lambda model: shard_model(model, init_device_mesh("cpu", (2,))))
            assert any(local(param) is not param for param in model.parameters())
            found = difference(gradients(model, shares[rank], SUPERVISED, CPU), alone)
            assert found[0] <= 1e-5, (kind, found)
        leave_processes()

    assert run_processes(2, work, tmp_path) == [0, 0], problems(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_nor_on_the_compiler(expected):
    """Below the tests that fork: a fork does not survive the compiler's workers."""
    found = difference(gradients(mixture("full", compile_last), CUTS["packed"], SUPERVISED, CPU), expected("full"))
    assert found[0] <= 1e-5, found


@pytest.mark.skipif(missing_compiler(CPU) != "", reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_inductor_adds_the_pull_to_what_is_written():
    """In one graph with it, its code for CPUs read a scatter's result, the gradient of topk, too early; aot_eager is right."""
    balance = RouterBalance(5, 2, 1.0)
    balance.pull, balance.tokens, x = torch.rand(5), torch.ones(64, 1), torch.randn(64, 16)
    router = torch.randn(5, 16, requires_grad=True)

    def weights(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        return route(balance.watch(F.linear(x, router)), 2, normalised=True)[0]

    wanted = torch.autograd.grad(weights(x, router).square().sum(), router)[0]
    with torch._inductor.config.patch(compile_threads=1):  # no processes of its own, which a fork would not survive
        found = torch.autograd.grad(torch.compile(weights)(x, router).square().sum(), router)[0]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_shared_prompt_counts_once_for_each_answer():
    """A row of a prompt and two answers, and the same as two rows."""
    prompt, one, other = torch.arange(5), torch.arange(10, 17), torch.arange(20, 23)
    tree = torch.cat((prompt, one, other))[None]
    branches = torch.tensor([[0] * 5 + [1] * 7 + [2] * 3 + [0]]).int()
    documents = torch.tensor([[0] * 15 + [PADDING]]).int()
    positions = torch.tensor([[*range(5), *range(5, 12), *range(5, 8), 0]])
    labels = torch.full((1, 16), -100)
    pair = Batch(F.pad(tree, (0, 1)), labels, positions, documents, 15, 0, branches=branches)
    rows = [torch.cat((prompt, answer))[None] for answer in (one, other)]
    alone = [Batch(row, row, torch.arange(row.shape[1])[None], None, row.shape[1], 0) for row in rows]
    model = mixture("full")
    found = []
    for step in ([pair], alone):
        aux = balance_routers(model, step, CPU)["aux_loss"]
        found.append(torch.cat((aux[None].float(), model.model.balance.pull)))
    torch.testing.assert_close(*found)
    model.model.balance.see(pair.input_ids, documents, branches)
    assert model.model.balance.tokens.flatten().tolist() == [2.0] * 5 + [1.0] * 10 + [0.0]


def test_a_model_without_the_loss_computes_nothing():
    for case in (CASES["qwen3-moe"], CASES["llama-3-gqa"]):
        model = build_model({key: value for key, value in case.items() if value is not None})
        assert model.model.balance is None
        assert balance_routers(model, nn.Module(), CPU) == {}  # batches that nobody can read


def test_a_step_whose_routing_was_not_counted_is_refused():
    _, model, ids = make_twins(balanced(CASES["mixtral"]))
    with torch.no_grad():
        model(ids)  # validation and answers need no pull
    with pytest.raises(AssertionError, match="balance_routers"):
        model(ids, labels=ids)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_the_fields_of_config_json_decide(name):
    hf = {key: value for key, value in CASES[name].items() if value is not None}
    for without in ({"router_aux_loss_coef": 0.9}, {"output_router_logits": False}):
        assert model_config(hf | without) == model_config(hf)
    assert model_config(hf).moe.aux_loss_coef == 0
    assert model_config(hf | {"output_router_logits": True}).moe.aux_loss_coef == 0.001  # transformers' default
    assert model_config(balanced(hf, 0.02)).moe.aux_loss_coef == 0.02
    for value in (0, -1.0, "0.1", None):
        with pytest.raises(ValueError, match=f"router_aux_loss_coef is {value!r}; .* need a number above 0"):
            model_config(balanced(hf, value))
    with pytest.raises(ValueError, match="output_router_logits is 1; .* true or false"):
        model_config(hf | {"output_router_logits": 1})
    with pytest.raises(ValueError, match=r"config\.json: output_router_logits is true"):
        build_reward_model(balanced(hf))
