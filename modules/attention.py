"""Causal self-attention: plain linears around one attention call, the masks it takes, and the KV cache of generation.

A query sees the keys of its own document that are not later than itself and, with a sliding window w, at most w - 1
positions earlier (transformers' rule). `build_mask` puts that into one of three forms, once per forward and window:

- None: every row is one document, no window in reach: SDPA's own causal path, cuDNN's kernel first on CUDA.
- BlockMask: packed rows on CUDA: FlexAttention, which skips the 128 x 128 blocks that nothing in them can see.
- bool Tensor (B or 1, 1, T, S): packed rows elsewhere, rows of one block or less, and generation with a cache.

Soft-capped scores (Gemma 2), cap * tanh(score / cap), and sinks (gpt-oss), one more score of each head that takes its share of
the softmax and has no value, are nothing SDPA has: FlexAttention where it runs, else plain products.

Legend: B batch, T query tokens, S key tokens, D hidden, H heads, K key/value heads, E head_dim.
"""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from torchft.modules.compiler import missing_compiler
from torchft.modules.loss import soft_cap
from torchft.modules.norm import build_norm
from torchft.modules.rope import apply_rope

if TYPE_CHECKING:  # that module imports this one
    from torchft.modules.transformer import TransformerConfig

Mask = Tensor | BlockMask | None

PADDING = 1 << 20  # the document of tokens that are padding; those of a row count upwards from 0
FLEX_BLOCK = 128  # tokens per side of a block that FlexAttention computes or skips as a whole

# cuDNN's causal kernel is 1.8x as fast as flash-2 on an H200. What a kernel cannot take, fp32 say, goes to the next.
SDPA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class LayerCache:
    """Keys and values of one layer, for the tokens so far: two (B, K, S, E) buffers filled from the left.

    They are made when the first tokens come, in the dtype that the model computes in, which need not be its weights'.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, E) at columns start .. start + T; returns all columns so far, (B, K, start + T, E) twice."""
        if start == 0:
            self.keys, self.values = k.new_empty(self.shape), v.new_empty(self.shape)
        end = start + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Grouped-query attention; `qk_norm` normalises queries and keys, per head or all heads at once, before the rotation."""

    def __init__(self, config: "TransformerConfig") -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        q_width = config.num_attention_heads * head_dim
        kv_width = config.num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.multiplier, self.softcap = config.attention_multiplier, config.attn_logit_softcapping
        self.interleaved = config.rope.interleaved
        self.packed = config.packed_qkv
        if self.packed:
            self.qkv_proj = nn.Linear(hidden, q_width + 2 * kv_width, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden, q_width, bias=config.qkv_bias)
            self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
            self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, hidden, bias=config.o_bias)
        sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)
        self.norm_over_heads = config.qk_norm_over_heads
        self.q_norm = build_norm(config, q_width if self.norm_over_heads else head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, kv_width if self.norm_over_heads else head_dim) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None = None, start: int = 0
    ) -> Tensor:
        """x (B, T, D), cos and sin (B, T, R/2) -> (B, T, D). With a cache, the T tokens are columns from `start` on."""
        q, k, v = self._heads(x)
        q, k = apply_rope(q, cos, sin, self.interleaved), apply_rope(k, cos, sin, self.interleaved)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, E)
        if cache is not None:
            k, v = cache.append(k, v, start)  # (B, K, S, E)
        y = attend(q, k, v, mask, self.multiplier, self.softcap, self.sinks).transpose(1, 2)  # (B, T, H, E)
        return self.o_proj(y.flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries (B, T, H, E), keys and values (B, T, K, E), normalised and not yet rotated."""
        if self.packed:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.norm_over_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.q_norm is not None and not self.norm_over_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    multiplier: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(m q k^T where the mask allows) v: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E).

    multiplier: m; None = 1 / sqrt(E). softcap: scores become cap * tanh(score / cap), before the mask; sinks (H,): a further
    score of every query, whose value is 0. These two need a mask.
    """
    grouped = q.shape[1] != k.shape[1]  # H / K query heads share one key/value head
    options = {"scale": multiplier, "enable_gqa": grouped}
    if isinstance(mask, BlockMask):
        compile_here = q.is_cuda and not torch.compiler.is_compiling()  # within a compiled block it is part of that
        flex = _compiled_flex() if compile_here else flex_attention
        options |= {"score_mod": None if softcap is None else _capped(softcap), "block_mask": mask}
        if sinks is None:
            return flex(q, k, v, **options)
        y, more = flex(q, k, v, return_aux=AuxRequest(lse=True), **options)
        return _with_sinks(y, more.lse, sinks)
    if softcap is not None or sinks is not None:
        return _plain_attention(q, k, v, mask, multiplier, softcap, sinks)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)
    with sdpa_kernel(SDPA_PRIORITY, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)


def _with_sinks(y: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """What attention without sinks, y (B, H, T, E), becomes with them; log_sum (B, H, T): the log of its sum of exponentials.

    With S = exp(log_sum), every weight shrinks by S / (S + exp(sink)), which is sigmoid(log_sum - sink).
    """
    return y * torch.sigmoid(log_sum - sinks.float()[:, None]).unsqueeze(-1).to(y.dtype)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, multiplier: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The formula of `attend` in plain products; holds all scores. Cap and softmax in fp32."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # (B, H, S, E)
    multiplier = q.shape[-1] ** -0.5 if multiplier is None else multiplier
    scores = (q @ k.transpose(2, 3)) * multiplier  # (B, H, T, S)
    scores = scores.float() if softcap is None else soft_cap(scores, softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1].to(v.dtype) @ v


@functools.cache  # one function for each cap, or torch.compile would see a new one each time
def _capped(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's score_mod."""
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Not `dynamic=False`: with a new graph for every length, the ninth one would fall back to the uncompiled form.
    return torch.compile(flex_attention)


