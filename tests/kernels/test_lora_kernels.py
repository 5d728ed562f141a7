"""The strip of adapters beside the base weight; the folded products as a whole are in tests/test_fuse.py."""

import pytest
import torch

from torchft.kernels.lora_linear import Group, lora_linear, new_extended, padded_rank, write_adapters, write_strip
from torchft.kernels.lora_swiglu_linear import lora_swiglu_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("rows, rank, offset, pad", [(1, 1, 0, 64), (63, 5, 7, 64), (130, 16, 48, 64), (70, 65, 20, 192), (9, 0, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strip(rows: int, rank: int, offset: int, pad: int, dtype: torch.dtype, eager: bool) -> None:
    """B where it belongs, zeros beside it, and nothing beyond."""
    around = torch.full((rows + 2, pad + 9), torch.nan, dtype=dtype, device=DEVICE)
    b = torch.randn(rows, rank, device=DEVICE)
    before = b.clone()
    write_strip(around[1:-1, 4:-5], b, offset, eager=eager)
    expected = torch.full_like(around, torch.nan)
    expected[1:-1, 4:-5] = 0
    expected[1:-1, 4 + offset : 4 + offset + rank] = b.to(dtype)
    torch.testing.assert_close(around, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(b, before)


def test_no_part_that_is_read_is_left_unwritten() -> None:
    """Memory that new_extended finds may hold anything, NaN too."""
    a, b = [torch.randn(3, 20), torch.randn(2, 20)], [torch.randn(6, 3), torch.randn(5, 2)]
    extended = new_extended(a, b, torch.float32).fill_(torch.nan)
    write_adapters(extended, a, b, 2.0)
    extended[:11, :20] = torch.randn(11, 20)
    assert padded_rank(b) == 64 and extended.shape == (75, 84)
    assert not extended[:, :20].isnan().any() and not extended[:11].isnan().any()


def reference(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x @ weight.T + 1.5 * (x @ a.T) @ b.T + bias


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_in_fp64s_terms(gated: bool) -> None:
    """A dense base that is not packed, one linear: everything against autograd in fp64, inputs untouched."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 20), (9, 20), (3, 20), (9, 3), (9,))
    )
    gate = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    source = gate if gated else x
    leaves = [tensor.clone().requires_grad_() for tensor in (source, a, b)]
    wide = leaves[0]
    if gated:
        wide = torch.nn.functional.silu(leaves[0][:, :20]) * leaves[0][:, 20:]
    up = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    (reference(wide, weight, leaves[1], leaves[2], bias) * up).sum().backward()

    ours = [tensor.float().requires_grad_() for tensor in (source, a, b)]
    group = Group([weight.float()], "d", [ours[1]], [ours[2]], 1.5)
    if gated:
        y = lora_swiglu_linear(ours[0], group, bias.float(), eager="swiglu")
    else:
        y = lora_linear(ours[0], group, bias.float())
    before = [tensor.detach().clone() for tensor in ours]
    (y * up.float()).sum().backward()
    for leaf, found, kept in zip(leaves, ours, before, strict=True):
        assert torch.equal(found, kept)
        assert (found.grad - leaf.grad).norm() <= 1e-5 * leaf.grad.norm()
