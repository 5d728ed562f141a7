"""The fused model is the plain model: losses, all gradients, curve, names, storage; and one kernel at a time can be off."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchft.checks import KERNELS
from torchft.fuse import fuse, swap
from torchft.fused_block import FusedBlock
from torchft.kernels import lora_swiglu_linear
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.lora import LoraSpec, adapters_off, add_lora, init_lora, trainable_parameters
from torchft.modules.nf4 import quantize_nf4
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM, TransformerConfig

ALL = tuple(name for name in KERNELS if name != "lora")  # plain PyTorch inside the folded ops: runs anywhere


def config(**others: object) -> TransformerConfig:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(32),
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return TransformerConfig(**sizes | others)


def adapted(spec: LoraSpec | None = None, nf4: bool = False, dtype: torch.dtype = torch.float32, **others: object) -> CausalLM:
    """A model whose adapters do something already."""
    model = CausalLM(config(**others))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, param in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(param, mean=float("norm" in name), std=0.2, generator=torch.Generator().manual_seed(1))
    model = model.to(dtype)
    add_lora(model, spec or LoraSpec(rank=4, alpha=12))
    if nf4:
        quantize_nf4(model)
    generator = torch.Generator().manual_seed(2)
    init_lora(model, generator)
    for name, param in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1, generator=generator)
    return model


def batch(tokens: int = 37) -> dict[str, torch.Tensor]:
    """Two rows; the first holds two documents."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(61, (2, tokens), generator=generator)
    labels = torch.randint(61, (2, tokens), generator=generator)
    labels[:, ::5] = -100
    documents = torch.zeros(2, tokens, dtype=torch.int32)
    documents[0, 20:] = 1
    positions = torch.arange(tokens).repeat(2, 1)
    positions[0, 20:] -= 20
    return {"input_ids": ids, "labels": labels, "documents": documents, "positions": positions}


def gradients(model: CausalLM) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch())
    (loss / 50).backward()
    return loss.item(), {name: param.grad.clone() for name, param in trainable_parameters(model).items()}


def fused(model: CausalLM, eager: tuple[str, ...] = ALL) -> CausalLM:
    twin = copy.deepcopy(model)
    report = swap(twin, eager)
    assert report.blocks == 3 and not report.skipped
    return twin


def assert_equal(model: CausalLM, twin: CausalLM, tolerance: float = 1e-5) -> None:
    (loss, expected), (found_loss, found) = gradients(model), gradients(twin)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm(), name


