"""NF4 against torchao bit for bit, against the paper's table, and what it must not cost: memory, noise, accuracy."""

import shutil
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchft.modules import nf4
from torchft.modules.lora import LoraSpec, add_lora, init_lora
from torchft.modules.nf4 import DIVISOR, NF4Linear, NF4Tensor, dequantize, linear, quantize_nf4, to_nf4

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((128, 128), (64, 1024), (384, 256))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random weights as a model has them, with an outlier, which makes one block's scale unlike the others."""
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[5] = 0.4
    return weight.to(dtype)


def paper_table() -> Tensor:
    """The NF4 values from their definition: quantiles of N(0, 1), seven below zero, zero, eight above (appendix E)."""
    tail = 0.9677083  # so that the outermost quantile is finite: the mean of 1 - 1/32 and 1 - 1/30
    above = [NormalDist().inv_cdf(0.5 + (tail - 0.5) * i / 8) for i in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (tail - 0.5) * i / 7) for i in range(1, 8)]
    return torch.tensor(sorted([*below, 0.0, *above])) / above[-1]


def codes_of(weight: NF4Tensor) -> Tensor:
    """The 4-bit codes, one per weight, in the weights' order."""
    data = weight.quantized_data
    return torch.stack([data >> 4, data & 15], dim=-1).flatten()


class LargestTensor(TorchDispatchMode):
    """The most bytes that any one op returned."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func not in (torch.ops.aten.view.default, torch.ops.aten.detach.default):
            self.num_bytes = max(self.num_bytes, out.numel() * out.itemsize)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_torchao_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "CHUNK_BYTES", 3 * 2**12)  # several chunks, the last one partly filled
    weight = to_nf4(gaussian(*shape, dtype=dtype))
    dense = dequantize(weight)
    assert dense.dtype == dtype and dense.shape == shape
    assert torch.equal(dense, weight.get_original_weight())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_lookup_is_the_chunked_one_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    """On CUDA the lookup is compiled; its other formula, and a fused kernel of it, must not round otherwise."""
    weight = to_nf4(gaussian(128, 256, dtype=dtype))
    scales = torch.linspace(0.1, 2.0, weight.numel() // 64).to(dtype)
    blocks = weight.quantized_data.view(-1, 32)
    compiled = torch.compile(nf4._lookup, dynamic=True, backend=backend)
    expected = nf4._chunked_lookup(blocks, scales, weight.nf4)
    assert torch.equal(compiled(blocks, scales, weight.nf4), expected)
    with torch.compiler.set_stance("force_eager"), LargestTensor() as largest:
        assert torch.equal(compiled(blocks, scales, weight.nf4), expected)
    assert largest.num_bytes <= max(expected.nbytes, 4 * blocks.numel()), (
        "the chunked path, without an index of everything"
    )


def test_codes_are_the_papers() -> None:
    """Nearest value of the definition's table, blockwise scaled. torchao's table is rounded to 4 digits, which moves
    the border between two codes by at most 5e-5: only weights that close to a border may get the neighbouring code."""
    weight = gaussian(512, 512)
    blocks = weight.view(-1, 64)
    distances = ((blocks / blocks.abs().amax(1, keepdim=True)).view(-1, 1) - paper_table()).abs()
    codes = codes_of(to_nf4(weight)).long()
    excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)  # 0 where the code is the nearest
    assert excess.max() <= 2 * 5e-5
    assert (excess == 0).float().mean() >= 0.9998


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_on_a_gaussian(dtype: torch.dtype) -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    error = (dequantize(to_nf4(weight)).float() - weight.float()).norm() / weight.float().norm()
    assert 0.08 < error <= 0.093


def test_zero_and_constant_weights_stay_finite() -> None:
    assert torch.equal(dequantize(to_nf4(torch.zeros(128, 128))), torch.zeros(128, 128))
    torch.testing.assert_close(dequantize(to_nf4(torch.full((128, 128), 0.25))), torch.full((128, 128), 0.25))


def test_size_that_is_no_whole_group_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(100, 128\) has 12,800"):
        to_nf4(torch.zeros(100, 128))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_the_dense_product(dtype: torch.dtype, bias: bool) -> None:
    weight = to_nf4(gaussian(384, 128, dtype=dtype))
    b = gaussian(384, dtype=dtype) if bias else None
    x = gaussian(3, 7, 128, dtype=dtype, seed=1).requires_grad_()
    upstream = gaussian(3, 7, 384, dtype=dtype, seed=2)
    y = linear(x, weight, b)
    y.backward(upstream)
    grad, x.grad = x.grad, None
    dense = weight.get_original_weight()
    expected = F.linear(x, dense) if b is None else F.linear(x, dense) + b
    expected.backward(upstream)
    assert torch.equal(y, expected) and torch.equal(grad, x.grad)


@pytest.mark.parametrize("transposed", [True, False])
def test_ops_are_registered_as_torch_compile_needs_them(transposed: bool) -> None:
    """Schema, shapes on fake tensors, autograd: torch's own checks of a library op."""
    storage = nf4._storage(to_nf4(gaussian(256, 128)))
    x = gaussian(3, 128 if transposed else 256).requires_grad_(transposed)  # only the forward product has a gradient
    torch.library.opcheck(torch.ops.torchft.nf4_matmul.default, (x, *storage, 256, transposed))
    torch.library.opcheck(torch.ops.torchft.nf4_dequantize.default, (*storage, 256))


