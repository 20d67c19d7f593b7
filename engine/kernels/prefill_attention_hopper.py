"""Prefill attention for Hopper, in Gluon: what `prefill_attention` does, with warps that load and warps that compute.

FlashAttention-3's plan (arXiv 2407.08608). One warp brings keys and values by TMA, 16-token pages straight into the rows of a
128-key tile, so that nothing is gathered first; two warpgroups of 64 rows compute. Each issues the next tile's scores before it
accumulates the last tile's values, so that its softmax runs under tensor-core work.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def _tile_position(i, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full, BLOCK_N: gl.constexpr):
    """(of the row's own keys or of its context, first key) of the i-th tile: the diagonal, then the context's partial end, then
    full tiles of own keys, then of the context. Own keys count from the chunk's start, the context's from its own."""
    own = (i < num_diagonal) | ((i >= num_masked) & (i < num_masked + num_own))
    diagonal_at = own_full + i * BLOCK_N
    own_at = own_begin + (i - num_masked) * BLOCK_N
    context_at = context_begin + (i - num_masked - num_own) * BLOCK_N
    at = gl.where(i < num_masked + num_own, own_at, context_at)
    at = gl.where(i < num_masked, context_full, at)
    at = gl.where(i < num_diagonal, diagonal_at, at)
    return own, at


@gluon.jit
def _producer(
    k_own, v_own, k_pages, v_pages, table_ptr, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    query_start, kv_head, context, num_tiles, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full,
    NUM_KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keeps STAGES tiles of keys and of values on their way."""
    PAGES: gl.constexpr = BLOCK_N // BLOCK_SIZE
    TILE_BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    last_page = (context - 1) // BLOCK_SIZE
    for i in range(num_tiles):
        own, at = _tile_position(
            i, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full, BLOCK_N
        )
        stage = i % STAGES
        phase = (i // STAGES + 1) & 1
        k_tile = k_tiles.index(stage)
        v_tile = v_tiles.index(stage)
        if own:
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            tma.async_copy_global_to_shared(k_own, [query_start + at, kv_head * HEAD_DIM], k_full.index(stage), k_tile)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), TILE_BYTES)
            tma.async_copy_global_to_shared(v_own, [query_start + at, kv_head * HEAD_DIM], v_full.index(stage), v_tile)
        else:
            # Past the context's end any page will do: its scores are masked and its values zeroed.
            offs_p = gl.arange(0, PAGES, gl.BlockedLayout([1], [32], [1], [0]))
            pages = gl.load(table_ptr + gl.minimum(at // BLOCK_SIZE + offs_p, last_page))
            rows = (pages * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            for p in gl.static_range(PAGES):
                row = gl.sum(gl.where(offs_p == p, rows, 0), 0)
                tma.async_copy_global_to_shared(k_pages, [row, 0], k_full.index(stage), k_tile.slice(p * BLOCK_SIZE, BLOCK_SIZE))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), TILE_BYTES)
            for p in gl.static_range(PAGES):
                row = gl.sum(gl.where(offs_p == p, rows, 0), 0)
                tma.async_copy_global_to_shared(v_pages, [row, 0], v_full.index(stage), v_tile.slice(p * BLOCK_SIZE, BLOCK_SIZE))


@gluon.jit
def _softmax(scores, peak, total, visible, scale, softcap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr):
    """Online softmax in base 2; returns weights, the factor for what was accumulated before, and the new peak and total."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (1.0 + gl.exp2(scores * scale)))
        scale = 1.0
    if MASKED:
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _mask(query, context, query_len, oldest, window, positions, MMA: gl.constexpr, BLOCK_N: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """(visible [rows, BLOCK_N], begin, end of the tile's keys that exist) of a tile at positions = (own, at). Context from
    before the oldest key that any query of the program sees counts as missing: its page may be gone."""
    own, at = positions
    shift = gl.where(own, 0, context)
    begin = gl.where(own, 0, oldest + context - at)
    end = gl.where(own, query_len, context) - at
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
    keys = at - shift + offs_n
    visible = (keys[None, :] <= query[:, None]) & (offs_n < end)[None, :]
    if HAS_WINDOW:
        visible = visible & (keys[None, :] > (query - window)[:, None])
    return visible, begin, end


@gluon.jit
def _zero_missing_values(v_tile, begin, end, BLOCK_N: gl.constexpr):
    """Zeroes all values but the tile's [begin, end): the others may be NaN, which a weight of zero would not silence."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    CHUNK: gl.constexpr = 16
    rows = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
    for at in gl.static_range(0, BLOCK_N, CHUNK):
        if (end < at + CHUNK) | (begin > at):
            part = v_tile.slice(at, CHUNK)
            values = part.load(LAYOUT)
            exists = (at + rows >= begin) & (at + rows < end)
            part.store(gl.where(exists[:, None], values, 0.0).to(values.dtype))
    fence_async_shared()


@gluon.jit
def _consumer(
    q_ptr, out_ptr, sinks_ptr, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn, next_turn,
    q_stride, out_stride, scale, softcap, window, query_start, query_len, first, first_head, context, oldest,
    num_tiles, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full,
    PART: gl.constexpr, PACKED: gl.constexpr, QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows 64 · PART to 64 · PART + 63 of the tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    load_m = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    load_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOAD))
    load_query = first + load_m // PACKED
    load_real = (load_query < query_len) & (load_m < QUERIES * PACKED)
    load_at = (query_start + load_query).to(gl.int64) * q_stride + (first_head + load_m % PACKED) * HEAD_DIM
    q = gl.load(q_ptr + load_at[:, None] + load_d[None, :], mask=load_real[:, None] & (load_d < HEAD_DIM)[None, :], other=0.0)
    q_tile.store(q)
    fence_async_shared()

    offs_m = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    query = first + offs_m // PACKED
    if sinks_ptr is not None:
        peak = gl.load(sinks_ptr + first_head + offs_m % PACKED).to(gl.float32) * 1.4426950408889634
        total = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, MMA))
    else:
        peak = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, MMA))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, MMA))
    zeros = gl.zeros([64, BLOCK_N], gl.float32, MMA)
    acc = gl.zeros([64, BLOCK_D], gl.float32, ACC)

    # Tile 0, always masked: its scores alone.
    positions = _tile_position(0, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full, BLOCK_N)
    visible, begin, end = _mask(query, context, query_len, oldest, window, positions, MMA, BLOCK_N, HAS_WINDOW)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute([1, 0]), zeros, use_acc=False)
    mbarrier.arrive(k_empty.index(0), count=1)
    weights, decay, peak, total = _softmax(scores, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
    p = gl.convert_layout(weights.to(dtype), WEIGHTS)
    if (end < BLOCK_N) | (begin > 0):
        mbarrier.wait(v_full.index(0), 0)
        _zero_missing_values(v_tiles.index(0), begin, end, BLOCK_N)

    end_masked = num_tiles if HAS_WINDOW else num_masked
    for i in range(1, end_masked):
        positions = _tile_position(i, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin, context_full, BLOCK_N)
        visible, begin, end = _mask(query, context, query_len, oldest, window, positions, MMA, BLOCK_N, HAS_WINDOW)
        acc, p, peak, total = _step(
            i, acc, p, peak, total, zeros, visible, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn, next_turn,
            scale, softcap, dtype, MMA, ACC, WEIGHTS, STAGES, True, HAS_SOFTCAP, TURNS,
        )  # fmt: skip
        if (end < BLOCK_N) | (begin > 0):
            mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
            _zero_missing_values(v_tiles.index(i % STAGES), begin, end, BLOCK_N)
    for i in range(end_masked, num_tiles):
        acc, p, peak, total = _step(
            i, acc, p, peak, total, zeros, None, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn, next_turn,
            scale, softcap, dtype, MMA, ACC, WEIGHTS, STAGES, False, HAS_SOFTCAP, TURNS,
        )  # fmt: skip

    last = num_tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc)

    total = gl.where(total > 0.0, total, 1.0)
    out = acc / gl.convert_layout(total, gl.SliceLayout(1, ACC))[:, None]
    out_m = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    out_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, ACC))
    out_query = first + out_m // PACKED
    out_real = (out_query < query_len) & (out_m < QUERIES * PACKED)
    out_at = (query_start + out_query).to(gl.int64) * out_stride + (first_head + out_m % PACKED) * HEAD_DIM
    gl.store(
        out_ptr + out_at[:, None] + out_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=out_real[:, None] & (out_d < HEAD_DIM)[None, :],
    )


