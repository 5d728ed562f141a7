"""torchft/device.py: what compiled blocks keep for backward."""

import pytest
import torch
import torch._functorch.config
from tiny_models import hf_config
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchft.device import ACTIVATION_BUDGET, compile_blocks
from torchft.models import build_model
from torchft.modules.compiler import missing_compiler
from torchft.modules.lora import LoraSpec, add_lora
from torchft.modules.transformer import CausalLM

CPU = torch.device("cpu")
NUM_TOKENS = 96


def model_of_one_block() -> CausalLM:
    model = build_model(hf_config(num_hidden_layers=1, intermediate_size=512, num_key_value_heads=4))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def train_once(model: CausalLM) -> tuple[dict[str, Tensor], float]:
    """All gradients, and what the block keeps for backward beside its weights, in tensors of (tokens, hidden)."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    block, ids = model.model.layers[0], torch.arange(NUM_TOKENS)[None] % 97
    h = model.model.embed_tokens(ids)
    cos, sin = torch.rand(2, 1, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(pack, lambda x: x):
        out = block(h, cos, sin, None)
    out.square().sum().backward()
    kept_bytes = sum(x.untyped_storage().nbytes() for x in kept.values())
    grads = {name: param.grad for name, param in model.model.layers.named_parameters()}
    return grads, kept_bytes / (NUM_TOKENS * 128 * 4)


@pytest.mark.skipif(bool(missing_compiler(CPU)), reason="nothing can be compiled here")
def test_norms_and_gates_are_computed_again_and_no_product() -> None:
    torch._dynamo.reset()
    expected, plain = train_once(model_of_one_block())
    model = model_of_one_block()
    compile_blocks(model, "on", CPU, lambda text: None)
    found, kept = train_once(model)
    # h, q, k, v and attention's result, h behind it, gate and up at 4 each, and something small
    assert 14 <= kept <= 14.5 < plain
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.skipif(bool(missing_compiler(CPU)), reason="nothing can be compiled here")
def test_masks_of_dropout_are_kept() -> None:
    """Drawn again, they would be others: at a budget of 0.3 these blocks' gradients were those of another function."""
    for dropout, budget in ((0.0, ACTIVATION_BUDGET), (0.1, 1.0), (0.0, ACTIVATION_BUDGET)):
        model = model_of_one_block()
        add_lora(model, LoraSpec(4, 8.0, dropout=dropout))
        compile_blocks(model, "on", CPU, lambda text: None)
        assert torch._functorch.config.activation_memory_budget == budget
