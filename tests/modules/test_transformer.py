"""The whole model: packed documents stay apart, labels give the logits' own loss, the cache changes nothing."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from torchft.modules import offload as offloading
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM, KVCache, TransformerConfig

ROPE = RopeConfig(6)
CONFIGS = {
    "plain": TransformerConfig(43, 24, 36, 2, 4, 2, 6, 1e-5, ROPE, 64, False),
    "windows": TransformerConfig(43, 24, 36, 3, 4, 4, 6, 1e-5, ROPE, 64, True, sliding_windows=(3, None, 5)),
    "everything": TransformerConfig(
        *(43, 24, 36, 2, 4, 1, 6, 1e-5, ROPE, 64, True), qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
    ),
}


def random_model(config: TransformerConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center, spread = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3)
            parameter.normal_(center, spread)
    return model


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> CausalLM:
    return random_model(request.param)


def pack(examples: list[torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    """One row (1, T) of documents one after another, positions restarting, padding with an id of its own."""
    lengths = [len(example) for example in examples]
    padding = num_tokens - sum(lengths)
    pieces = [*examples, torch.zeros(padding, dtype=torch.int64)]
    labels = [torch.cat((example[1:], torch.tensor([-100]))) for example in examples]
    return {
        "input_ids": torch.cat(pieces)[None],
        "positions": torch.cat([torch.arange(len(piece)) for piece in pieces])[None],
        "documents": torch.cat([torch.full((len(piece),), index) for index, piece in enumerate(pieces)])[None],
        "labels": torch.cat([*labels, torch.full((padding,), -100)])[None],
    }


def random_examples(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(43, (length,), generator=generator) for length in lengths]


def gradients_of(model: CausalLM, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_packed_equals_unpacked(model):
    examples = random_examples([7, 1, 12, 3])
    row = pack(examples, num_tokens=26)
    with torch.no_grad():
        packed_logits = model(row["input_ids"], positions=row["positions"], documents=row["documents"])[0]
        apart = torch.cat([model(example[None])[0] for example in examples])
    assert (packed_logits[:23] - apart).abs().max() <= 1e-5 * apart.abs().max()
    assert packed_logits.isfinite().all()  # padding included: PITFALLS G6

    packed_gradients = gradients_of(model, [model(**row)])
    alone = [pack([example], num_tokens=len(example)) for example in examples]
    apart_gradients = gradients_of(model, [model(one["input_ids"], labels=one["labels"]) for one in alone])
    largest = max(gradient.norm() for gradient in apart_gradients.values())
    for name, gradient in apart_gradients.items():
        scale = gradient.norm() if gradient.norm() > 1e-6 * largest else largest
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * scale, name


def test_a_document_never_touches_its_neighbours(model):
    lengths = [9, 8, 6]
    row = pack(random_examples(lengths), num_tokens=28)
    for changed in range(4):  # each document, then the padding
        other_ids = row["input_ids"].clone()
        inside = row["documents"] == changed
        other_ids[inside] = (other_ids[inside] + 17) % 43
        with torch.no_grad():
            before = model(row["input_ids"], positions=row["positions"], documents=row["documents"])
            after = model(other_ids, positions=row["positions"], documents=row["documents"])
        assert torch.equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any()


def test_later_tokens_never_touch_earlier_ones(model):
    ids = torch.stack(random_examples([12, 12]))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 43
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])


def test_loss_is_the_sum_of_the_logits_cross_entropies(model):
    """Labels are already shifted: position t is scored on labels[t], not on labels[t + 1]."""
    ids, labels = torch.stack(random_examples([10, 10])), torch.stack(random_examples([10, 10])).flip(0)
    labels[0, :4] = -100
    logits = model(ids).double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels).double(), expected, rtol=1e-6, atol=0)


def test_nothing_supervised_still_has_gradients(model):
    loss = model(torch.zeros(1, 4, dtype=torch.int64), labels=torch.full((1, 4), -100))
    assert loss == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_last_only_is_the_last_position(model):
    ids = torch.stack(random_examples([8, 8]))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


@pytest.mark.parametrize("cuts", [[1] * 11, [6, 1, 4], [11]])
def test_the_cache_changes_nothing(model, cuts):
    ids = torch.stack(random_examples([11, 11, 11]))
    with torch.no_grad():
        expected = model(ids)
        cache = KVCache(model.config, 3, 11, ids.device)
        got = torch.cat([model(piece, cache=cache) for piece in ids.split(cuts, dim=1)], dim=1)
    assert cache.length == 11
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_positions_count_from_the_start_of_the_row_by_default(model):
    ids = torch.stack(random_examples([9, 9]))
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, positions=torch.arange(9).expand(2, -1)))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_parameter_wherever_the_model_goes(tied):
    config = CONFIGS["windows" if tied else "plain"]
    with torch.device("meta"):
        model = CausalLM(config)
    for move in (lambda m: m.to_empty(device="cpu"), lambda m: m.bfloat16(), lambda m: m.double()):
        move(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    names = [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in names) != tied


def test_building_draws_nothing_on_meta_and_initialisation_fills_everything(model):
    with torch.device("meta"):
        empty = CausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters()) and not list(empty.buffers())
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(math.nan)
    empty.init_weights(torch.Generator().manual_seed(3))
    for name, parameter in empty.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            error = 5 * 0.02 / math.sqrt(2 * parameter.numel())  # five standard deviations of the estimate
            assert abs(parameter.std() - 0.02) < error, name


def test_initialisation_follows_the_seed(model):
    def filled(seed: int) -> list[torch.Tensor]:
        model.init_weights(torch.Generator().manual_seed(seed))
        return [parameter.detach().clone() for parameter in model.parameters()]

    one, again, other = filled(1), filled(1), filled(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_embedding_in_fp32_feeds_a_bf16_model():
    """As when embed_tokens is trained beside an adapter."""
    model = random_model(CONFIGS["plain"]).bfloat16()
    ids = torch.stack(random_examples([9, 9]))
    expected = model(ids)
    model.model.embed_tokens.float()
    model.lm_head.float()
    hidden = model.model(ids, None, None, None)
    assert hidden.dtype == torch.bfloat16
    loss = model(ids, labels=ids)
    loss.backward()
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32
    assert expected.dtype == torch.bfloat16 and loss.isfinite()


def test_norms_are_taken_in_fp32():
    """PITFALLS M2: in bf16 the mean of squares would be off by up to 2^-9, and 300^2 would overflow fp16."""
    norm = CausalLM(CONFIGS["plain"]).model.norm
    torch.manual_seed(0)
    nn.init.ones_(norm.weight)
    x = torch.randn(64, 24) * 300
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        exact = low.double() / (low.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert torch.equal(norm.to(dtype)(low), exact.to(dtype))


@pytest.fixture
def process_group(tmp_path: Path):
    """A group of one process: what FSDP2 does to the modules and hooks, without the communication."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode, offload", [("none", False), ("full", False), ("every_2", True)])
