"""Kernels are swapped in only where they compute what the family's block does; what stays plain is said."""

import copy

import pytest
import torch
from small_models import CASES
from torch import nn

from torchft.checks import KERNELS
from torchft.fuse import swap
from torchft.fused_block import FusedBlock
from torchft.models import build_model
from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.transformer import CausalLM

KERNELS_RUN = ("smollm3-tied", "phi3-long")  # all of them in Triton's interpreter, which takes seconds
FUSED = ("llama-dynamic", "mistral-window", "ministral-layers", "qwen2-untied", "qwen3-windows", "phi3-mini", *KERNELS_RUN)
LAYERS = {"phi3-long": 1}  # elsewhere two
NO_TRITON = tuple(name for name in KERNELS if name != "lora")  # the folded products alone
PLAIN = {  # the blocks stay as they are, and why
    "gemma2": "norms stand in other places",
    "gemma2-other-cap": "norms stand in other places",
    "gemma3": "norms stand in other places",
    "gemma3-new-spelling": "norms stand in other places",
    "olmo2": "norms stand in other places",
    "granite-tied": "branches are scaled",
    "glm4": "norms stand in other places",
    "phi4-partial": "rotated in part",
    "qwen3-moe": "mixtures of experts",
    "mixtral": "mixtures of experts",
    "gpt-oss": "mixtures of experts",
}


def adapted(case: str) -> CausalLM:
    """A model of these small sizes with adapters that do something, its norms away from one."""
    hf = {key: value for key, value in CASES[case].items() if value is not None or "softcapping" in key}
    model = build_model({key: value for key, value in hf.items() if key != "layer_types"} | {"num_hidden_layers": LAYERS.get(case, 2)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(float(name.endswith("norm.weight") and not model.config.norm_offset), 0.25, generator=generator)
    add_lora(model, LoraSpec(rank=4, alpha=12))
    init_lora(model, generator)
    for name, param in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1, generator=generator)
    return model


def loss_and_gradients(model: CausalLM) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.config.vocab_size, (1, 41), generator=generator)
    documents = (torch.arange(41) > 33).int()[None]
    positions = torch.arange(41)[None] - 34 * documents
    labels = ids.roll(-1).masked_fill(torch.arange(41) % 5 == 0, -100)
    loss = model(ids, labels=labels, documents=documents, positions=positions)
    loss.backward()
    return loss.item(), {name: param.grad for name, param in trainable_parameters(model).items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there kernels run on the GPU, and not in the interpreter")
@pytest.mark.parametrize("case", [*FUSED, *PLAIN])
def test_with_all_kernels_it_is_the_same_model(case: str) -> None:
    """Loss and every adapter's gradient; where the blocks stay plain, with every kernel that is swapped in nevertheless."""
    plain = adapted(case)
    fused = copy.deepcopy(plain)
    report = swap(fused, () if case in KERNELS_RUN or case in PLAIN else NO_TRITON)
    capped = plain.config.final_logit_softcapping is not None
    assert report.blocks == (LAYERS.get(case, 2) if case in FUSED else 0)
    assert report.loss == (case not in FUSED and not capped or case in KERNELS_RUN)
    assert any(isinstance(block, FusedBlock) for block in fused.model.layers) is (case in FUSED)
    assert PLAIN.get(case, "") in str(report) and ("the loss stays plain: its logits are capped" in str(report)) is capped
    (loss, expected), (found_loss, found) = loss_and_gradients(plain), loss_and_gradients(fused)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3 * total), name
