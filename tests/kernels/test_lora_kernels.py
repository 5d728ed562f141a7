"""The adapters beside and below the base weight; the folded products as a whole are in tests/test_fuse.py."""

import pytest
import torch

from torchft.kernels.lora_linear import Group, lora_linear, new_extended, padded_rank, write_adapters
from torchft.kernels.lora_swiglu_linear import lora_swiglu_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "width, rows, ranks", [(20, (6, 5), (3, 2)), (1025, (130, 1, 64), (16, 0, 5)), (63, (70,), (65,)), (33, (9, 9), (0, 0))]
)
def test_adapters_in_the_folded_matrix(
    width: int, rows: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, eager: bool
) -> None:
    """sA below and B beside the base weight, zeros around them; the weight itself and what is never read stay as they were."""
    a = [torch.randn(rank, width, device=DEVICE) for rank in ranks]
    b = [torch.randn(row, rank, device=DEVICE) for row, rank in zip(rows, ranks, strict=True)]
    before = [tensor.clone() for tensor in (*a, *b)]
    extended = new_extended(a, b, dtype).fill_(torch.nan)
    out_width, pad = sum(rows), padded_rank(b)
    assert extended.shape == (out_width + pad, width + pad) and pad % 64 == 0 and pad >= sum(ranks)
    write_adapters(extended, a, b, 1.5, eager=eager)
    assert extended[:out_width, :width].isnan().all() and extended[out_width:, width:].isnan().all()
    below, beside = torch.zeros(pad, width), torch.zeros(out_width, pad)
    row = rank = 0
    for part_a, part_b in zip(a, b, strict=True):
        below[rank : rank + len(part_a)] = 1.5 * part_a
        beside[row : row + part_b.shape[0], rank : rank + part_b.shape[1]] = part_b
        row, rank = row + part_b.shape[0], rank + part_b.shape[1]
    torch.testing.assert_close(extended[out_width:, :width].cpu(), below.to(dtype), rtol=1e-3 * (dtype == torch.float16), atol=0)
    assert torch.equal(extended[:out_width, width:].cpu(), beside.to(dtype))
    assert all(torch.equal(kept, now) for kept, now in zip(before, (*a, *b), strict=True))


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
