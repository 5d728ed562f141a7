"""Which linears get an adapter, what is frozen, what is reported, and which targets and numbers are refused."""

import math

import pytest
import torch
from torch import nn

from torchft.modules.lora import LoRALinear, LoraSpec, add_lora, lora_layers, trainable_parameters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(128, 256)
        self.o_proj = nn.Linear(256, 128, bias=False)
        self.norm = nn.LayerNorm(128)


class Model(nn.Module):
    """Two blocks between the two ends that all-linear leaves out; names are all that matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 128)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(128, 50, bias=False)


def test_add_lora_on_meta_shares_freezes_and_reports() -> None:
    with torch.device("meta"):
        model = Model()
    shared = model.layers[0].q_proj.weight
    names = list(dict(model.named_parameters()))
    report = add_lora(model, LoraSpec(4, 8.0))
    assert report.names == tuple(f"layers.{i}.{p}_proj" for i in range(2) for p in "qo")
    assert report.num_trained == 4 * 4 * (128 + 256)
    assert report.num_total == sum(param.numel() for param in model.parameters())
    assert "4 linears (q_proj, o_proj), 6,144 of" in str(report)
    assert model.layers[0].q_proj.weight is shared
    trained = trainable_parameters(model)
    assert all(".lora_" in name and param.is_meta and param.dtype == torch.float32 for name, param in trained.items())
    assert [name for name in dict(model.named_parameters()) if ".lora_" not in name] == names


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), ["layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj", "layers.1.o_proj"]),
        (("o_proj",), ["layers.0.o_proj", "layers.1.o_proj"]),
        (("layers.1.q_proj", "0.o_proj"), ["layers.0.o_proj", "layers.1.q_proj"]),
    ],
)
def test_targets(targets: tuple[str, ...], expected: list[str]) -> None:
    model = Model()
    assert list(add_lora(model, LoraSpec(2, 4.0, target_modules=targets)).names) == expected
    assert list(lora_layers(model)) == expected
    assert not isinstance(model.lm_head, LoRALinear)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "k_prj"), r"'k_prj' matches no module; did you mean q_proj\? the linears here are o_proj, q_proj"),
        (("proj",), "'proj' matches no module"),  # names are matched whole, not by their end
        (("lm_head",), "'lm_head' takes no adapter; name it in modules_to_save"),
        (("q_proj", "embed_tokens"), "'embed_tokens' takes no adapter"),
        (("norm",), r"'norm' is layers.0.norm, a LayerNorm; adapters go on linears only"),
    ],
)
def test_targets_that_fit_nothing_are_refused(targets: tuple[str, ...], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoraSpec(2, 4.0, target_modules=targets))
    assert all(param.requires_grad for param in model.parameters()), "a refused call changes nothing"


def test_a_second_adapter_is_refused() -> None:
    model = Model()
    add_lora(model, LoraSpec(2, 4.0))
    with pytest.raises(ValueError, match="already has LoRA adapters"):
        add_lora(model, LoraSpec(2, 4.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": 0.0},
        {"alpha": math.inf},
        {"alpha": math.nan},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"target_modules": ()},
    ],
)
def test_impossible_specs_are_refused_by_field(fields: dict) -> None:
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(fields))} is"):
        LoraSpec(**({"rank": 4, "alpha": 8.0} | fields))
