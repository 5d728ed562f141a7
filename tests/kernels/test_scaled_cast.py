"""A tensor times a number in a narrower dtype, against fp64 and PyTorch. On the CPU the kernel runs in Triton's interpreter."""

import pytest
import torch
from rows import DEVICE, assert_rounded_once, poisoned, unchanged

from torchft.kernels.scaled_cast import scaled_cast


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 1367), (4096,), (2, 4097), (0, 5)])
def test_rounded_once_and_nothing_else_is_written(shape: tuple[int, ...], dtype: torch.dtype, eager: bool) -> None:
    x, scale = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.tensor(1 / 3, device=DEVICE)
    with poisoned(), unchanged(x, scale):
        out = scaled_cast(x, scale, dtype, eager)
    assert out.shape == x.shape and out.dtype == dtype
    assert_rounded_once(out, x.double() * scale.double())
    assert torch.equal(out, (x * scale).to(dtype))


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 1e38], device=DEVICE)
    for scale in (1e3, torch.inf, torch.nan, 0.0):
        number = torch.tensor(scale, device=DEVICE)
        torch.testing.assert_close(scaled_cast(x, number, torch.float16), (x * number).half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("eager", [False, True])
def test_it_is_registered_whole(eager: bool) -> None:
    """torch.compile takes it for one node, of a head's gradient in backward."""
    for dtype in (torch.float16, torch.float32):
        torch.library.opcheck(torch.ops.torchft.scaled_cast.default, (torch.ones(3, 5), torch.tensor(0.5), dtype, eager))


def test_refused() -> None:
    x, one = torch.ones(4, 4), torch.ones(())
    for wrong in ((x.T[:, :2], one), (x.half(), one), (x, torch.ones(2)), (x, one.double())):
        with pytest.raises(ValueError, match="scaled_cast"):
            scaled_cast(*wrong, torch.float16)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_bf16_on_cuda_and_beyond_2_31_elements() -> None:
    x, scale = torch.randn(1000, 333, device="cuda"), torch.tensor(0.37, device="cuda")
    assert torch.equal(scaled_cast(x, scale, torch.bfloat16), (x * scale).bfloat16())
    x = torch.ones(2**31 + 5000, device="cuda")
    x[-1] = 3
    out = scaled_cast(x, scale, torch.bfloat16)
    assert out[-1] == torch.tensor(3 * 0.37).bfloat16() and bool((out[-5000:-1] == torch.tensor(0.37).bfloat16()).all())
