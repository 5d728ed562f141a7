"""FP8 weights: their rounding, the linear's two products in fp64's terms, adapters, streaming, names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import make_base, sample_ids
from torch import Tensor, nn

from torchft import adapter
from torchft.adapter import WEIGHTS, save_adapter, verify_adapter
from torchft.dry_run import frozen_bytes
from torchft.hf_checkpoint import SINGLE
from torchft.models import build_model, read_config
from torchft.modules import fp8
from torchft.modules.compiler import missing_compiler
from torchft.modules.fp8 import Fp8Linear, dequantize, linear, quantize_fp8, quantize_rows
from torchft.modules.lora import LoraSpec, add_lora, init_lora, merged_weight, trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.weights import load_weights, random_weights


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_within_half_a_unit_of_e4m3(dtype: torch.dtype) -> None:
    """3 bits of mantissa: 2^-4 of a number; below 2^-6 of the scale the steps no longer shrink."""
    weight = (gaussian(64, 400) * torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    weight[5] = 0
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (64,)
    error = (dequantize(codes, scale) - weight.float()).abs()
    bound = torch.maximum(weight.float().abs() * 2**-4, scale[:, None] * 2**-10) * (1 + 1e-5)
    assert bool((error <= bound).all()) and not codes[5].float().any()
    assert bool((codes.float().abs().amax(1)[weight.any(1)] == 448).all())  # all of the range is used, and nothing is cut off


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32)])
def test_both_products_in_fp64s_terms(shape: tuple[int, ...]) -> None:
    """y of the codes of x and W; dx of the codes of dy times W's scales and those of W, which are the same ones."""
    x, bias = gaussian(*shape).requires_grad_(), gaussian(48, seed=1)
    codes, scale = quantize_rows(gaussian(48, 32, seed=2))
    y = linear(x, codes, scale, bias)
    dy = gaussian(*y.shape, seed=3)
    y.backward(dy)
    dense = dequantize(codes, scale).double()
    exact = _rounded(x.detach()) @ dense.T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    exact = _rounded(dy * scale) @ codes.double()
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, plain in ((y, F.linear(x, dense.float(), bias)), (x.grad, dy @ dense.float())):
        assert 0.005 < (ours - plain).norm() / plain.norm() < 0.05  # at most 2^-4 / sqrt(3), twice


