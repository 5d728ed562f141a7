"""LoRA, rsLoRA and DoRA layers: the formula, PEFT's numbers and gradients, what is trained and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from torchft.modules import lora
from torchft.modules.lora import (
    LoraSpec,
    adapters_off,
    add_lora,
    init_lora,
    lora_layers,
    merged_weight,
    trainable_parameters,
)
from torchft.modules.nf4 import dequantize, quantize_nf4

VARIANTS = [  # rank, alpha, rsLoRA, DoRA; alpha never equals the rank, else a scale that is lost would not show
    (4, 10.0, False, False),
    (4, 10.0, True, False),
    (16, 8.0, True, True),
    (64, 24.0, False, True),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(128, 256)
        self.o_proj = nn.Linear(256, 128, bias=False)
        self.norm = nn.LayerNorm(128)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.o_proj(torch.tanh(self.q_proj(x))))


class Model(nn.Module):
    """Two blocks between the two ends that all-linear leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 128)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(128, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        for block in self.layers:
            h = block(h)
        return self.lm_head(h)


def build(spec: LoraSpec, *, trained: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model()
    add_lora(model, spec)
    init_lora(model, torch.Generator().manual_seed(1))
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for param in trainable_parameters(model).values():
                param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def peft_twin(
    model: Model, rank: int, alpha: float, use_rslora: bool, use_dora: bool, dropout: float = 0.0
) -> nn.Module:
    """The same base and adapter weights under PEFT's own layers."""
    torch.manual_seed(0)
    twin = inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_dropout=dropout,
            target_modules=["q_proj", "o_proj"],
        ),
        Model(),
    )
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            named[f"{name}.lora_A.default.weight"].copy_(layer.lora_A.weight)
            named[f"{name}.lora_B.default.weight"].copy_(layer.lora_B.weight)
            if use_dora:
                named[f"{name}.lora_magnitude_vector.default.weight"].copy_(layer.lora_magnitude_vector)
    return twin


def ids() -> Tensor:
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("rank", "alpha", "use_rslora", "use_dora"), VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_pefts(
    rank: int, alpha: float, use_rslora: bool, use_dora: bool, dropout: float
) -> None:
    """In training mode; with dropout from the same seed, so that also what sees the dropped input is compared."""
    model = build(LoraSpec(rank, alpha, dropout, use_rslora, use_dora)).train()
    twin = peft_twin(model, rank, alpha, use_rslora, use_dora, dropout).train()
    torch.manual_seed(5)
    ours = model(ids())
    torch.manual_seed(5)
    theirs = twin(ids())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    references = dict(twin.named_parameters())
    for name, param in trainable_parameters(model).items():
        stem = name.removesuffix(".weight")
        reference = references[f"{stem}.default.weight"].grad
        assert ((param.grad - reference).norm() / reference.norm()).item() < 1e-5, name


@pytest.mark.parametrize(
    ("use_rslora", "expected"), [(False, 10.0 / 16), (True, 10.0 / math.sqrt(16))], ids=["lora", "rslora"]
)
def test_scale_and_formula(use_rslora: bool, expected: float) -> None:
    spec = LoraSpec(16, 10.0, use_rslora=use_rslora)
    layer = build(spec).layers[0].q_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    update = expected * layer.lora_B.weight @ layer.lora_A.weight
    assert spec.scale == pytest.approx(expected)
    torch.testing.assert_close(layer(x), x @ (layer.weight + update).T + layer.bias, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_no_bit(use_dora: bool) -> None:
    torch.manual_seed(0)
    base = Model()
    expected = base(ids())
    model = build(LoraSpec(4, 9.0, use_dora=use_dora), trained=False)
    assert torch.equal(model(ids()), expected)


def test_initial_values() -> None:
    model = build(LoraSpec(8, 16.0, use_dora=True), trained=False)
    for layer in lora_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        a = layer.lora_A.weight.detach()
        assert a.abs().max() <= bound and a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.lora_B.weight.any()
        torch.testing.assert_close(layer.lora_magnitude_vector.data, layer.weight.norm(dim=1))
        assert {param.dtype for param in trainable_parameters(layer).values()} == {torch.float32}
    again = build(LoraSpec(8, 16.0, use_dora=True), trained=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dora_takes_the_norm_as_a_constant_and_differs_from_lora() -> None:
    """The gradient of B through the norm would show against finite differences of the detached formula: PEFT's test
    above holds it; here that the norm itself follows the update."""
    model = build(LoraSpec(4, 10.0, use_dora=True))
    layer = model.layers[1].o_proj
    norms = layer.row_norms()
    update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(norms, (layer.weight + update).norm(dim=1))
    assert not norms.requires_grad
    with torch.no_grad():
        rows = model(ids())
        layer.lora_magnitude_vector *= 2
        assert (model(ids()) - rows).abs().max() > 1e-2


def test_row_norms_do_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(LoraSpec(4, 10.0, use_dora=True)).layers[0].q_proj
    whole = layer.row_norms()
    monkeypatch.setattr(lora, "NORM_ROWS", 37)
    assert torch.equal(layer.row_norms(), whole)


@pytest.mark.parametrize("use_dora", [False, True])
def test_bf16_base_fp32_adapter(use_dora: bool) -> None:
    """Activations stay bf16, gradients and parameters of the adapter fp32, and the result is near the fp32 one."""
    model = build(LoraSpec(4, 10.0, use_dora=use_dora))
    layer = model.layers[0].q_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    expected = layer(x)
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for name, param in trainable_parameters(layer).items():
        assert param.dtype == param.grad.dtype == torch.float32, name
    assert (y.float() - expected).norm() / expected.norm() < 1e-2  # a few roundings of 2^-9


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_merged_weight_does_what_base_and_adapter_do(use_dora: bool, quantized: bool) -> None:
    model = build(LoraSpec(4, 10.0, use_dora=use_dora))
    if quantized:
        quantize_nf4(model)
    layer = model.layers[0].q_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    merged = merged_weight(layer)
    torch.testing.assert_close(F.linear(x, merged, layer.bias), layer(x), atol=1e-5, rtol=0)
    base = dequantize(layer.weight) if quantized else layer.weight
    assert (merged - base).norm() / base.norm() > 0.05


def test_dora_magnitude_of_an_nf4_base_is_the_dequantised_one() -> None:
    torch.manual_seed(0)
    model = Model()
    add_lora(model, LoraSpec(4, 8.0, use_dora=True))
    quantize_nf4(model)
    init_lora(model, torch.Generator().manual_seed(1))
    layer = model.layers[0].q_proj
    torch.testing.assert_close(layer.lora_magnitude_vector.data, dequantize(layer.weight).norm(dim=1))
    with adapters_off(model):
        base = model(ids())
    assert torch.equal(model(ids()), base)


def test_adapters_off_is_the_base_and_comes_back_after_an_error() -> None:
    torch.manual_seed(0)
    base = Model()
    model = build(LoraSpec(4, 10.0, use_dora=True))
    trained = model(ids())
    with adapters_off(model):
        assert torch.equal(model(ids()), base(ids()))
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(model(ids()), trained) and not torch.equal(trained, base(ids()))


def test_adapters_off_refuses_where_the_base_is_gone() -> None:
    model = build(LoraSpec(4, 10.0))
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head.weight is trained whole"), adapters_off(model):
        pass


def test_dropout_only_in_training() -> None:
    model = build(LoraSpec(4, 10.0, dropout=0.5))
    assert torch.equal(model.eval()(ids()), build(LoraSpec(4, 10.0)).eval()(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))
