"""What the tests of kernels over rows share: poisoned memory, strided rows, and distances from a fp64 reference."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels run in Triton's interpreter
GUARD = 1024  # elements of NaN behind whatever a launcher allocates


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that launchers allocate starts as NaN, and so does what lies behind it, which must stay NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    guards = []

    def nan_empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        buffer = torch.full((shape.numel() + GUARD,), torch.nan, dtype=dtype, device=device)
        guards.append(buffer[shape.numel() :])
        return buffer[: shape.numel()].view(shape)

    torch.empty = nan_empty
    torch.empty_like = lambda x: nan_empty(x.shape, dtype=x.dtype, device=x.device)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    assert guards, "nothing was allocated through torch.empty"
    assert all(guard.isnan().all() for guard in guards), "written behind the end of an output"


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten of memory from torch.empty is NaN."""
    empty = torch.empty

    def nan_empty(*args: object, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_empty)


@contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """The tensors hold the same bits afterwards, NaN included."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)


def spread(rows: Tensor, gap: int = 5) -> Tensor:
    """The same (..., D) with `gap` elements of NaN behind each row."""
    wide = rows.new_full((*rows.shape[:-1], rows.shape[-1] + gap), torch.nan)
    wide[..., : rows.shape[-1]] = rows
    return wide[..., : rows.shape[-1]]


def gaps_untouched(rows: Tensor, gap: int = 5) -> bool:
    """Whether what `spread` put behind each row is still NaN."""
    wide = rows.as_strided((*rows.shape[:-1], rows.shape[-1] + gap), rows.stride())
    return bool(wide[..., rows.shape[-1] :].isnan().all())


def assert_rounded_once(result: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
    """`result` is `exact` (fp64) within half a unit of its dtype's last place, plus what fp32 arithmetic may lose.

    `terms`: what the results are sums of, where they nearly cancel: fp32 loses in proportion to them.
    """
    terms = exact if terms is None else terms
    scale = max(terms.abs().max().item(), exact.abs().max().item()) if exact.numel() else 0.0
    smallest = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps  # a unit below normal numbers
    rtol = torch.finfo(result.dtype).eps / 2 + 2e-6
    torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=1e-6 * scale + smallest)


def distance(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| over all elements."""
    return ((result.double() - exact).norm() / exact.norm()).item()