def test_linear_takes_activations_of_another_dtype() -> None:
    weight, x = to_nf4(gaussian(128, 128, dtype=torch.bfloat16)), gaussian(2, 128)
    assert torch.equal(linear(x, weight), F.linear(x, weight.get_original_weight().float()))


def test_backward_keeps_no_dense_weight() -> None:
    weight, x = to_nf4(gaussian(1024, 512)), gaussian(2, 512).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * t.itemsize) or t, lambda t: t):
        linear(x, weight).sum().backward()
    assert saved and max(saved) == weight.quantized_data.numel()  # the codes, which the model holds anyway


def test_decoding_makes_nothing_larger_than_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's decoder makes an int64 index of every weight: 8 bytes each where the dense bf16 weight has 2."""
    monkeypatch.setattr(nf4, "CHUNK_BYTES", 2**12)
    weight = to_nf4(gaussian(512, 512, dtype=torch.bfloat16))
    with LargestTensor() as ours:
        nf4._decode(*nf4._storage(weight))
    with LargestTensor() as torchao:
        weight.get_original_weight()
    dense = weight.numel() * 2
    assert ours.num_bytes == dense and torchao.num_bytes >= 2 * dense


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(128, 128)
        self.o_proj = nn.Linear(128, 128, bias=False)
        self.odd_proj = nn.Linear(128, 100, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, 128)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(128, 256, bias=False)


@pytest.fixture
def quantized() -> tuple[Model, nf4.NF4Report]:
    """On meta, with adapters on q_proj."""
    with torch.device("meta"):
        model = Model()
    add_lora(model, LoraSpec(4, 8.0, target_modules=("q_proj",)))
    return model, quantize_nf4(model)


def test_frozen_linears_are_quantised_and_the_rest_is_reported(quantized: tuple[Model, nf4.NF4Report]) -> None:
    model, report = quantized
    assert report.quantized == tuple(f"layers.{i}.{p}_proj" for i in range(2) for p in "qo")
    assert [name for name, _ in report.skipped] == ["layers.0.odd_proj", "layers.1.odd_proj"]
    assert "4 frozen linears" in str(report) and "layers.0.odd_proj, (100, 128)" in str(report)
    nf4_params = [name for name, param in model.named_parameters() if isinstance(param, NF4Tensor)]
    assert sorted(nf4_params) == sorted(f"{name}.weight" for name in report.quantized)


