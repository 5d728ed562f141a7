"""The masks against the rule written out pair by pair, attention against its formula, and FlexAttention's blocks."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from torchft.modules import attention
from torchft.modules.attention import attend, block_mask, build_mask, dense_mask, run_ends

CPU = torch.device("cpu")
IDS = torch.zeros(2, 12, dtype=torch.int64)


def rule(num_queries: int, num_keys: int, window: int | None, documents: list[int]) -> torch.Tensor:
    """(T, S) bool, from the sentence in attention.py's docstring."""
    rows = []
    for query in range(num_keys - num_queries, num_keys):
        reach = num_keys if window is None else window
        rows.append([0 <= query - key < reach and documents[query] == documents[key] for key in range(num_keys)])
    return torch.tensor(rows)


def packed(lengths: list[int]) -> torch.Tensor:
    """Document ids (T,) of documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()


@pytest.mark.parametrize("window", [None, 1, 3, 11, 12, 13])
@pytest.mark.parametrize("num_queries", [12, 5, 1])
def test_dense_mask_is_the_rule(window, num_queries):
    documents = torch.stack([packed([12]), packed([1, 4, 7]), packed([5, 5, 2])])
    mask = dense_mask(num_queries, 12, window, documents, CPU)
    assert mask.shape == (3, 1, num_queries, 12)
    for row, ids in zip(mask[:, 0], documents.tolist(), strict=True):
        assert torch.equal(row, rule(num_queries, 12, window, ids))
    without = dense_mask(num_queries, 12, window, None, CPU)
    assert torch.equal(without[0, 0], rule(num_queries, 12, window, [0] * 12))


def test_the_fast_path_is_taken_when_the_mask_is_plainly_causal():
    assert build_mask(IDS, 12, None, None) is None
    assert build_mask(IDS, 12, 12, None) is None  # a window that reaches the first token
    assert build_mask(IDS, 12, 11, None) is not None
    assert build_mask(IDS, 12, None, None, beyond_sdpa=True) is not None  # SDPA's causal path has no caps
    assert build_mask(IDS[:, :1], 12, None, None) is not None  # is_causal would align the query with the first key
    assert build_mask(IDS, 12, None, packed([12])[None]) is not None


@pytest.mark.parametrize("window", [None, 3])
def test_no_row_is_ever_fully_masked(window):
    documents = torch.stack([packed([5, 7]), packed([9, 3])])
    assert dense_mask(12, 12, window, documents, CPU).any(-1).all()


@pytest.mark.parametrize("softcap, sunk", [(None, False), (0.7, False), (None, True), (0.7, True)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("window, lengths", [(None, [9]), (4, [9]), (None, [2, 6, 1]), (3, [5, 4])])
def test_attention_is_its_formula(heads, kv_heads, window, lengths, softcap, sunk):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 10, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    documents = None if len(lengths) == 1 else packed(lengths)[None].expand(2, -1)
    multiplier = None if softcap is None else 0.8
    sinks = torch.randn(heads, requires_grad=True)
    mask = build_mask(IDS[:, :9], 9, window, documents, beyond_sdpa=softcap is not None or sunk)
    got = attend(q, k, v, mask, multiplier, softcap, sinks if sunk else None)

    repeated_k, repeated_v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q.double() @ repeated_k.double().transpose(2, 3)) * (multiplier or 1 / math.sqrt(10))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    allowed = rule(9, 9, window, packed(lengths).tolist())
    exponentials = scores.masked_fill(~allowed, -math.inf).exp()
    below = exponentials.sum(-1, keepdim=True) + (sinks.exp()[:, None, None] if sunk else 0.0)
    expected = (exponentials / below @ repeated_v.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    upstream, inputs = torch.randn_like(got), (q, k, v, *[sinks] * sunk)
    gradients = torch.autograd.grad((got * upstream).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((expected * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


BLOCK_CASES = [
    ([512], None),
    ([512], 100),
    ([512], 256),
    ([512], 257),
    ([130, 126, 256], None),
    ([128, 128, 128, 128], None),
    ([3, 300, 1, 77, 131], 50),
    ([1] * 130 + [200], None),
    ([200, 150, 67], None),  # 417 tokens: the last block is not full
    ([200, 150, 67], 129),
]


def block_kinds(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial, full), bool (B, N, N), from the lists of a BlockMask."""
    num_blocks = mask.kv_indices.shape[-1]

    def chosen(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        used = torch.arange(num_blocks) < counts[:, 0, :, None]
        return torch.zeros_like(used).scatter(-1, indices[:, 0].long(), used)

    return chosen(mask.kv_num_blocks, mask.kv_indices), chosen(mask.full_kv_num_blocks, mask.full_kv_indices)


@pytest.mark.parametrize("lengths, window", BLOCK_CASES)
def test_blocks_skip_only_what_is_invisible_and_fill_only_what_is_visible(lengths, window):
    documents = torch.stack([packed(lengths), packed(lengths[::-1])])
    num_tokens = documents.shape[1]
    partial, full = block_kinds(block_mask(documents, window))
    assert not (partial & full).any()
    num_blocks = partial.shape[-1]
    size = attention.FLEX_BLOCK
    total = num_blocks * size
    for row, ids in enumerate(documents.tolist()):
        ids += ids[-1:] * (
            total - num_tokens
        )  # queries beyond the end are computed and thrown away; keys must not be seen
        visible = dense_mask(total, total, window, torch.tensor([ids]), CPU)[0, 0]
        visible[:, num_tokens:] = False
        blocks = visible.view(num_blocks, size, num_blocks, size)
        some, every = blocks.any(3).any(1), blocks.all(3).all(1)
        assert torch.equal(full[row], every)
        assert torch.equal(partial[row], some & ~every)  # and no block is evaluated in vain


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "scores", [(), (0.8, 0.7), (None, None, torch.tensor([0.5, -1.0, 2.0, 0.0]))], ids=["plain", "scaled and capped", "sinks"]
)
@pytest.mark.parametrize("lengths, window", BLOCK_CASES[4:])
def test_flex_attention_with_the_block_mask_equals_sdpa(lengths, window, scores):
    """FlexAttention's own eager form, which evaluates mask and block lists alike on the CPU."""
    torch.manual_seed(0)
    documents = packed(lengths)[None]
    num_tokens = documents.shape[1]
    q, k, v = (torch.randn(1, heads, num_tokens, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        expected = attend(q, k, v, dense_mask(num_tokens, num_tokens, window, documents, CPU), *scores)
        got = attend(q, k, v, block_mask(documents, window), *scores)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_blocks_stay_exact_when_documents_are_in_no_order():
    documents = torch.tensor([5, 2, 2, 9])[torch.arange(4).repeat_interleave(128)][None]
    partial, full = block_kinds(block_mask(documents, None))
    assert full[0].tolist() == [[False] * 4, [False] * 4, [False, True, False, False], [False] * 4]
    assert partial[0].tolist() == torch.eye(4, dtype=torch.bool).tolist()


def test_runs_end_where_the_next_begins():
    ids = torch.tensor([[7, 7, 3, 3, 3, 9], [4, 4, 4, 4, 4, 4], [1, 2, 1, 1, 2, 2]], dtype=torch.int32)
    expected = [[2, 2, 5, 5, 5, 6], [6] * 6, [1, 2, 4, 4, 6, 6]]
    assert run_ends(ids).tolist() == expected and run_ends(ids[:, :1]).tolist() == [[1]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, softcap, sunk", [(64, None, False), (128, None, False), (256, 1.5, False), (64, None, True)])
@pytest.mark.parametrize("lengths, window", BLOCK_CASES)
def test_cuda_attention_equals_the_dense_formula(lengths, window, head_dim, softcap, sunk):
    """The last two: Gemma 2's and gpt-oss's."""
    torch._dynamo.reset()  # the ninth form of one function would run uncompiled
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    ids = torch.zeros(2, num_tokens, dtype=torch.int64, device="cuda")
    documents = packed(lengths).cuda().expand(2, -1) if len(lengths) > 1 else None
    q, k, v = (
        torch.randn(2, heads, num_tokens, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    sinks = torch.randn(8, device="cuda", requires_grad=True)
    mask = build_mask(ids, num_tokens, window, documents, beyond_sdpa=softcap is not None or sunk)
    blocks = bool(documents is not None or (window is not None and window < num_tokens) or softcap or sunk)
    assert isinstance(mask, BlockMask) == blocks
    got = attend(q, k, v, mask, softcap=softcap, sinks=sinks if sunk else None)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, (q, k, v, *[sinks] * sunk), upstream)

    allowed = rule(num_tokens, num_tokens, window, packed(lengths).tolist()).cuda()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, *[sinks] * sunk)]
    repeated_k, repeated_v = (x.repeat_interleave(4, dim=1) for x in exact[1:3])
    scores = exact[0] @ repeated_k.transpose(2, 3) / math.sqrt(head_dim)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    exponentials = scores.masked_fill(~allowed, -math.inf).exp()
    expected = exponentials / (exponentials.sum(-1, keepdim=True) + (exact[3].exp()[:, None, None] if sunk else 0.0)) @ repeated_v
    exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((got, *gradients), (expected, *exact_gradients), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()  # bf16 rounds by 2^-9 = 2e-3 at every one of a few steps


def test_without_a_compiler_packed_rows_take_the_dense_mask_and_say_so(monkeypatch):
    monkeypatch.setattr(attention, "missing_compiler", lambda device: "a C compiler (apt install gcc)")
    attention.flex_can_run.cache_clear()
    with pytest.warns(UserWarning, match="dense attention mask.*lacks a C compiler"):
        assert not attention.flex_can_run("cuda")
    attention.flex_can_run.cache_clear()


def test_generation_takes_a_dense_mask_where_training_takes_flex(monkeypatch):
    """Uncompiled FlexAttention would hold the scores of all heads: 24 GiB for one row of 8k tokens and 32 heads."""
    monkeypatch.setattr(attention, "flex_can_run", lambda device_type: True)
    ids = torch.zeros(1, 300, dtype=torch.int64)
    documents = torch.zeros(1, 300, dtype=torch.int32)
    assert isinstance(attention.build_mask(ids, 300, None, documents), attention.BlockMask)
    assert isinstance(attention.build_mask(ids, 300, None, documents, cached=True), torch.Tensor)
