"""Mixtures of experts: routing, the grouped product, adapters and NF4 of experts, each against a loop over tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchft.modules.lora import LoRAExpertLinear, LoraSpec, add_lora, init_lora, lora_layers, trainable_parameters
from torchft.modules.moe import MoeConfig
from torchft.modules.nf4 import NF4Tensor, dequantize, quantize_nf4
from torchft.modules.rope import RopeConfig
from torchft.modules.routing import (
    combine,
    dispatch,
    grouped_mm,
    grouped_mm_eager,
    grouped_mm_fused,
    route,
    sort_by_expert,
)
from torchft.modules.transformer import CausalLM, TransformerConfig
from torchft.throughput import flops_per_token

OFFSETS = [3, 3, 11, 16]  # of four experts, the second of which has no row


def tiny(**moe: Any) -> CausalLM:
    """One layer of four experts of which a token takes two, with weights of a size that matters."""
    config = TransformerConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, rms_norm_eps=1e-5, rope=RopeConfig(16), max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.2, moe=MoeConfig(**({"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64} | moe)),
    )  # fmt: skip
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def adapted(spec: LoraSpec, quantized: bool = False) -> CausalLM:
    model = tiny()
    add_lora(model, spec)
    if quantized:
        assert any("experts" in name for name in quantize_nf4(model).quantized)
    generator = torch.Generator().manual_seed(1)
    init_lora(model, generator)
    for param in trainable_parameters(model).values():
        nn.init.normal_(param, std=0.1, generator=generator)
    return model


def loss_of(model: CausalLM) -> Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % 61
    return model(ids, labels=ids.roll(-1, 1))


@pytest.mark.parametrize("normalised", [True, False])
def test_the_largest_probabilities_are_chosen(normalised):
    logits = torch.randn(9, 6)
    weights, chosen = route(logits, 2, normalised)
    shares, expected = logits.softmax(-1).topk(2)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, shares / shares.sum(-1, keepdim=True) if normalised else shares)


def test_rows_come_back_to_their_tokens():
    """Values and gradients of dispatch and combine, against indexing that autograd knows."""
    chosen = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2], [2, 3]])  # expert 1 has no row
    rows, order = sort_by_expert(chosen, 4)
    assert rows.offsets.tolist() == [3, 3, 7, 10] and rows.experts.tolist() == [0, 0, 0, 2, 2, 2, 2, 3, 3, 3]
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    found, expected = [], []
    for results, own in ((found, True), (expected, False)):
        x, weights = torch.arange(15.0).view(5, 3).requires_grad_(), torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
        weights.requires_grad_()
        if own:
            y = combine(dispatch(x, order, 2) * scale[rows.experts, None], order, weights)
        else:
            y = (x[:, None] * scale[chosen][..., None] * weights[..., None]).sum(1)
        (y * torch.arange(15.0).view(5, 3).cos()).sum().backward()
        results += [y, x.grad, weights.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width, out", [(16, 24), (16, 4), (5, 8), (3, 7)])
def test_the_grouped_product_is_a_product_for_each_expert(dtype, tolerance, width, out):
    """One kernel, padded where a width is no multiple of 8, and its twin: values, and gradients of rows and matrices."""
    torch.manual_seed(0)
    x, weights, grad = torch.randn(16, width), torch.randn(4, width, out), torch.randn(16, out)
    found = []
    for product in (grouped_mm_eager, grouped_mm_fused):
        a, w = (value.to(dtype).requires_grad_() for value in (x, weights))
        y = product(a, w, torch.tensor(OFFSETS, dtype=torch.int32))
        y.backward(grad.to(dtype))
        found.append((y, a.grad, w.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    owner = torch.tensor([0] * 3 + [2] * 8 + [3] * 5)
    expected = torch.stack([row @ weights[expert] for row, expert in zip(x, owner, strict=True)])
    assert (found[0][0] - expected).norm() <= 3 * tolerance * expected.norm()
    assert found[0][2][1].abs().max() == 0  # the expert without rows has a gradient, of zeros


def test_every_expert_has_an_adapter_of_its_own():
    """W_e x + s B_e A_e x, and the gradients of each A and B."""
    layer = adapted(LoraSpec(3, 5.0)).model.layers[0].mlp.experts.up_proj
    assert isinstance(layer, LoRAExpertLinear)
    rows, _ = sort_by_expert(torch.tensor([0] * 3 + [2] * 8 + [3] * 5)[:, None], 4)
    x, grad = torch.randn(16, 64), torch.randn(16, 64)
    y = layer(x, rows)
    y.backward(grad)
    a, b, w = (value.detach().view(4, -1, value.shape[1]) for value in (layer.lora_A.weight, layer.lora_B.weight, layer.weight))
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    expected = torch.stack([(w[e] + 5.0 / 3 * b[e] @ a[e]) @ row for row, e in zip(x, rows.experts, strict=True)])
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_A.weight.grad.view_as(a), a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.weight.grad.view_as(b), b.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.delta().view(4, 64, 64)[2:], layer.delta(slice(2, 4)).view(2, 64, 64))
    torch.testing.assert_close(layer.delta().view(4, 64, 64), 5.0 / 3 * b @ a)


def test_fresh_adapters_change_nothing_and_draw_each_expert_anew():
    model, plain = tiny(), tiny()
    add_lora(model, LoraSpec(3, 5.0))
    init_lora(model, torch.Generator().manual_seed(1))
    assert torch.equal(loss_of(model), loss_of(plain))
    first, second, *_ = model.model.layers[0].mlp.experts.down_proj.lora_A.weight.view(4, 3, 64)
    assert not torch.equal(first, second) and 0.9 / 8 < first.abs().max() <= 1 / 8  # uniform within 1 / sqrt(in)


def test_all_linear_means_the_experts_and_not_the_router():
    model = tiny()
    report = add_lora(model, LoraSpec(2, 4.0))
    leaves = [name.removeprefix("model.layers.0.") for name in lora_layers(model)]
    assert leaves == [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")]
    assert "experts included" in str(report)
    assert report.num_trained == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    named = tiny()
    add_lora(named, LoraSpec(2, 4.0, target_modules=("gate",)))
    assert list(lora_layers(named)) == ["model.layers.0.mlp.gate"]


def test_dora_on_experts_is_refused():
    with pytest.raises(ValueError, match=r"dora is not for experts, such as model.layers.0.mlp.experts.gate_proj"):
        add_lora(tiny(), LoraSpec(2, 4.0, use_dora=True))
    add_lora(tiny(), LoraSpec(2, 4.0, use_dora=True, target_modules=("q_proj",)))


def test_dropout_acts_on_the_adapters_of_experts():
    model = adapted(LoraSpec(3, 5.0, dropout=0.5, target_modules=("down_proj",)))
    first, second = loss_of(model), loss_of(model)
    assert first != second
    model.eval()
    assert loss_of(model) == loss_of(adapted(LoraSpec(3, 5.0, target_modules=("down_proj",))))


def test_nf4_experts_are_their_decoded_weights():
    """The loss, and gradients of the adapters; routers stay dense."""
    coded, dense = adapted(LoraSpec(3, 5.0), quantized=True), adapted(LoraSpec(3, 5.0))
    for name, param in coded.named_parameters():
        if isinstance(param.data, NF4Tensor):
            dense.get_parameter(name).data.copy_(dequantize(param.data))
    assert isinstance(coded.model.layers[0].mlp.experts.gate_proj.weight.data, NF4Tensor)
    assert not isinstance(coded.model.layers[0].mlp.gate.weight.data, NF4Tensor)
    losses = [loss_of(model) for model in (coded, dense)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for (name, one), other in zip(trainable_parameters(coded).items(), trainable_parameters(dense).values(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() and other.grad.norm() > 0, name


def test_routers_stay_dense():
    model = tiny(num_experts=256, intermediate_size=8)
    add_lora(model, LoraSpec(2, 4.0))
    report = quantize_nf4(model)
    assert model.model.layers[0].mlp.gate.weight.numel() == 16384  # which could be NF4
    assert [name.rpartition(".")[2] for name in report.quantized] == ["gate_proj", "up_proj", "down_proj"]


def test_flops_count_the_experts_that_a_token_takes():
    """As many as a plain model whose feed forward is as wide as those of the two experts, and the router's."""
    whole, attention = flops_per_token(tiny(), 32), 4 * 64 * 32
    experts, head = 2 * 3 * 64 * 64, 61 * 64
    assert whole == 6 * (attention + experts + head + 4 * 64) + 6 * 32 * 2 * 16


