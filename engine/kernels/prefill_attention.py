"""Paged causal attention of prefill chunks: many query tokens of each row over its cached context and its own keys.

FlashAttention (arXiv 2205.14135, 2307.08691) over a ragged batch. A chunk's own keys and values lie contiguous in the step's
activations, so only the cached context needs pages. All query heads of one key/value head are packed into a tile's rows: a tile
is a few queries × G heads, which keeps the causal triangle's waste small and serves short chunks with the same kernel.

Two kernels. On Hopper, `prefill_attention_hopper` takes pages of the model's dtype straight into its tiles. The one here, plain
Triton, does the rest: other cards and FP8 pages. Given a workspace, it first gathers the context of every row with many queries
into contiguous scratch in the model's dtype, where a page is no longer looked up, nor converted, for every tile of queries;
rows that don't fit there, and short ones, read their pages.

Shapes: T tokens of the step, R prefill rows, H query heads, K key/value heads, G = H / K, D head size, S slots, P pages
a table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from engine.kernels.compiler import tl, triton
from engine.kernels.tiled_attention import tiled_attention

logger = logging.getLogger(__name__)

LOG2E = 1.4426950408889634
# A row with fewer queries than this reads its pages in place: a gather would cost it more than it saves.
GATHER_MIN_QUERIES = 64
# Programs of the gather, at least: enough to keep every SM reading.
GATHER_PROGRAMS = 1024

# What varies between steps. Views of a step's buffers may start anywhere, so that their alignment must not count either.
_VARYING = [
    "block_tables_ptr",
    "row_slots_ptr",
    "query_starts_ptr",
    "context_lens_ptr",
    "tiles_ptr",
    "table_stride",
    "window",
    "capacity",
]


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """block_m rows (queries × packed heads) against block_n keys at a time. hopper: take the Hopper kernel where that can be
    used; its tiles have the same block_m."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    hopper: bool = False


@dataclass(slots=True)
class PrefillWorkspace:
    """Scratch for gathered contexts, made once and shared by all layers: k and v, [K, C, D] for C tokens, in the dtype of q."""

    k_scratch_KCD: torch.Tensor
    v_scratch_KCD: torch.Tensor

    @property
    def capacity(self) -> int:
        """Tokens of context it holds."""
        return self.k_scratch_KCD.shape[1]

    @classmethod
    def allocate(cls, num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: Any) -> PrefillWorkspace:
        shape = (num_kv_heads, num_tokens, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def prefill_tiles(head_dim: int, element_bytes: int, shared_memory_bytes: int, capability: tuple[int, int]) -> PrefillTiles:
    """The tile for a card: the first of a descending list whose queries, key and value stages fit its shared memory.

    shared_memory_bytes: what one program may use (99 KiB on sm_86/89, 163 on sm_80, 227 on sm_90 and up).
    """
    block_d = padded_head_dim(head_dim)
    if block_d >= 256:
        candidates = [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 4, 1)]
    else:
        candidates = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)]
    for block_m, block_n, num_warps, num_stages in candidates:
        if tile_shared_bytes(block_d, element_bytes, block_m, block_n, num_stages) <= shared_memory_bytes:
            hopper = capability[0] == 9 and element_bytes == 2 and block_m == 128 and 64 <= block_d <= 256
            return PrefillTiles(block_m, block_n, num_warps, num_stages, hopper)
    raise ValueError(f"no attention tile for head size {head_dim} fits {shared_memory_bytes} bytes of shared memory")


def tile_shared_bytes(block_d: int, element_bytes: int, block_m: int, block_n: int, num_stages: int) -> int:
    """Shared memory of a tile: its queries, num_stages of keys and values, and 1 KiB for barriers and reductions."""
    return (block_m + 2 * num_stages * block_n) * block_d * element_bytes + 1024


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head is padded to in a tile."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache
def _device_tiles(head_dim: int, element_bytes: int, device_index: int) -> PrefillTiles:
    properties: Any = torch.cuda.get_device_properties(
        device_index
    )  # its stub lacks the shared memory that kernels may opt in to
    capability = (properties.major, properties.minor)
    return prefill_tiles(head_dim, element_bytes, properties.shared_memory_per_block_optin, capability)


