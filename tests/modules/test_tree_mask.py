"""Rows of prefix trees: the masks against the rule written out, and the model on a tree against the model on its branches."""

from pathlib import Path

import pytest
import torch
from test_attention import block_kinds
from tiny_models import load_base, make_base
from torch.nn.attention.flex_attention import BlockMask

from torchft.modules import attention, tree_mask
from torchft.modules.attention import FLEX_BLOCK, attend
from torchft.modules.tree_mask import block_tree_mask, build_tree_mask, dense_tree_mask

# A row as a list of documents, each a trunk's length and its branches' lengths.
Row = list[tuple[int, ...]]
ROWS: list[Row] = [
    [(3, 2, 4), (1, 5, 1)],
    [(0, 4, 3), (5, 1, 3)],
    [(9,), (2, 1, 1, 3)],
]
LONG: list[Row] = [
    [(512, 256, 256)],
    [(130, 200, 100), (90, 128, 120)],
    [(128, 128, 128, 128, 128)],
    [(0, 300, 211), (1, 60, 60)],
    [(300, 5, 260), (40, 3, 2), (7, 90, 30)],
]


def tree(row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(documents, branches, positions), (T,) int each."""
    columns = []
    for document, (trunk, *branches) in enumerate(row):
        columns += [(document, 0, position) for position in range(trunk)]
        for number, length in enumerate(branches, start=1):
            columns += [(document, number, trunk + position) for position in range(length)]
    return tuple(torch.tensor(column, dtype=torch.int32) for column in zip(*columns, strict=True))


def rule(row: Row, window: int | None) -> torch.Tensor:
    """(T, T) bool: each token sees the part of its own path, trunk then branch, that is no later than itself."""
    documents, branches, positions = (values.tolist() for values in tree(row))
    size = len(documents)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(query + 1):
            path = documents[key] == documents[query] and branches[key] in (0, branches[query])
            near = window is None or positions[query] - positions[key] < window
            seen[query, key] = path and near
    return seen


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("row", ROWS)
def test_the_dense_mask_is_the_rule(row: Row, window: int | None) -> None:
    mask = dense_tree_mask(*(values[None] for values in tree(row)), window)
    assert torch.equal(mask[0, 0], rule(row, window))
    assert mask.any(-1).all()  # no query sees nothing: its softmax would be NaN


@pytest.mark.parametrize("window", [None, 100, 129, 300])
@pytest.mark.parametrize("row", LONG)
def test_blocks_skip_only_what_is_invisible_and_fill_only_what_is_visible(row: Row, window: int | None) -> None:
    fields = [values[None] for values in tree(row)]
    partial, full = block_kinds(block_tree_mask(*fields, window))
    dense = dense_tree_mask(*fields, window)[0, 0]
    num_blocks = partial.shape[-1]
    padded = torch.zeros(num_blocks * FLEX_BLOCK, num_blocks * FLEX_BLOCK, dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    some = padded.view(num_blocks, FLEX_BLOCK, num_blocks, FLEX_BLOCK).any(3).any(1)
    padded[len(dense) :, : len(dense)] = True  # queries behind the row's end are computed, and thrown away
    every = padded.view(num_blocks, FLEX_BLOCK, num_blocks, FLEX_BLOCK).all(3).all(1)
    assert not (full[0] & ~every).any()
    assert not (some & ~(partial | full)[0]).any()
    assert not (partial & full).any()
    if window is None:  # the answers of a pair do not pay for each other
        assert (partial | full).sum() <= some.sum() + num_blocks


def test_branches_of_whole_blocks_are_skipped_and_filled() -> None:
    """The trunk's 4 blocks and two branches of 2: of 36 pairs of blocks in reach, 4 are between the branches."""
    partial, full = block_kinds(block_tree_mask(*(values[None] for values in tree([(512, 256, 256)])), None))
    assert partial.sum() == 8 and full.sum() == 36 - 8 - 4


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("row", LONG[1:])
def test_flex_attention_with_the_tree_mask_equals_sdpa(row: Row, window: int | None) -> None:
    torch.manual_seed(0)
    fields = [values[None] for values in tree(row)]
    q, k, v = (torch.randn(1, heads, fields[0].shape[1], 16) for heads in (4, 2, 2))
    with torch.no_grad():
        expected = attend(q, k, v, dense_tree_mask(*fields, window))
        got = attend(q, k, v, block_tree_mask(*fields, window))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("row", LONG)
def test_cuda_attention_equals_the_dense_formula(row: Row, window: int | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    fields = [values[None].cuda() for values in tree(row)]
    shapes = [(1, heads, fields[0].shape[1], 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    mask = build_tree_mask(*fields, window)
    assert isinstance(mask, BlockMask)
    got = attend(q, k, v, mask)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, (q, k, v), upstream)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = attend(*exact, dense_tree_mask(*fields, window))
    exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((got, *gradients), (expected, *exact_gradients), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()  # as in test_attention.py


def test_long_rows_take_flex_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [values[None] for values in tree(LONG[0])]
    assert isinstance(build_tree_mask(*fields, None), torch.Tensor)
    monkeypatch.setattr(tree_mask, "flex_can_run", lambda device_type: True)
    assert isinstance(build_tree_mask(*fields, None), BlockMask)
    assert isinstance(build_tree_mask(*(values[:, :FLEX_BLOCK] for values in fields), None), torch.Tensor)
    assert attention.flex_can_run.__wrapped__("cpu") is False


WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize("windows", [{}, WINDOW], ids=["full", "window"])
def test_the_model_on_a_tree_is_the_model_on_each_branch(tmp_path: Path, windows: dict) -> None:
    """Every token's hidden state, and the gradients, as if each path stood alone in a row."""
    make_base(tmp_path, "qwen2", **windows)
    model = load_base(tmp_path)
    assert bool(windows) == any(window for window in model.model.windows if window)
    row: Row = [(5, 4, 7), (0, 3, 2), (6, 1, 8, 2)]
    documents, branches, positions = tree(row)
    ids = torch.randint(97, (1, len(documents)), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(len(documents), 97, generator=torch.Generator().manual_seed(1)) / 97

    got = model(ids, positions=positions[None], documents=documents[None], branches=branches[None])[0]
    own = torch.autograd.grad((got * weights).sum(), list(model.parameters()))
    expected, total = torch.zeros_like(got), 0.0
    for document, (_, *lengths) in enumerate(row):
        for branch in range(1, len(lengths) + 1):
            trunk = (documents == document) & (branches == 0)
            path = torch.nonzero(trunk | ((documents == document) & (branches == branch)))[:, 0]
            alone = model(ids[:, path])[0]
            keep = torch.where((branches[path] == 0) & (branch > 1), 0.0, 1.0)[:, None]  # the trunk counts once
            total = total + (alone * weights[path] * keep).sum()
            expected[path] = alone
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(own, torch.autograd.grad(total, list(model.parameters())), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
