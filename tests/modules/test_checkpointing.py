"""Checkpointing and offloading change where activations are kept; gradients, names and randomness stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchft.modules import offload as offloading
from torchft.modules.checkpointing import Probe, apply_activation_checkpointing, recompute_blocks
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM, TransformerConfig

CONFIG = TransformerConfig(
    31, 16, 24, 5, 4, 2, 4, 1e-5, RopeConfig(4), 64, False, sliding_windows=(None, 3, None, 3, 3)
)
MODES = [("full", False), ("every_2", False), ("every_4", False), ("full", True), ("every_2", True)]


@pytest.fixture(autouse=True)
def everything_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as it is."""
    monkeypatch.setattr(offloading, "SMALLEST", 1)


class DroppingLinear(nn.Linear):
    """A linear with dropout before it that no nn.Dropout announces, as in an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(x, 0.3, self.training), self.weight, self.bias)


def model_with_dropout() -> CausalLM:
    model = CausalLM(CONFIG)
    for block in model.model.layers:
        block.mlp.up_proj = DroppingLinear(16, 24, bias=False)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.train()


def loss_and_gradients(model: CausalLM, num_steps: int = 2) -> list[torch.Tensor]:
    """Losses, all gradients, and the random state afterwards, over micro-batches with different random numbers."""
    torch.manual_seed(1)
    model.zero_grad()
    losses = []
    for step in range(num_steps):
        ids = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(step))
        documents = torch.arange(12)[None].expand(2, -1) // 5
        losses.append(model(ids, documents=documents, labels=ids.roll(-1, 1)))
        losses[-1].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(loss.detach() for loss in losses), *gradients, torch.get_rng_state()]


@pytest.mark.parametrize("mode, offload", MODES)
def test_gradients_are_bitwise_the_same(mode, offload):
    model = model_with_dropout()
    expected = loss_and_gradients(model)
    names = list(model.state_dict())
    apply_activation_checkpointing(model, mode, offload)
    got = loss_and_gradients(model)
    assert len(got) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert list(model.state_dict()) == names
    sent = 2 * sum(index in model.model.checkpointing.blocks for index in range(4)) * 2 * 12 * 16 * 4  # the last block's is not
    assert model.model.checkpointing.bytes_offloaded == (sent if offload else 0)


@pytest.mark.parametrize("mode, offload", MODES)
def test_a_trained_weight_above_a_frozen_base_gets_its_gradient(mode, offload):
    """The reentrant variant gives none where the block's input needs none."""
    model = model_with_dropout().requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.requires_grad_(True)
    expected = loss_and_gradients(model)
    apply_activation_checkpointing(model, mode, offload)
    got = loss_and_gradients(model)
    assert len(got) == len(expected) == 2 + 5 + 1
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert all((gradient != 0).any() for gradient in got[2:7])


@pytest.mark.parametrize(
    "mode, runs", [("none", [1] * 5), ("full", [2] * 5), ("every_2", [2, 1, 2, 1, 2]), ("every_3", [2, 1, 1, 2, 1])]
)
def test_the_chosen_blocks_run_twice(mode, runs):
    model = model_with_dropout()
    counts = [0] * 5
    for index, block in enumerate(model.model.layers):

        def count(module: nn.Module, args: tuple, index: int = index) -> None:
            counts[index] += 1

        block.register_forward_pre_hook(count)
    apply_activation_checkpointing(model, mode)
    loss_and_gradients(model, num_steps=1)
    assert counts == runs
    with torch.no_grad():  # nothing to recompute for
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert counts == [run + 1 for run in runs]


def test_only_block_inputs_are_kept():
    """What autograd holds between forward and backward shrinks to one (B, T, D) per checkpointed block."""

    def held(mode: str) -> int:
        model = model_with_dropout()
        apply_activation_checkpointing(model, mode)
        sizes = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        ids = torch.arange(24).view(2, 12)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, labels=ids)
        return sum(sizes)

    input_size = 2 * 12 * 16
    blocks_in_full = held("none") - held("full") + 5 * input_size
    assert held("every_2") - held("full") == pytest.approx(blocks_in_full * 2 / 5 - 2 * input_size, rel=0.1)
    assert held("full") < 0.25 * held("none")