def test_quantising_on_meta_keeps_names_and_stays_on_meta(quantized: tuple[Model, nf4.NF4Report]) -> None:
    model, _ = quantized
    params = dict(model.named_parameters())
    assert [name for name in params if ".lora_" not in name] == list(dict(Model().named_parameters()))
    assert all(param.is_meta for param in params.values())
    assert not any(param.requires_grad for param in params.values() if isinstance(param, NF4Tensor))
    assert type(model.layers[0].o_proj) is NF4Linear


def test_quantising_on_meta_asks_torchao_once_per_shape_and_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """70B: 560 linears of 5 shapes. What is copied from the first of a shape must be what torchao would have made."""
    asked, encode = [], nf4.torchao_to_nf4
    monkeypatch.setattr(nf4, "torchao_to_nf4", lambda weight, *sizes: asked.append(weight) or encode(weight, *sizes))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(n, 128, dtype=d) for d in DTYPES for n in (256, 384) for _ in range(3)))
    model.requires_grad_(False)
    assert len(quantize_nf4(model).quantized) == 12
    assert len(asked) == 4
    weights = [module.weight for module in model]
    fields = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")
    assert len({id(getattr(weight, name)) for weight in weights for name in fields}) == 5 * 12
    for weight in weights:
        alone = to_nf4(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        assert (weight.dtype, weight.device, weight.requires_grad) == (alone.dtype, alone.device, False)
        assert (weight.block_size, weight.scaler_block_size, weight.n_blocks) == (64, 256, alone.n_blocks)
        for name in fields:
            one, other = getattr(weight, name), getattr(alone, name)
            assert (one.shape, one.dtype, one.stride(), one.is_meta) == (other.shape, other.dtype, other.stride(), True)


def test_quantize_real_weights_keeps_bias_and_computes_with_them() -> None:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    bias, dense = model.layers[0].q_proj.bias, model.layers[0].q_proj.weight.clone()
    quantize_nf4(model)
    layer, x = model.layers[0].q_proj, gaussian(3, 128)
    assert layer.bias is bias
    assert torch.equal(layer(x), F.linear(x, to_nf4(dense).get_original_weight()) + bias)


def test_quantize_refuses_a_model_without_frozen_linears() -> None:
    with pytest.raises(ValueError, match="every linear of the model is trained; call add_lora"):
        quantize_nf4(Model())


@needs_compiler
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_on_nf4_compiles_into_one_graph(use_dora: bool) -> None:
    """fullgraph fails on a graph break. The compiled block keeps no dense weight for backward either."""
    torch.manual_seed(0)
    model = Model()
    add_lora(model, LoraSpec(4, 8.0, use_dora=use_dora, target_modules=("q_proj",)))
    quantize_nf4(model)
    init_lora(model, torch.Generator().manual_seed(0))
    layer = model.layers[0].q_proj
    nn.init.normal_(layer.lora_B.weight)
    x = gaussian(2, 128).requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    y.sum().backward()
    grad, x.grad = x.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(grad, x.grad)
    assert (128, 128) not in saved


def test_importing_it_prints_nothing() -> None:
    """torchao warns about kernels for other machines; those lines are not for a user's first screen."""
    done = subprocess.run(
        [sys.executable, "-c", "import torchft.modules.nf4"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_decoding_is_torchao_bit_for_bit_and_small(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(nf4, "_can_compile", lambda: False)
    for dtype in DTYPES:
        weight = to_nf4(gaussian(14336, 4096, dtype=dtype).cuda())
        assert torch.equal(dequantize(weight), weight.get_original_weight())
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dequantize(weight)
        extra = torch.cuda.max_memory_allocated() - before
        dense = weight.numel() * dtype.itemsize
        assert extra <= 1.2 * dense, f"{extra / dense:.2f} times the dense weight"


def test_divisor_is_whole_blocks_of_whole_scaler_blocks() -> None:
    assert DIVISOR == 16384
