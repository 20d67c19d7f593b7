"""What happens to q, k and v between their projection and attention, in one launch: norms by head, rotary, the KV pages.

Rotary embeddings (Su et al., "RoFormer", 2021) in the half-split convention: channel i of the first half of the rotated
channels is paired with channel i of the second half; channels past the rotated ones pass.
"""

from __future__ import annotations

import torch

from engine.kernels.compiler import tl, triton
from engine.kernels.norms import rms_norm_reference

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""


def rotate_and_write(
    qkv_TN: torch.Tensor,
    cos_LR: torch.Tensor,
    sin_LR: torch.Tensor,
    positions_T: torch.Tensor,
    token_slots_T: torch.Tensor,
    block_tables_SP: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    norm_round_before_weight: bool = True,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Normalise (where there are norm weights) and rotate q and k of merged activations in place; write k and v to pages.

    qkv_TN: [T, (H + 2 K) * D], q heads first, then k, then v. cos_LR, sin_LR: [max_len, R] with one value a pair of
    channels; 2 R <= D channels are rotated. positions_T: int, -1 for tokens to leave alone. Token t goes to page
    block_tables_SP[token_slots_T[t], positions_T[t] // block_size] of k_pages and v_pages [num_blocks, K, block_size, D].
    Pages in float8_e4m3fn take value / scale, with scales float32 [1]; Triton converts to it from compute capability 8.9 on.
    """
    assert (q_norm_D is None) == (k_norm_D is None) and (k_scale is None) == (v_scale is None)
    assert qkv_TN.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and qkv_TN.stride(1) == 1
    assert cos_LR.stride() == sin_LR.stride() == (cos_LR.shape[1], 1)
    num_tokens, pairs = qkv_TN.shape[0], cos_LR.shape[1]
    if num_tokens == 0:
        return
    num_rows = num_tokens * (num_heads + 2 * num_kv_heads)
    half_tile = triton.next_power_of_2(pairs)
    rows, num_warps = _tile_rows(half_tile, num_rows)
    _rotate_and_write_kernel[(triton.cdiv(num_rows, rows),)](
        qkv_TN,
        cos_LR,
        sin_LR,
        positions_T,
        token_slots_T,
        block_tables_SP,
        k_pages,
        v_pages,
        q_norm_D,
        k_norm_D,
        k_scale,
        v_scale,
        num_rows,
        qkv_TN.stride(0) if num_tokens > 1 else qkv_TN.shape[1],
        block_tables_SP.stride(0),
        norm_eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_SIZE=k_pages.shape[2],
        ROWS=rows,
        HALF_TILE=half_tile,
        REST_TILE=triton.next_power_of_2(max(head_dim - 2 * pairs, 1)),
        HAS_NORM=q_norm_D is not None,
        NORM_OFFSET=norm_offset,
        ROUND_BEFORE_WEIGHT=norm_round_before_weight,
        HAS_SCALE=k_scale is not None,
        num_warps=num_warps,
    )


def write_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    token_slots_T: torch.Tensor,
    block_tables_SP: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write k and v, strided views with neighbouring channels, to their pages, for models whose rotary is not fused.

    The other arguments are those of rotate_and_write.
    """
    assert (k_scale is None) == (v_scale is None) and k_TKD.stride(2) == v_TKD.stride(2) == 1
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    if num_tokens == 0:
        return
    num_rows = num_tokens * num_kv_heads
    tile = triton.next_power_of_2(head_dim)
    rows, num_warps = _tile_rows(tile, num_rows)
    _write_kv_kernel[(triton.cdiv(num_rows, rows),)](
        k_TKD,
        v_TKD,
        positions_T,
        token_slots_T,
        block_tables_SP,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        num_rows,
        *(k_TKD.stride()[:2] if num_tokens > 1 else (num_kv_heads * head_dim, k_TKD.stride(1))),
        *(v_TKD.stride()[:2] if num_tokens > 1 else (num_kv_heads * head_dim, v_TKD.stride(1))),
        block_tables_SP.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_pages.shape[2],
        ROWS=rows,
        TILE=tile,
        HAS_SCALE=k_scale is not None,
        num_warps=num_warps,
    )


def rotate_and_write_reference(
    qkv_TN: torch.Tensor,
    cos_LR: torch.Tensor,
    sin_LR: torch.Tensor,
    positions_T: torch.Tensor,
    token_slots_T: torch.Tensor,
    block_tables_SP: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    norm_round_before_weight: bool = True,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The definition of rotate_and_write, in plain torch."""
    num_rotated = num_heads + num_kv_heads
    heads = qkv_TN.unflatten(1, (num_rotated + num_kv_heads, head_dim))
    used = positions_T >= 0
    q, k = heads[used, :num_heads], heads[used, num_heads:num_rotated]
    if q_norm_D is not None and k_norm_D is not None:
        q = rms_norm_reference(q, q_norm_D, norm_eps, offset=norm_offset, round_before_weight=norm_round_before_weight)
        k = rms_norm_reference(k, k_norm_D, norm_eps, offset=norm_offset, round_before_weight=norm_round_before_weight)
    cos, sin = (table[positions_T[used].long()].float()[:, None] for table in (cos_LR, sin_LR))
    pairs = cos_LR.shape[1]
    qk = torch.cat([q, k], dim=1)
    first, second = qk[..., :pairs].float(), qk[..., pairs : 2 * pairs].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qk.dtype)
    heads[used, :num_rotated] = torch.cat([rotated, qk[..., 2 * pairs :]], dim=-1)
    k, v = heads[:, num_heads:num_rotated], heads[:, num_rotated:]
    write_kv_reference(k, v, positions_T, token_slots_T, block_tables_SP, k_pages, v_pages, k_scale=k_scale, v_scale=v_scale)


def write_kv_reference(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    token_slots_T: torch.Tensor,
    block_tables_SP: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The definition of write_kv, in plain torch."""
    block_size = k_pages.shape[2]
    used = positions_T >= 0
    positions = positions_T[used].long()
    page_ids = block_tables_SP[token_slots_T[used].long(), positions // block_size].long()
    for pages, values, scale in ((k_pages, k_TKD[used], k_scale), (v_pages, v_TKD[used], v_scale)):
        stored = values if scale is None else (values.float() / scale).clamp(-FP8_MAX, FP8_MAX)
        pages[page_ids, :, positions % block_size] = stored.to(pages.dtype)


def _tile_rows(tile: int, num_rows: int) -> tuple[int, int]:
    """Heads a program takes, and its warps: one vector of 16 bytes a thread for a few tokens, larger programs for many."""
    rows_of_a_warp = max(256 // tile, 1)
    if num_rows * tile <= 1 << 21:
        return rows_of_a_warp, 1
    return rows_of_a_warp * 8, 4


@triton.jit
def _page_offsets(row_mask, slots, positions, kv_heads, tables_ptr, table_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a page tensor seen as [num_blocks * K * block_size, D], int64."""
    pages = tl.load(tables_ptr + slots.to(tl.int64) * table_stride + positions // BLOCK, mask=row_mask, other=0)
    return (pages.to(tl.int64) * K + kv_heads) * BLOCK + positions % BLOCK


@triton.jit
def _to_pages(values, scale, dtype: tl.constexpr, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        # The device's minimum and maximum drop a NaN otherwise, and its request would go on with a number made of nothing.
        values = tl.clamp(values.to(tl.float32) / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)


@triton.jit
def _norm_pairs(
    first, second, scale, norm_ptr, pairs, mask,
    dtype: tl.constexpr, PAIRS: tl.constexpr, NORM_OFFSET: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr,
):  # fmt: skip
    """RMSNorm of the rotated channels whose head's inverse root mean square is `scale`: float32, rounded to dtype."""
    first, second = first * scale, second * scale
    if ROUND_BEFORE_WEIGHT:
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    first_weight = tl.load(norm_ptr + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    second_weight = tl.load(norm_ptr + PAIRS + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    first = (first * (first_weight + NORM_OFFSET)).to(dtype).to(tl.float32)
    second = (second * (second_weight + NORM_OFFSET)).to(dtype).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_and_write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    token_slots_ptr,
    tables_ptr,
    k_pages_ptr,
    v_pages_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_rows,
    qkv_stride,
    table_stride,
    norm_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """A row is one head of one token; q, k and v rows share programs, and masks tell them apart."""
    HEADS_OF_TOKEN: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    REST: tl.constexpr = HEAD_DIM - 2 * PAIRS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    page_dtype: tl.constexpr = k_pages_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, heads = rows // HEADS_OF_TOKEN, rows % HEADS_OF_TOKEN
    positions = tl.load(positions_ptr + tokens, mask=rows < num_rows, other=-1)
    used = positions >= 0
    is_q = heads < NUM_HEADS
    is_v = heads >= NUM_HEADS + NUM_KV_HEADS
    to_k = used & (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    to_v = used & is_v
    slots = tl.load(token_slots_ptr + tokens, mask=to_k | to_v, other=0)

    pairs = tl.arange(0, HALF_TILE)
    rest = 2 * PAIRS + tl.arange(0, REST_TILE)
    in_pairs = pairs[None, :] < PAIRS
    in_rest = rest[None, :] < HEAD_DIM
    head_ptr = qkv_ptr + (tokens.to(tl.int64) * qkv_stride + heads * HEAD_DIM)[:, None]
    pair_mask = used[:, None] & in_pairs
    rest_mask = used[:, None] & in_rest
    first = tl.load(head_ptr + pairs[None, :], mask=pair_mask, other=0.0)
    second = tl.load(head_ptr + PAIRS + pairs[None, :], mask=pair_mask, other=0.0)
    angles = positions.to(tl.int64)[:, None] * PAIRS + pairs[None, :]
    turn_mask = pair_mask & ~is_v[:, None]
    cos = tl.load(cos_ptr + angles, mask=turn_mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=turn_mask, other=0.0).to(tl.float32)
    if REST > 0:
        passed = tl.load(head_ptr + rest[None, :], mask=rest_mask, other=0.0)

    first_turned, second_turned = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first_turned * first_turned + second_turned * second_turned, axis=1)
        if REST > 0:
            passed_float = passed.to(tl.float32)
            squares += tl.sum(passed_float * passed_float, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
        norm_ptr = tl.where(is_q[:, None], q_norm_ptr, k_norm_ptr)
        first_turned, second_turned = _norm_pairs(
            first_turned, second_turned, scale, norm_ptr, pairs, turn_mask, dtype, PAIRS, NORM_OFFSET, ROUND_BEFORE_WEIGHT
        )
        if REST > 0:
            passed_float = passed_float * scale
            if ROUND_BEFORE_WEIGHT:
                passed_float = passed_float.to(dtype).to(tl.float32)
            rest_weight = tl.load(norm_ptr + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)
            passed_float = passed_float * (rest_weight + NORM_OFFSET)
            passed = tl.where(is_v[:, None], passed, passed_float.to(dtype))
            tl.store(head_ptr + rest[None, :], passed, mask=rest_mask & ~is_v[:, None])
    # A select, because 0 times an infinite value would not leave v as it was.
    turned = (first_turned * cos - second_turned * sin).to(dtype)
    second = tl.where(is_v[:, None], second, (second_turned * cos + first_turned * sin).to(dtype))
    first = tl.where(is_v[:, None], first, turned)
    tl.store(head_ptr + pairs[None, :], first, mask=turn_mask)
    tl.store(head_ptr + PAIRS + pairs[None, :], second, mask=turn_mask)

    kv_heads = (heads - NUM_HEADS) % NUM_KV_HEADS
    page_rows = _page_offsets(to_k | to_v, slots, positions, kv_heads, tables_ptr, table_stride, NUM_KV_HEADS, BLOCK_SIZE)
    page_ptr = tl.where(is_v, v_pages_ptr, k_pages_ptr)[:, None] + page_rows[:, None] * HEAD_DIM
    kv_scale = 1.0
    if HAS_SCALE:
        kv_scale = tl.where(is_v, tl.load(v_scale_ptr), tl.load(k_scale_ptr))[:, None]
    to_pages = (to_k | to_v)[:, None]
    tl.store(page_ptr + pairs[None, :], _to_pages(first, kv_scale, page_dtype, HAS_SCALE), mask=to_pages & in_pairs)
    tl.store(page_ptr + PAIRS + pairs[None, :], _to_pages(second, kv_scale, page_dtype, HAS_SCALE), mask=to_pages & in_pairs)
    if REST > 0:
        tl.store(page_ptr + rest[None, :], _to_pages(passed, kv_scale, page_dtype, HAS_SCALE), mask=to_pages & in_rest)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    positions_ptr,
    token_slots_ptr,
    tables_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_rows,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """A row is the k and the v of one head of one token."""
    page_dtype: tl.constexpr = k_pages_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, heads = rows // NUM_KV_HEADS, rows % NUM_KV_HEADS
    positions = tl.load(positions_ptr + tokens, mask=rows < num_rows, other=-1)
    used = positions >= 0
    slots = tl.load(token_slots_ptr + tokens, mask=used, other=0)
    channels = tl.arange(0, TILE)[None, :]
    mask = used[:, None] & (channels < HEAD_DIM)
    tokens_long, heads_long = tokens.to(tl.int64), heads.to(tl.int64)
    k = tl.load(k_ptr + (tokens_long * k_token_stride + heads_long * k_head_stride)[:, None] + channels, mask=mask, other=0.0)
    v = tl.load(v_ptr + (tokens_long * v_token_stride + heads_long * v_head_stride)[:, None] + channels, mask=mask, other=0.0)
    page_rows = _page_offsets(used, slots, positions, heads, tables_ptr, table_stride, NUM_KV_HEADS, BLOCK_SIZE)
    offsets = page_rows[:, None] * HEAD_DIM + channels
    k_scale = 1.0
    v_scale = 1.0
    if HAS_SCALE:
        k_scale = tl.load(k_scale_ptr)
        v_scale = tl.load(v_scale_ptr)
    tl.store(k_pages_ptr + offsets, _to_pages(k, k_scale, page_dtype, HAS_SCALE), mask=mask)
    tl.store(v_pages_ptr + offsets, _to_pages(v, v_scale, page_dtype, HAS_SCALE), mask=mask)