def test_blocks_and_root_can_be_sharded(model, process_group, mode, offload, monkeypatch):
    """The head's weight is read inside CausalLM.forward, where FSDP2 has gathered it."""
    monkeypatch.setattr(offloading, "SMALLEST", 1)
    ids = torch.stack(random_examples([9, 9]))
    expected_loss = model(ids, labels=ids)
    expected = gradients_of(model, [expected_loss])
    with torch.device("meta"):
        sharded = CausalLM(model.config)
    apply_activation_checkpointing(sharded, mode, offload)
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    sharded.to_empty(device="cpu")
    assert (sharded.lm_head.weight is sharded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        for parameter, value in zip(sharded.parameters(), model.parameters(), strict=True):
            parameter.to_local().copy_(value)
    loss = sharded(ids, labels=ids)
    loss.backward()
    assert torch.equal(loss, expected_loss)
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.to_local(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [(), (70, None)])
def test_packed_equals_unpacked_on_cuda(windows):
    """FlexAttention in fp32 against SDPA on each document alone: T8's bounds, for this backend too."""
    torch._dynamo.reset()  # the ninth form of one function would run uncompiled
    config = TransformerConfig(43, 128, 192, 2, 4, 2, 32, 1e-5, RopeConfig(32), 512, False, sliding_windows=windows)
    model = random_model(config).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    examples = random_examples([200, 3, 150, 90])
    row = {name: tensor.cuda() for name, tensor in pack(examples, num_tokens=460).items()}
    packed_gradients = gradients_of(model, [model(**row)])
    alone = [pack([example], num_tokens=len(example)) for example in examples]
    losses = [model(one["input_ids"].cuda(), labels=one["labels"].cuda()) for one in alone]
    apart_gradients = gradients_of(model, losses)
    for name, gradient in apart_gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    inside = row["documents"] == 2
    changed = torch.where(inside, (row["input_ids"] + 17) % 43, row["input_ids"])
    with torch.no_grad():
        before = model(row["input_ids"], positions=row["positions"], documents=row["documents"])
        after = model(changed, positions=row["positions"], documents=row["documents"])
    assert torch.equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any()