def test_on_the_cpu_experts_are_a_loop(monkeypatch):
    """`grouped_mm` takes the kernel on CUDA alone: its CPU form wants rows of 16 bytes."""
    monkeypatch.setattr("torchft.modules.routing.grouped_mm_fused", None)
    assert grouped_mm(torch.ones(16, 3), torch.ones(4, 3, 5), torch.tensor(OFFSETS, dtype=torch.int32)).shape == (16, 5)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    model = adapted(LoraSpec(3, 5.0)).cuda().bfloat16()
    ids = torch.arange(512, device="cuda").view(2, 256) % 61
    x, block = model.model.embed_tokens(ids).detach().requires_grad_(), model.model.layers[0].mlp
    block(x).sum().backward()  # kernels are built
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_grouped_kernel_equals_its_twin_on_a_gpu():
    torch.manual_seed(0)
    counts = torch.tensor([100, 0, 300, 112], device="cuda").cumsum(0, dtype=torch.int32)
    for width, out in ((64, 128), (64, 3), (3, 64)):
        x, weights = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((512, width), (4, out, width)))
        results = []
        for product in (grouped_mm, grouped_mm_eager):
            a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
            y = product(a, w.transpose(1, 2), counts)
            (y.float().square().sum() / 2).backward()
            results.append((y, a.grad, w.grad))
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() <= 1e-2 * other.norm()
