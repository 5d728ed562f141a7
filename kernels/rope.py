"""Rotary position embedding in HF's half-split layout, on the way out of a fused qkv projection.

Su et al. 2021, https://arxiv.org/abs/2104.09864. Dimensions i and i + E/2 of a head form a pair, which the token's angle
rotates, in fp32, rounded once:

    first'  = first cos - second sin
    second' = second cos + first sin

Backward is the transpose, the same with -sin (also where the tables are scaled, as YaRN's are). `rope_split` takes the
output of a fused qkv projection apart and rotates on the way, `rope_merge` is its backward; `rope` is an op for plain
modules. Left out: interleaved pairs, rotating a part of a head.

Legend: B batch, T tokens, H heads, K key and value heads, N either of them, E head_dim, W = (H + 2K) E.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from torchft.kernels.launch import can_run, check_rows


@triton.jit
def _turn_heads(
    p_in, p_out, p_cos, p_sin, in_stride, i_block,
    N: tl.constexpr, E: tl.constexpr, TURN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of a token's N heads, `in_stride` apart, to side by side: rotated (TURN 1), back (-1), or copied (0)."""
    HALF: tl.constexpr = E // 2
    o_n = (i_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m = (o_n < N) & (o_e < HALF)  # (BLOCK_N, BLOCK_E) of pairs
    b_first = tl.load(p_in + o_n * in_stride + o_e, mask=m, other=0.0)
    b_second = tl.load(p_in + o_n * in_stride + HALF + o_e, mask=m, other=0.0)
    if TURN != 0:
        b_cos = tl.load(p_cos + o_e, mask=o_e < HALF, other=0.0)
        b_sin = tl.load(p_sin + o_e, mask=o_e < HALF, other=0.0) * TURN
        b_x, b_y = b_first.to(tl.float32), b_second.to(tl.float32)
        b_first = (b_x * b_cos - b_y * b_sin).to(p_out.dtype.element_ty)
        b_second = (b_y * b_cos + b_x * b_sin).to(p_out.dtype.element_ty)
    tl.store(p_out + o_n * E + o_e, b_first, mask=m)
    tl.store(p_out + o_n * E + HALF + o_e, b_second, mask=m)


# More than 14 parameters, so that q, k and v go through one launch instead of three. Blocks of one token lie next to each
# other in the grid: they share its cos and sin in L2.
@triton.jit
def _split_kernel(
    p_qkv, p_q, p_k, p_v, p_cos, p_sin, qkv_stride_b, qkv_stride_t, cos_stride_b, T,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token, from the packed row to q (rotated), k (rotated) or v (copied)."""
    Q_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    i_block = tl.program_id(0) % (Q_BLOCKS + 2 * K_BLOCKS)
    i_k = i_block - Q_BLOCKS
    i_v = i_k - K_BLOCKS
    i_row = (tl.program_id(0) // (Q_BLOCKS + 2 * K_BLOCKS)).to(tl.int64)
    i_b, i_t = i_row // T, i_row % T
    p_cos += i_b * cos_stride_b + i_t * (E // 2)
    p_sin += i_b * cos_stride_b + i_t * (E // 2)
    p_in = p_qkv + i_b * qkv_stride_b + i_t * qkv_stride_t
    p_q += i_row * (H * E)
    p_k += i_row * (K * E)
    p_v += i_row * (K * E)
    if i_block < Q_BLOCKS:
        _turn_heads(p_in, p_q, p_cos, p_sin, E, i_block, H, E, 1, BLOCK_N, BLOCK_E)
    elif i_k < K_BLOCKS:
        _turn_heads(p_in + H * E, p_k, p_cos, p_sin, E, i_k, K, E, 1, BLOCK_N, BLOCK_E)
    else:
        _turn_heads(p_in + (H + K) * E, p_v, p_cos, p_sin, E, i_v, K, E, 0, BLOCK_N, BLOCK_E)


@triton.jit
def _merge_kernel(
    p_dq, p_dk, p_dv, p_out, p_cos, p_sin,
    q_stride_b, q_stride_t, q_stride_n, k_stride_b, k_stride_t, k_stride_n, v_stride_b, v_stride_t, v_stride_n,
    cos_stride_b, T, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token, from dq (rotated back), dk (rotated back) or dv (copied) to the packed row."""
    Q_BLOCKS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    i_block = tl.program_id(0) % (Q_BLOCKS + 2 * K_BLOCKS)
    i_k = i_block - Q_BLOCKS
    i_v = i_k - K_BLOCKS
    i_row = (tl.program_id(0) // (Q_BLOCKS + 2 * K_BLOCKS)).to(tl.int64)
    i_b, i_t = i_row // T, i_row % T
    p_cos += i_b * cos_stride_b + i_t * (E // 2)
    p_sin += i_b * cos_stride_b + i_t * (E // 2)
    p_out += i_row * ((H + 2 * K) * E)
    p_dq += i_b * q_stride_b + i_t * q_stride_t
    p_dk += i_b * k_stride_b + i_t * k_stride_t
    p_dv += i_b * v_stride_b + i_t * v_stride_t
    if i_block < Q_BLOCKS:
        _turn_heads(p_dq, p_out, p_cos, p_sin, q_stride_n, i_block, H, E, -1, BLOCK_N, BLOCK_E)
    elif i_k < K_BLOCKS:
        _turn_heads(p_dk, p_out + H * E, p_cos, p_sin, k_stride_n, i_k, K, E, -1, BLOCK_N, BLOCK_E)
    else:
        _turn_heads(p_dv, p_out + (H + K) * E, p_cos, p_sin, v_stride_n, i_v, K, E, 0, BLOCK_N, BLOCK_E)


@triton.jit
def _rope_kernel(
    p_x, p_out, p_cos, p_sin, x_stride_b, x_stride_t, x_stride_n, cos_stride_b, T,
    N: tl.constexpr, E: tl.constexpr, TURN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token, rotated (TURN 1) or rotated back (-1)."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_block = tl.program_id(0) % BLOCKS
    i_row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_b, i_t = i_row // T, i_row % T
    p_cos += i_b * cos_stride_b + i_t * (E // 2)
    p_sin += i_b * cos_stride_b + i_t * (E // 2)
    p_x += i_b * x_stride_b + i_t * x_stride_t
    _turn_heads(p_x, p_out + i_row * (N * E), p_cos, p_sin, x_stride_n, i_block, N, E, TURN, BLOCK_N, BLOCK_E)


def _block(tensor: Tensor, num_heads: int, E: int) -> dict[str, int]:
    """Launch options: 8 pairs a thread, two 16-byte loads in bf16, up to 4 warps (16 heads of 128)."""
    if not can_run(tensor):
        raise ValueError(f"Triton cannot run on {tensor.device} outside its interpreter; pass eager=True")
    block_e = triton.next_power_of_2(E // 2)
    block_n = min(max(triton.next_power_of_2(num_heads), 4), max(1024 // block_e, 1))
    return {"BLOCK_N": block_n, "BLOCK_E": block_e, "num_warps": min(max(block_n * block_e // 256, 1), 4)}


def _check_tables(cos: Tensor, sin: Tensor, B: int, T: int) -> int:
    """The stride between batch entries of the tables, which may share one: (B or 1, T, E/2) fp32 contiguous."""
    shape = (cos.shape[0], T, cos.shape[-1])
    for name, table in (("cos", cos), ("sin", sin)):
        check_rows(name, table, shape, torch.float32)
        if shape[0] not in (1, B) or not table.is_contiguous():
            raise ValueError(f"{name}: needs {B} or 1 contiguous tables; got {shape}, strides {table.stride()}")
    return T * cos.shape[-1] if shape[0] > 1 else 0


def rope_merge(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, eager: bool = False) -> Tensor:
    """Backward of `rope_split`: q's and k's gradients rotated back, packed with v's. No autograd.

    Args:
        dq: (B, T, H, E); any strides but the last, which is 1, here and in dk and dv.
        dk: (B, T, K, E) in dq's dtype.
        dv: (B, T, K, E) in dq's dtype.
        cos, sin: (B or 1, T, E/2) fp32 contiguous.
        eager: compute with PyTorch ops.

    Returns:
        (B, T, (H + 2K) E) contiguous, in dq's dtype.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    B, T, H, E = dq.shape
    K = dk.shape[2]
    check_rows("dq", dq, (B, T, H, 2 * cos.shape[-1]))
    check_rows("dk", dk, (B, T, K, E), dq.dtype)
    check_rows("dv", dv, (B, T, K, E), dq.dtype)
    cos_stride = _check_tables(cos, sin, B, T)
    if eager:
        parts = (_rotate_eager(dq, cos, -sin), _rotate_eager(dk, cos, -sin), dv)
        return torch.cat([part.flatten(2) for part in parts], dim=-1)
    options = _block(dq, K, E)
    out = torch.empty(B, T, (H + 2 * K) * E, dtype=dq.dtype, device=dq.device)
    blocks = triton.cdiv(H, options["BLOCK_N"]) + 2 * triton.cdiv(K, options["BLOCK_N"])
    _merge_kernel[(B * T * blocks,)](
        dq, dk, dv, out, cos, sin, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        cos_stride, T, H, K, E, **options,
    )  # fmt: skip
    return out


def _rotate_eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, E/2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _side_by_side(grad: Tensor) -> Tensor:
    """The gradient of a sum is one number, expanded, with a last stride of 0, which is nobody's choice: copied."""
    return grad if grad.stride(-1) == 1 else grad.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("torchft::rope_split", mutates_args=())
def _rope_split(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E, H, K = *qkv.shape[:2], 2 * cos.shape[-1], num_heads, num_kv_heads
    check_rows("qkv", qkv, (B, T, (H + 2 * K) * E))
    cos_stride = _check_tables(cos, sin, B, T)
    options = _block(qkv, K, E)  # blocks of the size of k and v, the smaller ones
    q, k, v = (torch.empty(B, T, heads, E, dtype=qkv.dtype, device=qkv.device) for heads in (H, K, K))
    blocks = triton.cdiv(H, options["BLOCK_N"]) + 2 * triton.cdiv(K, options["BLOCK_N"])
    _split_kernel[(B * T * blocks,)](qkv, q, k, v, cos, sin, *qkv.stride()[:2], cos_stride, T, H, K, E, **options)
    return q, k, v


@_rope_split.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = *qkv.shape[:2], 2 * cos.shape[-1]
    return tuple(qkv.new_empty(B, T, heads, E) for heads in (num_heads, num_kv_heads, num_kv_heads))


# An op of its own, so that torch.compile, which traces the formulas of backward, meets one node and no kernel.
@torch.library.custom_op("torchft::rope_merge", mutates_args=())
def _rope_merge(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_merge(_side_by_side(dq), _side_by_side(dk), _side_by_side(dv), cos, sin)


@_rope_merge.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(*dq.shape[:2], (dq.shape[2] + 2 * dk.shape[2]) * dq.shape[3])


def _save_split(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, cos, sin, *heads = inputs
    ctx.save_for_backward(cos, sin)
    ctx.like = {"dtype": qkv.dtype, "device": qkv.device}
    ctx.shapes = [part.shape for part in output]
    ctx.set_materialize_grads(False)  # zeros are made below, and only for a part that nothing was computed from


def _merge_gradients(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = [torch.zeros(shape, **ctx.like) if g is None else g for g, shape in zip(grads, ctx.shapes, strict=True)]
    return torch.ops.torchft.rope_merge(*grads, *ctx.saved_tensors), None, None, None, None


_rope_split.register_autograd(_merge_gradients, setup_context=_save_split)


def rope_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, *, eager: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, rotated in fp32, and v from the output of a fused projection; differentiable in qkv, once.

    Args:
        qkv: (B, T, (H + 2K) E): q's heads, k's, v's; the last stride is 1, rows may be further apart.
        cos, sin: (B or 1, T, E/2) fp32 contiguous.
        num_heads: H.
        num_kv_heads: K.
        eager: compute with PyTorch ops, under their own autograd.

    Returns:
        New contiguous tensors in qkv's dtype: q (B, T, H, E), k (B, T, K, E), v (B, T, K, E).

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    if eager:
        parts = qkv.unflatten(-1, (-1, 2 * cos.shape[-1])).split((num_heads, num_kv_heads, num_kv_heads), dim=2)
        v = parts[2].clone(memory_format=torch.contiguous_format)
        return _rotate_eager(parts[0], cos, sin), _rotate_eager(parts[1], cos, sin), v
    return torch.ops.torchft.rope_split(qkv, cos, sin, num_heads, num_kv_heads)


@torch.library.custom_op("torchft::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x rotated, or a gradient rotated back."""
    x = _side_by_side(x) if back else x
    B, T, N, E = *x.shape[:3], 2 * cos.shape[-1]
    check_rows("x", x, (B, T, N, E))
    cos_stride = _check_tables(cos, sin, B, T)
    options = _block(x, N, E)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (B * T * triton.cdiv(N, options["BLOCK_N"]),)
    _rope_kernel[grid](x, out, cos, sin, *x.stride()[:3], cos_stride, T, N, E, -1 if back else 1, **options)
    return out


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save_rope(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _rope_gradient(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.torchft.rope(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_rope_gradient, setup_context=_save_rope)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, eager: bool = False) -> Tensor:
    """Rotate each head of x by its token's angles in fp32; differentiable in x.

    Args:
        x: (B, T, H, E); any strides but the last, which is 1.
        cos, sin: (B or 1, T, E/2) fp32 contiguous.
        eager: compute with PyTorch ops, under their own autograd.

    Returns:
        (B, T, H, E) contiguous, in x's dtype.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take, or Triton cannot run here.
    """
    return _rotate_eager(x, cos, sin) if eager else torch.ops.torchft.rope(x, cos, sin, False)