def test_offloading_leaves_no_reference_behind():
    model = model_with_dropout()
    apply_activation_checkpointing(model, "full", offload=True)
    ids = torch.arange(24).view(2, 12)
    loss = model(ids, labels=ids)
    traffic = model.model.checkpointing.traffic
    assert traffic.latest() is not None and not traffic.memory.buffers()
    loss.backward()
    assert traffic.latest() is None and len(traffic.memory.buffers()) == 4  # of five inputs; autograd let the journeys go


def test_a_probe_counts_what_a_block_keeps_and_no_weight():
    """By hand, numbers per token: two norms, attention, feed forward; and SDPA's mask. Weights would be a third more."""
    model = model_with_dropout().eval()
    expected = loss_and_gradients(model)
    probe = model.model.checkpointing.probe = Probe(1)
    assert all(torch.equal(one, other) for one, other in zip(loss_and_gradients(model), expected, strict=True))
    probe.tokens = 0
    for tokens in (7, 12, 5):
        ids = torch.arange(2 * tokens).view(2, tokens)
        model(ids, labels=ids).backward()
    assert probe.tokens == 24 and probe.input_bytes == 24 * 16 * 4
    norm, attention, feed_forward = 3 * 16 + 1, 16 + 8 + 8 + 16 + 4, 4 * 24
    exact = 4 * (24 * (2 * norm + attention + feed_forward) + 12 * 12)
    assert probe.num_bytes == pytest.approx(exact, rel=0.15)  # some versions of F.rms_norm keep a tensor less


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode, offload", [("none", False), ("full", False), ("every_2", True)])
def test_blocks_compiled_in_place_can_be_checkpointed(mode, offload, backend):
    model = model_with_dropout().eval()
    expected = loss_and_gradients(model)
    for block in model.model.layers:
        block.compile(backend=backend, fullgraph=True)
    apply_activation_checkpointing(model, mode, offload)
    probe = model.model.checkpointing.probe = Probe(4)
    got = loss_and_gradients(model)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert probe.tokens == 24 and probe.num_bytes > 10 * probe.input_bytes


@pytest.mark.parametrize("mode", ["some", "every_0", "every_", "every_-1", "every_2x", "every_²", "", "Full"])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(ValueError, match="model.activation_checkpointing"):
        apply_activation_checkpointing(model_with_dropout(), mode)


def test_some_of_the_blocks_can_be_chosen():
    model = model_with_dropout()
    expected = loss_and_gradients(model)
    for first in range(6):
        recompute_blocks(model, range(first), offload=first > 2)
        assert [block.recomputed for block in model.model.layers] == [index < first for index in range(5)]
        got = loss_and_gradients(model)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_nothing_else_chooses_them():
    """A fused block saves other tensors where it is recomputed: both places must say the same, or backward finds one too few."""
    model = model_with_dropout()
    recompute_blocks(model, range(4), offload=False)
    model.model.checkpointing.blocks = range(5)
    with pytest.raises(AssertionError, match="recompute_blocks"):
        loss_and_gradients(model)


def test_offloading_without_checkpointing_is_refused():
    with pytest.raises(ValueError, match="model.offload"):
        apply_activation_checkpointing(model_with_dropout(), "none", offload=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode, offload", MODES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_the_same_on_cuda(mode, offload, compiled):
    torch._dynamo.reset()  # the ninth form of one function would run uncompiled

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = TransformerConfig(512, 256, 512, 5, 4, 2, 64, 1e-5, RopeConfig(64), 512, False)
        model = CausalLM(config).cuda()
        model.init_weights(torch.Generator("cuda").manual_seed(0))
        for block in model.model.layers:
            linear = DroppingLinear(256, 512, bias=False, device="cuda")
            linear.weight = block.mlp.up_proj.weight
            block.mlp.up_proj = linear
            if compiled:
                block.compile()
        model.bfloat16().train()
        if checkpointed:
            apply_activation_checkpointing(model, mode, offload)
        ids = torch.randint(512, (2, 384), device="cuda")
        documents = torch.arange(384, device="cuda")[None].expand(2, -1) // 100
        for _ in range(2):
            model(ids, documents=documents, labels=ids.roll(-1, 1)).backward()
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()  # FlexAttention's backward adds in no fixed order