def choose_tiles(head_dim: int, dtype: torch.dtype, device: torch.device) -> PrefillTiles:
    """The tile that `paged_prefill_attention` uses by itself on this device; small ones where there is only the interpreter."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _device_tiles(head_dim, dtype.itemsize, index)
    return PrefillTiles(block_m=16, block_n=16, num_warps=4, num_stages=1)


def packed_heads(group_size: int) -> int:
    """Query heads of one key/value head that share a tile: the largest power of two, up to 16, that divides the group."""
    return min(16, group_size & -group_size)


def queries_per_tile(head_dim: int, group_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """What to give `plan_prefill` as block_m for this device and model."""
    block_m = choose_tiles(head_dim, dtype, device).block_m
    return block_m // packed_heads(group_size)


def plan_prefill(query_lens: list[int], context_lens: list[int], block_m: int, window: int | None = None) -> np.ndarray:
    """Tiles of block_m queries, [N, 2] int32 of (row, first query of the tile in its row), the ones with most keys first.

    Longest first (LPT): programs start in this order, so the long tiles do not end alone. window: of the layers to be run.
    """
    queries = np.asarray(query_lens, dtype=np.int64)
    counts = (queries + block_m - 1) // block_m
    rows = np.repeat(np.arange(len(queries)), counts)
    first = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * block_m
    ends = np.minimum(first + block_m, queries[rows])
    work = np.asarray(context_lens, dtype=np.int64)[rows] + ends
    if window is not None:
        work = np.minimum(work, window + block_m)
    order = np.argsort(-work, kind="stable")
    return np.stack([rows[order], first[order]], axis=1).astype(np.int32)


@triton.jit
def _gathered_start(
    context_lens_ptr,
    query_starts_ptr,
    row,
    window,
    capacity,
    HAS_WINDOW: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(first scratch token of the row's context, context position it stands for, gathered or not). Rows with at least
    MIN_QUERIES queries take scratch in row order, in whole multiples of ALIGN tokens, until its capacity is spent."""
    start = 0
    for base in range(0, row, 128):
        rows = base + tl.arange(0, 128)
        before = rows < row
        context = tl.load(context_lens_ptr + rows, mask=before, other=0)
        queries = tl.load(query_starts_ptr + rows + 1, mask=before, other=0)
        queries -= tl.load(query_starts_ptr + rows, mask=before, other=0)
        if HAS_WINDOW:
            context -= tl.maximum(context - window + 1, 0) // ALIGN * ALIGN
        start += tl.sum(tl.where(queries >= MIN_QUERIES, (context + ALIGN - 1) // ALIGN * ALIGN, 0), 0)
    context = tl.load(context_lens_ptr + row)
    queries = tl.load(query_starts_ptr + row + 1) - tl.load(query_starts_ptr + row)
    position = 0
    if HAS_WINDOW:
        position = tl.maximum(context - window + 1, 0) // ALIGN * ALIGN
    length = (context - position + ALIGN - 1) // ALIGN * ALIGN
    return start, position, (queries >= MIN_QUERIES) & (start + length <= capacity)


@triton.jit(do_not_specialize=_VARYING)
def _gather_context_kernel(
    k_scratch_ptr,
    v_scratch_ptr,
    k_pages_ptr,
    v_pages_ptr,
    block_tables_ptr,
    row_slots_ptr,
    query_starts_ptr,
    context_lens_ptr,
    k_scale_ptr,
    v_scale_ptr,
    window,
    table_stride,
    capacity,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
):
    """Program (part, row × head) copies its share of the row's context, BLOCK_N tokens at a time. Zeros stand
    for what no query sees: behind the context's end and before the window."""
    row = tl.program_id(1) // NUM_KV_HEADS
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    start, position, gathered = _gathered_start(
        context_lens_ptr, query_starts_ptr, row, window, capacity, HAS_WINDOW, MIN_QUERIES, BLOCK_N
    )
    context = tl.load(context_lens_ptr + row)
    length = tl.where(gathered, context - position, 0)
    table_ptr = block_tables_ptr + tl.load(row_slots_ptr + row).to(tl.int64) * table_stride
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside_d = offs_d < HEAD_DIM
    for done in range(tl.program_id(0) * BLOCK_N, length, tl.num_programs(0) * BLOCK_N):
        positions = position + done + offs_n
        seen = positions < context
        if HAS_WINDOW:
            seen = seen & (positions > context - window)
        pages = tl.load(table_ptr + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        source = (pages * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
        mask = seen[:, None] & inside_d[None, :]
        k = tl.load(k_pages_ptr + source[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_pages_ptr + source[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        if k_scale_ptr is not None:
            k = k.to(tl.float32) * tl.load(k_scale_ptr)
            v = v.to(tl.float32) * tl.load(v_scale_ptr)
        target = (kv_head * capacity.to(tl.int64) + start + done + offs_n)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(k_scratch_ptr + target, k.to(k_scratch_ptr.dtype.element_ty), mask=inside_d[None, :])
        tl.store(v_scratch_ptr + target, v.to(v_scratch_ptr.dtype.element_ty), mask=inside_d[None, :])


@triton.jit
def _load_keys(
    source, row, stride, offs_n, offs_d, limit, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LIMITED: tl.constexpr
):
    """[BLOCK_N, BLOCK_D] of a token-major matrix from token `row` on; zeros past the head, and past limit if LIMITED."""
    pointers = source + row.to(tl.int64) * stride + offs_n[:, None] * stride + offs_d[None, :]
    if LIMITED:
        tile = tl.load(pointers, mask=(row + offs_n < limit)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _attend(q, k, v, acc, peak, total, visible, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """An online-softmax step in base 2; peak and total are each row's running maximum and sum. scale turns scores into log2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        # softcap is in log2 units here; tanh(x) = 1 - 2 / (1 + e^2x) keeps its sign and limits for any x.
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * scale)))
        scale = 1.0
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=_VARYING)
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scratch_ptr,
    v_scratch_ptr,
    k_pages_ptr,
    v_pages_ptr,
    block_tables_ptr,
    row_slots_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tiles_ptr,
    out_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    scale,
    softcap,
    window,
    table_stride,
    capacity,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCRATCH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
):
    """Program (tile, kv head, pack of its query heads): heads change fastest, so that programs side by side share keys in L2.

    Row m of the tile is query first + m // PACKED, head m % PACKED of the pack. Key positions count from the chunk's start:
    the context is negative.
    """
    PACKS: tl.constexpr = GROUP // PACKED
    QUERIES: tl.constexpr = BLOCK_M // PACKED
    tile = tl.program_id(0) // (NUM_KV_HEADS * PACKS)
    kv_head = tl.program_id(0) // PACKS % NUM_KV_HEADS
    first_head = kv_head * GROUP + tl.program_id(0) % PACKS * PACKED
    row = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    query_start = tl.load(query_starts_ptr + row)
    query_len = tl.load(query_starts_ptr + row + 1) - query_start
    context = tl.load(context_lens_ptr + row)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside_d = offs_d < HEAD_DIM
    query = first + offs_m // PACKED
    heads = first_head + offs_m % PACKED
    real = (query < query_len) & (offs_m < QUERIES * PACKED)
    tokens = (query_start + query).to(tl.int64)
    real_d = real[:, None] & inside_d[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + heads[:, None] * HEAD_DIM + offs_d[None, :], mask=real_d, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if sinks_ptr is not None:
        peak = tl.load(sinks_ptr + heads).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

    # The tile's keys: context [-context, 0), then own [0, end). With a window they start at `oldest` and every step is masked.
    end = tl.minimum(first + QUERIES, query_len)
    oldest = -context
    if HAS_WINDOW:
        oldest = tl.maximum(oldest, first - window + 1)

    context_begin = (tl.minimum(oldest, 0) + context) // BLOCK_N * BLOCK_N
    pages_end = context
    if SCRATCH:
        scratch_start, position, gathered = _gathered_start(
            context_lens_ptr, query_starts_ptr, row, window, capacity, HAS_WINDOW, MIN_QUERIES, BLOCK_N
        )
        scratch_row = kv_head * capacity.to(tl.int64) + scratch_start - position
        scratch_end = tl.where(gathered, context, 0)
        pages_end = tl.where(gathered, 0, context)
        scratch_full = scratch_end // BLOCK_N * BLOCK_N
        for at in tl.range(context_begin, scratch_full, BLOCK_N):
            k = _load_keys(k_scratch_ptr, scratch_row + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
            v = _load_keys(v_scratch_ptr, scratch_row + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
            if HAS_WINDOW:
                visible = (at - context + offs_n)[None, :] > (query - window)[:, None]
                acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
            else:
                acc, peak, total = _attend(q, k, v, acc, peak, total, None, scale, softcap, False, HAS_SOFTCAP)
        # The context's end: the gather left zeros behind it.
        for at in tl.range(tl.maximum(context_begin, scratch_full), scratch_end, BLOCK_N, num_stages=1):
            k = _load_keys(k_scratch_ptr, scratch_row + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
            v = _load_keys(v_scratch_ptr, scratch_row + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
            visible = (at + offs_n < context)[None, :]
            if HAS_WINDOW:
                visible = visible & ((at - context + offs_n)[None, :] > (query - window)[:, None])
            acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)

    table_ptr = block_tables_ptr + tl.load(row_slots_ptr + row).to(tl.int64) * table_stride
    for at in tl.range(context_begin, pages_end, BLOCK_N):
        seen = at + offs_n < context
        if HAS_WINDOW:
            seen = seen & (at + offs_n >= oldest + context)
        pages = tl.load(table_ptr + (at + offs_n) // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        source = ((pages * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + (at + offs_n) % BLOCK_SIZE) * HEAD_DIM
        mask = seen[:, None] & inside_d[None, :]
        k = tl.load(k_pages_ptr + source[:, None] + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_pages_ptr + source[:, None] + offs_d[None, :], mask=mask, other=0.0)
        if k_scale_ptr is not None:
            k = (k.to(tl.float32) * tl.load(k_scale_ptr)).to(q.dtype)
            v = (v.to(tl.float32) * tl.load(v_scale_ptr)).to(q.dtype)
        visible = seen[None, :]
        if HAS_WINDOW:
            visible = visible & ((at - context + offs_n)[None, :] > (query - window)[:, None])
        acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)

    own_begin = tl.maximum(oldest, 0) // BLOCK_N * BLOCK_N
    own_full = (first + 1) // BLOCK_N * BLOCK_N
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    for at in tl.range(own_begin, own_full, BLOCK_N):
        k = _load_keys(k_ptr, query_start + at, k_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        v = _load_keys(v_ptr, query_start + at, v_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        if HAS_WINDOW:
            visible = (at + offs_n)[None, :] > (query - window)[:, None]
            acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
        else:
            acc, peak, total = _attend(q, k, v, acc, peak, total, None, scale, softcap, False, HAS_SOFTCAP)
    # The diagonal. In its last tile the keys may end inside the tile: what follows belongs to another row and is not read.
    diagonal_begin = tl.maximum(own_begin, own_full)
    diagonal_full = tl.minimum(query_len // BLOCK_N * BLOCK_N, end)
    for at in tl.range(diagonal_begin, diagonal_full, BLOCK_N, num_stages=1):
        k = _load_keys(k_ptr, query_start + at, k_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        v = _load_keys(v_ptr, query_start + at, v_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        visible = (at + offs_n)[None, :] <= query[:, None]
        if HAS_WINDOW:
            visible = visible & ((at + offs_n)[None, :] > (query - window)[:, None])
        acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
    for at in tl.range(tl.maximum(diagonal_begin, query_len // BLOCK_N * BLOCK_N), end, BLOCK_N, num_stages=1):
        k = _load_keys(k_ptr, query_start + at, k_stride, offs_n, offs_d, query_start + query_len, HEAD_DIM, BLOCK_D, True)
        v = _load_keys(v_ptr, query_start + at, v_stride, offs_n, offs_d, query_start + query_len, HEAD_DIM, BLOCK_D, True)
        visible = ((at + offs_n)[None, :] <= query[:, None]) & (at + offs_n < query_len)[None, :]
        if HAS_WINDOW:
            visible = visible & ((at + offs_n)[None, :] > (query - window)[:, None])
        acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out_ptr + tokens[:, None] * out_stride + heads[:, None] * HEAD_DIM + offs_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real_d,
    )


def paged_prefill_attention(
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
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: PrefillWorkspace | None = None,
    tiles: PrefillTiles | None = None,
    max_programs: int | None = None,
) -> torch.Tensor:
    """Attention of R chunks; writes their tokens' rows of out_THD and returns it.

    q, k, v: the step's activations, heads contiguous in a token (strided views of a merged projection are fine); the chunk's
    own keys are read from them, the context_lens_R earlier ones from pages [blocks + 1, K, block_size, D] (dtype of q, or
    float8_e4m3fn with k_scale, v_scale [1]). query_starts_R1: first token of each row in q, k, v and out. tiles_N2: from
    `plan_prefill` with `queries_per_tile` queries, on the device. window: a query sees itself and window - 1 before it.
    sinks_H: a logit per head that joins the denominator. workspace: scratch for contexts, where `wants_workspace` says so and
    a row has a context (it costs a launch even when none has). max_programs: how many multiprocessors the Hopper kernel may
    take; what it leaves, another stream's kernel gets.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_TKD.shape[1]
    if tiles_N2.shape[0] == 0:
        return out_THD
    if tiles is None:
        tiles = choose_tiles(head_dim, q_THD.dtype, q_THD.device)
    packed = packed_heads(num_heads // num_kv_heads)
    scale, cap = scaling * LOG2E, 0.0
    if softcap is not None:
        scale, cap = 2.0 * LOG2E * scaling / softcap, softcap * LOG2E
    if tiles.hopper and k_scale is None and reads_pages_in_place(head_dim, q_THD.dtype, k_pages.dtype, k_pages.shape[2]):
        from engine.kernels.prefill_attention_hopper import prefill_attention_hopper

        if prefill_attention_hopper(
            q_THD, k_TKD, v_TKD, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1, context_lens_R, tiles_N2,
            out_THD, sinks_H, packed, scale, cap, window, max_programs,
        ):  # fmt: skip
            return out_THD

    for name, tensor in (("q", q_THD), ("k", k_TKD), ("v", v_TKD), ("out", out_THD)):
        if tensor.stride(2) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != head_dim):
            raise ValueError(f"{name}'s heads must lie contiguous in a token: strides {tensor.stride()}")
    k_scratch, v_scratch, capacity = None, None, 0
    if workspace is not None:
        _gather_context(
            workspace, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1, context_lens_R,
            window=window, k_scale=k_scale, v_scale=v_scale, block_n=tiles.block_n,
        )  # fmt: skip
        k_scratch, v_scratch, capacity = workspace.k_scratch_KCD, workspace.v_scratch_KCD, workspace.capacity
    _prefill_kernel[(tiles_N2.shape[0] * (num_heads // packed),)](
        q_THD, k_TKD, v_TKD, k_scratch, v_scratch, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1,
        context_lens_R, tiles_N2, out_THD, sinks_H, k_scale, v_scale, q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0),
        out_THD.stride(0), scale, cap, window or 0, block_tables_SP.stride(0), capacity,
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, PACKED=packed, BLOCK_SIZE=k_pages.shape[2],
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        SCRATCH=workspace is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        MIN_QUERIES=GATHER_MIN_QUERIES,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out_THD


def reads_pages_in_place(head_dim: int, dtype: torch.dtype, page_dtype: torch.dtype, block_size: int) -> bool:
    """Whether the Hopper kernel can take such pages: TMA copies them as they are, in boxes of at least 8 rows of 16 bytes."""
    return page_dtype == dtype and block_size >= 8 and head_dim % 8 == 0


def wants_workspace(head_dim: int, dtype: torch.dtype, page_dtype: torch.dtype, block_size: int, device: torch.device) -> bool:
    """Whether a workspace makes contexts faster here: where the pages must be read by pointers."""
    return not (choose_tiles(head_dim, dtype, device).hopper and reads_pages_in_place(head_dim, dtype, page_dtype, block_size))


def _gather_context(
    workspace: PrefillWorkspace,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    *,
    window: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_n: int,
) -> None:
    """Copies the contexts that fit into the workspace, zeros behind each up to a whole tile of block_n keys."""
    num_rows, num_kv_heads, block_size, head_dim = context_lens_R.shape[0], *k_pages.shape[1:]
    longest = block_tables_SP.shape[1] * block_size  # more parts than that has tiles would start with nothing to copy
    parts = max(1, min(GATHER_PROGRAMS // (num_rows * num_kv_heads), triton.cdiv(longest, block_n)))
    _gather_context_kernel[(parts, num_rows * num_kv_heads)](
        workspace.k_scratch_KCD, workspace.v_scratch_KCD, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1,
        context_lens_R, k_scale, v_scale, window or 0, block_tables_SP.stride(0), workspace.capacity,
        NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_N=block_n,
        HAS_WINDOW=window is not None, MIN_QUERIES=GATHER_MIN_QUERIES, num_warps=4,
    )  # fmt: skip


def prefill_attention_reference(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_prefill_attention` in plain torch, row by row: each row's pages gathered, then `tiled_attention` in float32."""
    block_size = k_pages.shape[2]
    starts = query_starts_R1.tolist()
    for row, context in enumerate(context_lens_R.tolist()):
        own = slice(starts[row], starts[row + 1])
        positions = torch.arange(context, device=q_THD.device)
        pages = block_tables_SP[row_slots_R[row].long(), positions // block_size].long()
        keys, values = k_pages[pages, :, positions % block_size].float(), v_pages[pages, :, positions % block_size].float()
        if k_scale is not None and v_scale is not None:
            keys, values = (keys * k_scale).to(q_THD.dtype).float(), (values * v_scale).to(q_THD.dtype).float()
        out_THD[own] = tiled_attention(
            q_THD[own].float(),
            torch.cat([keys, k_TKD[own].float()]),
            torch.cat([values, v_TKD[own].float()]),
            scaling=scaling,
            window=window,
            softcap=softcap,
            sinks_H=sinks_H,
        ).to(out_THD.dtype)
    return out_THD
