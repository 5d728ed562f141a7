"""Training with adapters: the loss curve of a transformers + PEFT loop, and only what should move does."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import load_with_adapter, make_base, on_meta, sample_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from torchft.adapter import adapter_tensors
from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.nf4 import quantize_nf4
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import train_modules
from torchft.weights import load_weights

NUM_STEPS = 30
LR = 3e-3

CASES = {
    "lora": (LoraSpec(4, 10.0), ()),
    "rslora": (LoraSpec(16, 8.0, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")), ()),
    "dora": (LoraSpec(4, 10.0, use_dora=True), ()),
    "lora and both ends": (LoraSpec(4, 10.0), ("embed_tokens", "lm_head")),
}


def batches() -> list[Tensor]:
    """Token ids (4, 17) of each step: three batches in turn, so that there is something to learn."""
    return [sample_ids(4, 17, seed=step % 3) for step in range(NUM_STEPS)]


def step_loss(model: CausalLM, ids: Tensor) -> Tensor:
    """Mean over the step's supervised tokens."""
    labels = ids[:, 1:]
    return model(ids[:, :-1], labels=labels) / labels.numel()


def our_losses(model: CausalLM) -> list[float]:
    optimizer, losses = torch.optim.AdamW(trainable_parameters(model).values(), lr=LR, weight_decay=0.0), []
    model.train()
    for ids in batches():
        loss = step_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peft_losses(base: Path, start: CausalLM, spec: LoraSpec, names: tuple[str, ...]) -> list[float]:
    """The same loop around PEFT's model, from the same initial adapter."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        target_modules="all-linear" if spec.target_modules == ("all-linear",) else list(spec.target_modules),
        modules_to_save=list(names) or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    initial = {name: tensor for name, tensor in adapter_tensors(start).items() if ".lora_A" in name}
    with torch.no_grad():
        for name, tensor in initial.items():
            model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.default.weight").copy_(tensor)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss  # transformers shifts by itself
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_are_transformers_and_pefts(tmp_path: Path, case: str) -> None:
    spec, names = CASES[case]
    make_base(tmp_path)
    model = load_with_adapter(tmp_path, spec, names, trained=False)
    theirs = peft_losses(tmp_path, model, spec, names)
    ours = our_losses(model)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4, f"{worst:.1e} at loss {ours[0]:.2f} .. {ours[-1]:.2f}"
    assert ours[-1] < 0.7 * ours[0], "a curve that does not fall compares nothing"


def test_dora_leaves_loras_curve(tmp_path: Path) -> None:
    """M10: DoRA that is LoRA in disguise has the same losses; both start at the base model's."""
    make_base(tmp_path)
    curves = [our_losses(load_with_adapter(tmp_path, CASES[case][0], trained=False)) for case in ("lora", "dora")]
    assert curves[0][0] == curves[1][0]
    assert abs(curves[0][10] - curves[1][10]) > 1e-3


def digest(model: nn.Module) -> dict[str, str]:
    """sha256 of every frozen parameter's bytes; of an NF4 one, of the tensors it is stored in."""
    digests = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            parts = [param]
            if type(param) is not nn.Parameter:
                names, _ = param.__tensor_flatten__()
                parts = [getattr(param, inner) for inner in names]
            flat = [part.detach().flatten().clone(memory_format=torch.contiguous_format) for part in parts]
            content = b"".join(part.view(torch.uint8).numpy().tobytes() for part in flat)
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("names", [(), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_two_steps_move_all_of_the_adapter_and_nothing_else(
    tmp_path: Path, storage: str, names: tuple[str, ...], use_dora: bool
) -> None:
    make_base(tmp_path)
    model = on_meta(tmp_path)
    add_lora(model, LoraSpec(4, 10.0, dropout=0.1, use_dora=use_dora))
    train_modules(model, names)
    if storage == "nf4":
        assert len(quantize_nf4(model).quantized) == 10
    load_weights(model, tmp_path, device="cpu", dtype=torch.float32 if storage == "fp32" else torch.bfloat16)
    init_lora(model, torch.Generator().manual_seed(1))

    frozen, trained = digest(model), trainable_parameters(model)
    assert frozen.keys().isdisjoint(trained) and len(frozen) == 21 - len(names)
    before = {name: param.detach().clone() for name, param in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR)
    model.train()
    for ids in batches()[:2]:
        step_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(model) == frozen
    assert [name for name, param in trained.items() if torch.equal(param, before[name])] == []
    assert all(param.dtype == torch.float32 for param in trained.values())