@functools.cache
def flex_can_run(device_type: str) -> bool:
    """FlexAttention is for CUDA, and there must be compiled: its uncompiled form holds all T x T scores."""
    if device_type != "cuda":
        return False
    missing = missing_compiler(torch.device(device_type))
    if missing:
        warnings.warn(
            f"packed rows take a dense attention mask, several times slower than FlexAttention, which lacks {missing}",
            stacklevel=2,
        )
    return not missing


def build_mask(
    ids: Tensor,
    num_keys: int,
    window: int | None,
    documents: Tensor | None,
    cached: bool = False,
    beyond_sdpa: bool = False,
) -> Mask:
    """The mask for ids (B, T), the last T of `num_keys` = S tokens (T and S differ only in generation).

    documents (B, S) int: the id of each token's document, whose tokens stand together; None = every row is one. A padding token
    needs an id of its own (PADDING, or any that no document has), so that it sees at least itself: a fully masked softmax
    would be NaN.
    cached: for generation, which runs uncompiled: FlexAttention would hold all scores then, so its mask is a dense one.
    beyond_sdpa: with caps or sinks, which SDPA's causal path cannot do: never None.
    """
    if window is not None and window >= num_keys:
        window = None
    square = ids.shape[1] == num_keys
    if documents is None and window is None and square and not beyond_sdpa:
        return None
    # Within one block there is nothing to skip, and FlexAttention has no kernel for some lengths so short.
    if square and not cached and num_keys > FLEX_BLOCK and flex_can_run(ids.device.type):
        return block_mask(torch.zeros_like(ids) if documents is None else documents, window)
    return dense_mask(ids.shape[1], num_keys, window, documents, ids.device)


def dense_mask(
    num_queries: int, num_keys: int, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """The rule of this file's docstring, spelled out: bool (B or 1, 1, T, S), True where the query may look."""
    key = torch.arange(num_keys, device=device)[None]  # (1, S)
    query = key[:, num_keys - num_queries :].T  # (T, 1)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if documents is None:
        return visible[None, None]
    same = documents[:, num_keys - num_queries :, None] == documents[:, None]  # (B, T, S)
    return (visible & same)[:, None]


def block_mask(documents: Tensor, window: int | None) -> BlockMask:
    """The same rule for FlexAttention: documents (B, T) int -> a BlockMask of ceil(T / 128) blocks a side.

    `create_block_mask` would evaluate the rule at all T x T pairs; here only the smallest and largest document id of
    each block are compared. A block is full (computed without a mask) if all of it is visible for certain, skipped if
    its ids cannot meet, and else evaluated by `visible`; so the result is exact for any order of documents.
    """
    num_rows, num_tokens = documents.shape
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    beyond = documents[:, -1:].expand(-1, num_blocks * FLEX_BLOCK - num_tokens)  # queries there are thrown away
    blocks = torch.cat((documents, beyond), dim=1).view(num_rows, num_blocks, FLEX_BLOCK)
    low, high = blocks.amin(-1), blocks.amax(-1)  # (B, N)

    index = torch.arange(num_blocks, device=documents.device)
    query, key = index[:, None], index[None]  # (N, 1), (1, N)
    reachable, whole = key <= query, key < query
    if window is not None:  # nearest and farthest distance, in tokens, between a query and a key of the two blocks
        nearest, farthest = (query - key - 1) * FLEX_BLOCK + 1, (query - key + 1) * FLEX_BLOCK - 1
        reachable, whole = reachable & (nearest < window), whole & (farthest < window)
    may_meet = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])  # (B, N, N)
    one_document = (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])
    full = whole & one_document
    partial = reachable & may_meet & ~full
    ends = run_ends(documents)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (k <= q) & (q < ends[b, k])
        return allowed if window is None else allowed & (k > q - window)

    return BlockMask.from_kv_blocks(
        *block_lists(partial), *block_lists(full), FLEX_BLOCK, visible, seq_lengths=(num_tokens, num_tokens)
    )


def run_ends(ids: Tensor) -> Tensor:
    """Of each token the first column behind its run of equal ids: (B, T) int -> (B, T) int32.

    In a mask for FlexAttention this one number per key does what comparing the ids of both sides does. On an H200 the forward of a
    tree is 2.9 times as fast for it (heads of 64 numbers), that of packed rows 1.2 times (128), and backward 1.2 to 1.3 times.
    """
    num_tokens = ids.shape[1]
    behind = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=ids.device)
    last = F.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)  # of its run
    return torch.where(last, behind, num_tokens).flip(1).cummin(1).values.flip(1).int()


def block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, N) bool -> per row of blocks: how many (B, 1, N), and their column indices first in (B, 1, N, N) int32."""
    counts = chosen.sum(-1, dtype=torch.int32)
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], indices[:, None].contiguous()