VARIANTS: dict[str, Callable[[], CausalLM]] = {
    "llama": adapted,
    "biases": lambda: adapted(qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": lambda: adapted(qk_norm=True),
    "rslora": lambda: adapted(LoraSpec(rank=5, alpha=7, use_rslora=True)),
    "some linears": lambda: adapted(LoraSpec(rank=4, alpha=12, target_modules=("q_proj", "v_proj", "down_proj"))),
    "one layer": lambda: adapted(LoraSpec(rank=4, alpha=12, target_modules=("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"))),
    "rank 70": lambda: adapted(LoraSpec(rank=70, alpha=12)),
    "window": lambda: adapted(sliding_windows=(None, 7, 7)),
    "packed": lambda: adapted(packed_qkv=True, packed_gate_up=True),
    "one layer without rope": lambda: adapted(
        layer_ropes=(RopeConfig(32), RopeConfig(32, partial_rotary_factor=0.0), RopeConfig(32)), qk_norm=True
    ),
    "nf4": lambda: adapted(nf4=True),
    "nf4 and dense": lambda: adapted(nf4=True, num_key_value_heads=1, hidden_size=64 * 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_plain_models(variant: str) -> None:
    model = VARIANTS[variant]()
    assert_equal(model, fused(model))


@pytest.mark.parametrize("mode", ["full", "every_2"])
@pytest.mark.parametrize("nf4", [False, True])
def test_recomputing_changes_nothing(mode: str, nf4: bool) -> None:
    model = adapted(nf4=nf4)
    twin = fused(model)
    apply_activation_checkpointing(twin, mode)
    assert_equal(model, twin)


def test_the_second_forward_of_a_recomputed_block_computes_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward needs what it saves, not what it returns: down's product, a quarter of a block, is left out; only then."""
    made, project = [], lora_swiglu_linear.project
    monkeypatch.setattr(lora_swiglu_linear, "project", lambda *inputs: made.append(inputs) or project(*inputs))
    model = fused(adapted())
    apply_activation_checkpointing(model, "full")
    loss = model(**batch())
    assert len(made) == 3
    loss.backward()
    assert len(made) == 3
    with torch.no_grad():
        assert torch.equal(model(**batch()), loss)
    assert len(made) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there kernels run on the GPU, and not in the interpreter")
@pytest.mark.parametrize("kernel", [name for name in ALL if name not in ("fp8", "embedding")])  # test_fuse_fp8, test_host_embedding
def test_each_kernel_alone(kernel: str) -> None:
    """In Triton's interpreter on the CPU: this kernel, all others in plain PyTorch."""
    model = adapted(nf4=kernel == "nf4")
    assert_equal(model, fused(model, tuple(name for name in ALL if name != kernel)))


def test_training_follows_the_plain_curve() -> None:
    """30 steps of AdamW: the adapters in E are the optimizer's, at every step."""
    model = adapted()
    curves = []
    for each in (model, fused(model)):
        optimizer = torch.optim.AdamW(trainable_parameters(each).values(), lr=1e-3, fused=True)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = each(**batch()) / 58
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.3


def test_names_values_and_dtypes_stay() -> None:
    model = adapted(dtype=torch.bfloat16)
    twin = fused(model)
    twin(**batch())  # re-lays the weights
    for (name, param), (other, laid) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and param.dtype == laid.dtype and torch.equal(param, laid) and param.requires_grad == laid.requires_grad
    assert list(model.state_dict()) == list(twin.state_dict())
    assert not twin.model.layers[0].mlp.up_proj.weight.is_contiguous()  # so it did


def test_two_forwards_before_a_backward() -> None:
    """As preference losses do; the second must not spoil what the first one kept."""
    model = adapted()
    twin = fused(model)
    grads = []
    for each in (model, twin):
        each.zero_grad()
        (each(**batch(37)) - each(**batch(21))).backward()
        grads.append([param.grad for param in trainable_parameters(each).values()])
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_replaced_weights_are_seen() -> None:
    """A loader puts new Parameters in place, and a checkpoint new values."""
    model = adapted()
    twin = fused(model)
    twin(**batch())
    for each in (model, twin):
        mlp = each.model.layers[1].mlp
        mlp.up_proj.weight = nn.Parameter(torch.ones_like(mlp.up_proj.weight) / 50, requires_grad=False)
        with torch.no_grad():
            each.model.layers[0].self_attn.k_proj.lora_B.weight.mul_(3)
    assert_equal(model, twin)


def test_adapters_off_is_the_base_model() -> None:
    """By the very products that the policy takes: where adapters do nothing yet, to the bit, in bf16 too (P1)."""
    model = adapted()
    twin = fused(model)
    with torch.no_grad(), adapters_off(model), adapters_off(twin):
        torch.testing.assert_close(twin(**batch()), model(**batch()), rtol=1e-5, atol=0)
    twin = fused(adapted(dtype=torch.bfloat16))
    with torch.no_grad():
        for name, param in twin.named_parameters():
            if "lora_B" in name:
                param.zero_()
        policy = twin(**batch())
        with adapters_off(twin):
            assert torch.equal(twin(**batch()), policy)


def test_what_cannot_be_fused_is_said() -> None:
    for spec, why in (
        (LoraSpec(rank=4, alpha=8, dropout=0.1), "dropout"),
        (LoraSpec(rank=4, alpha=8, use_dora=True), "DoRA"),
    ):
        model = adapted(spec)
        report = swap(model, ())
        assert why in str(report) and not any(isinstance(block, FusedBlock) for block in model.model.layers)
    plain = CausalLM(config())
    assert "trained" in str(swap(plain, ()))
    assert str(fuse(adapted(), {}, torch.device("cpu"))) == "kernels: none; blocks stay plain: Triton needs a GPU"


# ------------------------------------------------------------------------------------------------------------- on a GPU


def on_gpu(model: CausalLM) -> CausalLM:
    return copy.deepcopy(model).cuda()


def gpu_gradients(model: CausalLM, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**{name: value.cuda() for name, value in inputs.items()})
    (loss / 50).backward()
    return loss.item(), {name: param.grad.double().cpu() for name, param in trainable_parameters(model).items()}


GPU_VARIANTS = {name: VARIANTS[name] for name in ("llama", "biases", "qk_norm", "some linears", "packed", "nf4", "nf4 and dense")}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", GPU_VARIANTS)
def test_fp32_on_cuda(variant: str) -> None:
    model = on_gpu(VARIANTS[variant]())
    twin = fused(model, ())
    (loss, expected), (found_loss, found) = gpu_gradients(model, batch()), gpu_gradients(twin, batch())
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 2e-5 * grad.norm(), name
