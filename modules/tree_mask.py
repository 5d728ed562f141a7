"""Attention masks of rows that hold prefix trees: a prompt once, and behind it several answers that do not see each other.

    columns     P1 P2 P3 | A1 A2 | B1 B2 B3 | Q1 ...      a prompt with two answers, then the next document
    documents    0  0  0 |  0  0 |  0  0  0 |  1
    branches     0  0  0 |  1  1 |  2  2  2 |  0          0: the trunk, which all branches of the document see
    positions    0  1  2 |  3  4 |  3  4  5 |  0          restarted in each branch, at the trunk's end

A query sees a key of its own document that is not later in the row, if that is of the trunk or of its own branch, and with a
sliding window w at most w - 1 positions (not columns) earlier. So each branch computes what the trunk and it would compute as a
row of their own. Trunks and branches may come in any order in which a token follows those that it sees; the tokens of a document
stand together, and so do those of a branch.

Legend: B batch, T tokens, N blocks of 128 tokens.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchft.modules.attention import FLEX_BLOCK, block_lists, flex_can_run, run_ends


def build_tree_mask(documents: Tensor, branches: Tensor, positions: Tensor, window: int | None) -> Tensor | BlockMask:
    """The mask for documents, branches and positions (B, T) int: FlexAttention's on CUDA for rows longer than a block, else a
    dense one. Padding is a document of its own, as in `build_mask`.
    """
    if documents.shape[1] > FLEX_BLOCK and flex_can_run(documents.device.type):
        return block_tree_mask(documents, branches, positions, window)
    return dense_tree_mask(documents, branches, positions, window)


def dense_tree_mask(documents: Tensor, branches: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """The rule of this file's docstring, spelled out: bool (B, 1, T, T), True where the query may look."""
    query, key = (slice(None), slice(None), None), (slice(None), None)  # (B, T, 1), (B, 1, T)
    column = torch.arange(documents.shape[1], device=documents.device)
    visible = (column <= column[:, None]) & (documents[query] == documents[key])
    visible &= (branches[key] == 0) | (branches[query] == branches[key])
    if window is not None:
        visible &= positions[key] > positions[query] - window
    return visible[:, None]


def block_tree_mask(documents: Tensor, branches: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """The same rule for FlexAttention, from the smallest and largest values in each block, as `attention.block_mask` does it.

    A block is skipped only if none of it can be visible, and full (computed without a mask) only if all of it is; whatever
    is in between is evaluated by `visible`, so that the result is exact.
    """
    num_tokens = documents.shape[1]
    groups = documents * (branches.amax() + 1) + branches  # one number for each branch of each document
    doc_low, doc_high = _extremes(documents)
    group_low, group_high = _extremes(groups)
    branch_low, branch_high = _extremes(branches)
    index = torch.arange(doc_low.shape[1], device=documents.device)
    causal, earlier = index <= index[:, None], index < index[:, None]  # (N, N): query blocks down, key blocks across

    may_meet = _overlap(doc_low, doc_high) & (_overlap(group_low, group_high) | (branch_low == 0)[:, None])
    whole = _constant(doc_low, doc_high) & (_constant(group_low, group_high) | (branch_high == 0)[:, None])
    if window is not None:
        low, high = _extremes(positions)
        may_meet &= low[:, :, None] - high[:, None] < window  # the nearest pair of the two blocks
        whole &= high[:, :, None] - low[:, None] < window  # the farthest
    full = earlier & whole
    partial = causal & may_meet & ~full
    ends = torch.where(branches == 0, run_ends(documents), run_ends(groups))  # who comes later does not see the key

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k <= q) & (q < ends[b, k])
        return allowed if window is None else allowed & (positions[b, k] > positions[b, q] - window)

    return BlockMask.from_kv_blocks(
        *block_lists(partial), *block_lists(full), FLEX_BLOCK, visible, seq_lengths=(num_tokens, num_tokens)
    )


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) -> the smallest and largest value in each block, (B, N) twice; queries behind the row's end are thrown away."""
    num_rows, num_tokens = values.shape
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    beyond = values[:, -1:].expand(-1, num_blocks * FLEX_BLOCK - num_tokens)
    blocks = torch.cat((values, beyond), dim=1).view(num_rows, num_blocks, FLEX_BLOCK)
    return blocks.amin(-1), blocks.amax(-1)


def _overlap(low: Tensor, high: Tensor) -> Tensor:
    """Whether the ranges of a query block and a key block have a number in common, (B, N, N)."""
    return (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])


def _constant(low: Tensor, high: Tensor) -> Tensor:
    """Whether both blocks hold one and the same number, (B, N, N)."""
    return (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])