@gluon.jit
def _step(
    i, acc, p, peak, total, zeros, visible, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn, next_turn,
    scale, softcap, dtype: gl.constexpr, MMA: gl.constexpr, ACC: gl.constexpr, WEIGHTS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, SOFTCAP: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Scores of tile i while the values of tile i - 1 are accumulated with its weights p."""
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turn, (i - 1) & 1)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(next_turn, count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, decay, peak, total = _softmax(scores, peak, total, visible, scale, softcap, MASKED, SOFTCAP)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
    return acc, gl.convert_layout(weights.to(dtype), WEIGHTS), peak, total


@gluon.jit(do_not_specialize=["window", "table_stride"])
def prefill_kernel(
    q_ptr, k_own, v_own, k_pages, v_pages, block_tables_ptr, row_slots_ptr, query_starts_ptr, context_lens_ptr, tiles_ptr, out_ptr,
    sinks_ptr, q_stride, out_stride, scale, softcap, window, table_stride,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, pack of its query heads), 128 rows: row m is query first + m // PACKED, head m % PACKED of the pack."""
    PACKS: gl.constexpr = GROUP // PACKED
    QUERIES: gl.constexpr = 128 // PACKED
    tile = gl.program_id(0) // (NUM_KV_HEADS * PACKS)
    kv_head = gl.program_id(0) // PACKS % NUM_KV_HEADS
    first_head = kv_head * GROUP + gl.program_id(0) % PACKS * PACKED
    row = gl.load(tiles_ptr + 2 * tile)
    first = gl.load(tiles_ptr + 2 * tile + 1)
    query_start = gl.load(query_starts_ptr + row)
    query_len = gl.load(query_starts_ptr + row + 1) - query_start
    context = gl.load(context_lens_ptr + row)
    table_ptr = block_tables_ptr + gl.load(row_slots_ptr + row).to(gl.int64) * table_stride

    # The tile's keys: context [-context, 0), then own [0, end); with a window they start at `oldest`.
    end = gl.minimum(first + QUERIES, query_len)
    oldest = -context
    if HAS_WINDOW:
        oldest = gl.maximum(oldest, first - window + 1)
    own_begin = gl.maximum(oldest, 0) // BLOCK_N * BLOCK_N
    own_full = (first + 1) // BLOCK_N * BLOCK_N
    own_full = gl.maximum(own_begin, own_full)
    context_begin = (gl.minimum(oldest, 0) + context) // BLOCK_N * BLOCK_N
    context_full = gl.maximum(context // BLOCK_N * BLOCK_N, context_begin)
    num_diagonal = (end - own_full + BLOCK_N - 1) // BLOCK_N
    num_masked = num_diagonal + gl.where(context > context_full, 1, 0)
    num_own = (own_full - own_begin) // BLOCK_N
    num_tiles = num_masked + num_own + (context_full - context_begin) // BLOCK_N

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    mbarrier.arrive(turns.index(0), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consumer, (
                q_ptr, out_ptr, sinks_ptr, q_tiles.index(0), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                turns.index(0), turns.index(1), q_stride, out_stride, scale, softcap, window, query_start, query_len, first,
                first_head, context, oldest, num_tiles, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin,
                context_full, 0, PACKED, QUERIES, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, HAS_WINDOW, HAS_SOFTCAP, TURNS,
            )),
            (_consumer, (
                q_ptr, out_ptr, sinks_ptr, q_tiles.index(1), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                turns.index(1), turns.index(0), q_stride, out_stride, scale, softcap, window, query_start, query_len, first,
                first_head, context, oldest, num_tiles, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin,
                context_full, 1, PACKED, QUERIES, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, HAS_WINDOW, HAS_SOFTCAP, TURNS,
            )),
            (_producer, (
                k_own, v_own, k_pages, v_pages, table_ptr, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                query_start, kv_head, context, num_tiles, num_diagonal, num_masked, num_own, own_begin, own_full, context_begin,
                context_full, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def prefill_attention_hopper(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    tiles_N2: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    packed: int,
    scale: float,
    softcap: float,
    window: int | None,
    sinks_H: torch.Tensor | None,
    block_n: int,
    num_stages: int,
    turns: bool = True,
) -> None:
    """Launches the kernel: tiles of 128 // packed queries, packed query heads of one key/value head each."""
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads, block_size = k_pages.shape[1:3]
    block_d = max(64, 1 << (head_dim - 1).bit_length())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def own(tensor: torch.Tensor) -> Any:
        shape = [tensor.shape[0], num_kv_heads * head_dim]
        return TensorDescriptor(tensor, shape, [tensor.stride(0), 1], [block_n, block_d], layout)

    def paged(pages: torch.Tensor) -> Any:
        return TensorDescriptor(pages, [pages.numel() // head_dim, head_dim], [head_dim, 1], [min(block_size, block_n), block_d], layout)

    prefill_kernel[(tiles_N2.shape[0] * (num_heads // packed),)](
        q_THD, own(k_TKD), own(v_TKD), paged(k_pages), paged(v_pages), block_tables_SP, row_slots_R, query_starts_R1, context_lens_R,
        tiles_N2, out_THD, sinks_H, q_THD.stride(0), out_THD.stride(0), scale, softcap, window or 0, block_tables_SP.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, PACKED=packed, BLOCK_SIZE=block_size, HEAD_DIM=head_dim,
        BLOCK_D=block_d, BLOCK_N=block_n, STAGES=num_stages, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap != 0.0, TURNS=turns,
        num_warps=4,
    )  # fmt: skip