def _rounded(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return dequantize(codes, scale).double()


def on_meta(base: Path) -> CausalLM:
    with torch.device("meta"):
        return build_model(read_config(base))


def loaded(base: Path, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = on_meta(base)
    add_lora(model, spec)
    quantize_fp8(model)
    load_weights(model, base, device="cpu", dtype=dtype)
    init_lora(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_stream_in_tensor_by_tensor(base: Path, dtype: torch.dtype) -> None:
    model, tensors = loaded(base, LoraSpec(2, 8.0, target_modules=("q_proj", "up_proj")), dtype), load_file(base / SINGLE)
    found = [name for name, param in model.named_parameters() if fp8.is_fp8(param)]
    assert len(found) == 14 and not any("embed" in name or "lm_head" in name or "norm" in name for name in found)
    for name in found:
        layer, (codes, scale) = model.get_submodule(name.removesuffix(".weight")), quantize_rows(tensors[name].to(dtype))
        assert torch.equal(layer.weight.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(layer.weight_scale, scale)
        assert not layer.weight.requires_grad
    assert type(model.model.layers[0].self_attn.o_proj) is Fp8Linear
    assert torch.isfinite(model(sample_ids())).all()


def test_names_and_state_dict_are_those_of_the_dense_model(base: Path) -> None:
    model, dense = loaded(base, LoraSpec(2, 8.0)), on_meta(base)
    add_lora(dense, LoraSpec(2, 8.0))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert list(model.state_dict()) == list(dense.state_dict())
    frozen = [param for param in model.parameters() if not param.requires_grad]
    scales = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("weight_scale"))
    assert frozen_bytes(model, "float32") == pytest.approx(sum(param.nbytes for param in frozen) + scales)


def test_random_weights_are_those_of_the_dense_model_rounded(base: Path) -> None:
    model, dense = on_meta(base), on_meta(base)
    for each in (model, dense):
        add_lora(each, LoraSpec(2, 8.0))
    report = quantize_fp8(model)
    for each in (model, dense):
        random_weights(each, seed=3, device="cpu", dtype=torch.bfloat16)
    for name in report.quantized:
        codes, scale = quantize_rows(dense.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).weight.float(), codes.float())
        assert torch.equal(model.get_submodule(name).weight_scale, scale)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weight_is_what_the_layer_computes(base: Path, use_dora: bool) -> None:
    model = loaded(base, LoraSpec(4, 8.0, use_dora=use_dora))
    layer = model.model.layers[0].mlp.up_proj
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    x = torch.eye(128)  # each row has one number, which e4m3 holds exactly
    with torch.no_grad():
        torch.testing.assert_close(layer(x), merged_weight(layer).T, rtol=1e-5, atol=1e-6)


def test_an_adapter_over_fp8_is_saved_verified_and_says_so(base: Path, tmp_path: Path) -> None:
    spec = LoraSpec(4, 10.0, target_modules=("q_proj", "up_proj"))
    model = loaded(base, spec, torch.bfloat16)
    for name, param in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    save_adapter(model, spec, tmp_path / "adapter", base_path="x")
    assert verify_adapter(model, spec, tmp_path / "adapter").max_difference == 0
    metadata = adapter.read_header(tmp_path / "adapter" / WEIGHTS).metadata
    assert (metadata["base_quantization"], metadata["base_dtype"]) == ("fp8", "bfloat16")


def test_what_is_done_and_left_out_is_said() -> None:
    model = nn.Module()
    model.q_proj, model.odd_proj, model.lm_head = nn.Linear(64, 32), nn.Linear(64, 24), nn.Linear(64, 32)
    with pytest.raises(ValueError, match="every linear of the model is trained"):
        quantize_fp8(model)
    model.requires_grad_(False)
    bias, before = model.q_proj.bias, model.q_proj.weight.clone()
    report = quantize_fp8(model)
    assert report.quantized == ("q_proj",) and report.num_bytes == 64 * 32 + 4 * 32
    for words in ("1 frozen linears", "1.062 bytes per weight", "odd_proj, whose sides 24 x 64"):
        assert words in str(report)
    assert model.q_proj.bias is bias and model.lm_head.weight.dtype == torch.float32
    x = gaussian(3, 64)
    torch.testing.assert_close(model.q_proj(x), linear(x, *quantize_rows(before), bias))


@pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="torch.compile needs a C compiler")
def test_an_adapted_layer_compiles_into_one_graph_that_keeps_no_transpose() -> None:
    """fullgraph fails on a graph break. What is kept for backward of the base is the weight itself."""
    model = nn.Module()
    model.q_proj = nn.Linear(128, 64)
    add_lora(model, LoraSpec(4, 8.0, target_modules=("q_proj",)))
    quantize_fp8(model)
    init_lora(model, torch.Generator().manual_seed(0))
    nn.init.normal_(model.q_proj.lora_B.weight)
    x, saved = gaussian(2, 3, 128).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        y = torch.compile(model.q_proj, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    y.sum().backward()
    grad, x.grad = x.grad, None
    model.q_proj(x).sum().backward()
    assert torch.equal(y, model.q_proj(x)) and torch.equal(grad, x.grad)
    assert [shape for dtype, shape in saved if dtype == fp8.DTYPE] == [(64, 128)]


@pytest.mark.gpu
def test_linear_on_cuda_is_the_codes_product() -> None:
    """On Hopper by torch._scaled_mm, elsewhere in wider types: bf16's rounding and the tensor cores' sums apart, the same."""
    x = gaussian(333, 4096).bfloat16().cuda().requires_grad_()
    weight = gaussian(6144, 4096, seed=1, scale=0.02).bfloat16().cuda()
    codes, scale = quantize_rows(weight)
    y = linear(x, codes, scale)
    dy = gaussian(333, 6144, seed=2).bfloat16().cuda()
    y.backward(dy)
    exact = _rounded(x.detach()) @ dequantize(codes, scale).double().T, _rounded(dy.float() * scale) @ codes.double()
    for found, expected in zip((y, x.grad), exact, strict=True):
        assert ((found.double() - expected).norm() / expected.norm()).item() <= 4e-3
