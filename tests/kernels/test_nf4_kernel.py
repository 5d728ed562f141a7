"""The NF4 kernel against torchft.modules.nf4.dequantize and torchao bit for bit, into memory that is poisoned before.

Triton's interpreter cuts bf16 off where a GPU rounds it, so bf16 is seen on a GPU only.
"""

import pytest
import torch
from torch import Tensor

from torchft.kernels.nf4 import DIVISOR, dequantize_into
from torchft.modules.nf4 import _storage, dequantize, to_nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
# 48 x 1024 is no whole number of anything but of blocks; blocks cross rows of 48, 160 and 24 weights; rows of 2 and 1.
SHAPES = ((64, 256), (128, 384), (48, 1024), (1024, 48), (512, 160), (2048, 24), (8192, 2), (16384, 1), (1, 16384))
DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu))
Storage = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights with an outlier, which makes one block's scale unlike the others."""
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight.view(-1)[5] = 0.4
    return weight.to(DEVICE, dtype)


def random_storage(size: int, dtype: torch.dtype, seed: int = 0) -> Storage:
    """Storage of no weight in particular: every byte and every scaler occurs, -128 too."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kind = {"device": DEVICE, "generator": generator}
    codes = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, **kind)
    scalers = torch.randint(-128, 128, (size // 64,), dtype=torch.int8, **kind)
    factor = 1000 + 5000 * torch.rand(size // DIVISOR, **kind)
    table = to_nf4(torch.zeros(1, DIVISOR, dtype=dtype)).nf4.to(DEVICE)
    return codes, scalers, factor.to(dtype), torch.tensor(0.0521, device=DEVICE, dtype=dtype), table


def poisoned(rows: int, columns: int, pad: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN-filled memory (rows, columns + pad), and its first columns."""
    memory = torch.full((rows, columns + pad), NAN, dtype=dtype, device=DEVICE)
    return memory, memory[:, :columns]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("pad", [0, 16, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchao_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype, pad: int, eager: bool) -> None:
    weight = to_nf4(gaussian(*shape, dtype=dtype))
    storage = _storage(weight)
    before = [tensor.clone() for tensor in storage]
    memory, out = poisoned(*shape, pad, dtype)
    dequantize_into(*storage, out, eager=eager)
    assert torch.equal(out, dequantize(weight)) and torch.equal(out, weight.get_original_weight())
    assert memory[:, shape[1] :].isnan().all(), "what lies between the rows is not the weight's"
    assert all(torch.equal(now, then) for now, then in zip(storage, before, strict=True))


def test_several_factors_in_a_larger_weight() -> None:
    weight = to_nf4(gaussian(1024, 1024))
    _, out = poisoned(1024, 1024, 0, torch.float32)
    dequantize_into(*_storage(weight), out)
    assert torch.equal(out, dequantize(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bytes_and_scalers(dtype: torch.dtype) -> None:
    storage = random_storage(8 * DIVISOR, dtype)
    out, expected = (poisoned(512, 256, 0, dtype)[1] for _ in range(2))
    dequantize_into(*storage, out)
    dequantize_into(*storage, expected, eager=True)
    assert expected.isfinite().all() and torch.equal(out, expected)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_weight_whose_factor_is_infinite(value: float) -> None:
    weight = to_nf4(torch.full((128, 128), value, device=DEVICE))
    _, out = poisoned(128, 128, 0, torch.float32)
    dequantize_into(*_storage(weight), out)
    assert torch.equal(out, dequantize(weight)) and out.isfinite().all()


def test_rows_in_the_middle_of_a_packed_matrix() -> None:
    """Three projections decoded into one weight, as a fused product takes them."""
    weights = [to_nf4(gaussian(rows, 256)) for rows in (128, 64, 192)]
    packed = torch.full((384, 256), NAN, device=DEVICE)
    for weight, out in zip(weights, packed.split([128, 64, 192]), strict=True):
        dequantize_into(*_storage(weight), out)
    assert torch.equal(packed, torch.cat([dequantize(weight) for weight in weights]))


BAD_OUT = {
    "too few weights": (torch.empty(64, 128), "16,384"),
    "other number of weights": (torch.empty(128, 256), "codes"),
    "no matrix": (torch.empty(DIVISOR), "matrix"),
    "empty": (torch.empty(0, 256), "matrix"),
    "transposed": (torch.empty(256, 128).T[:64, :], "out"),
    "rows over each other": (torch.empty(DIVISOR).as_strided((64, 256), (128, 1)), "apart"),
    "columns apart": (torch.empty(64, 512)[:, ::2], "out"),
    "dtype": (torch.empty(64, 256, dtype=torch.float16), "out"),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_wrong_memory_is_refused(case: str) -> None:
    out, words = BAD_OUT[case]
    with pytest.raises(ValueError, match=words):
        dequantize_into(*random_storage(DIVISOR, torch.float32), out.to(DEVICE))


@pytest.mark.parametrize("position", range(5))
def test_wrong_storage_is_refused_by_name(position: int) -> None:
    name = ("codes", "scalers", "factor", "mean", "table")[position]
    good = list(random_storage(2 * DIVISOR, torch.float32))
    tensor = good[position]
    shaped = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    for bad in (shaped, shaped[::2], tensor.to(torch.int32)):
        if bad.shape == tensor.shape and bad.is_contiguous() and bad.dtype == tensor.dtype:
            continue
        storage = [*good[:position], bad, *good[position + 1 :]]
        with pytest.raises(ValueError, match=name):
            dequantize_into(*storage, torch.empty(64, 512, device=DEVICE))


def test_a_wide_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        dequantize_into(*random_storage(DIVISOR, torch.float64), torch.empty(64, 256, dtype=torch.float64, device=DEVICE))


def test_without_a_gpu_or_the_interpreter_only_the_eager_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    storage = [tensor.cpu() for tensor in random_storage(DIVISOR, torch.float32)]
    out = torch.full((64, 256), NAN)
    with pytest.raises(ValueError, match="eager=True"):
        dequantize_into(*storage, out)
    dequantize_into(*storage, out, eager=True)
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("pad", [0, 16])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)])
def test_the_weights_of_an_8b_model(shape: tuple[int, int], pad: int) -> None:
    weight = to_nf4(gaussian(*shape, dtype=torch.bfloat16))
    memory, out = poisoned(*shape, pad, torch.bfloat16)
    dequantize_into(*_storage(weight), out)
    assert torch.equal(out, weight.get_original_weight()) and torch.equal(out, dequantize(weight))
    assert memory[:, shape[1] :].isnan().all()


def expected_rows(storage: Storage, start: int, rows: int, columns: int) -> Tensor:
    """Rows from `start` on by the eager twin, from the part of the storage that holds them."""
    codes, scalers, factor, mean, table = storage
    first, end = start * columns, (start + rows) * columns
    part = codes[first // 2 : end // 2], scalers[first // 64 : end // 64], factor[first // DIVISOR : end // DIVISOR]
    out = torch.empty(rows, columns, dtype=table.dtype, device=DEVICE)
    dequantize_into(*part, mean, table, out, eager=True)
    return out


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_weights_than_int32_counts() -> None:
    rows, columns = 2**19 + 4 * 1024, 4096
    storage = random_storage(rows * columns, torch.bfloat16)
    _, out = poisoned(rows, columns, 0, torch.bfloat16)
    assert out.numel() > 2**31
    dequantize_into(*storage, out)
    for start in range(0, rows, 16 * 1024):
        count = min(16 * 1024, rows - start)
        assert torch.equal(out[start : start + count], expected_rows(storage, start, count, columns)), start


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns", [(48, 4096), (16384, 8190)])
@pytest.mark.usefixtures("whole_gpu")
def test_rows_further_apart_than_int32_counts(rows: int, columns: int) -> None:
    """The path for padded rows, the last of which begins beyond 2^31 elements; in runs of 64 weights, and of 2."""
    stride = -(-(2**31 + 2**20) // (rows - 1))
    memory = torch.full(((rows - 1) * stride + columns,), NAN, dtype=torch.bfloat16, device=DEVICE)
    out = memory.as_strided((rows, columns), (stride, 1))
    storage = random_storage(rows * columns, torch.bfloat16)
    dequantize_into(*storage, out)
    assert torch.equal(out, expected_rows(storage, 0, rows, columns))
    assert memory.isnan().sum() == memory.numel() - out.numel()
