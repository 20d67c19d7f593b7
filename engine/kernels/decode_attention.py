"""Paged decode attention: one new token a row over its pages, with the keys of a row split among programs.

Flash-decoding (Dao et al., 2023) over pages, in one launch a layer:

- `plan_decode`, once a step and KV group, cuts the rows' keys into items of nearly equal size: as many as keep the card
  busy, and no more. It runs on the device, so that a captured graph serves any lengths; the grid depends on B alone.
- `paged_decode_attention` gives an item and a key/value head to a program, which takes all query heads of that head at
  once (grouped-query attention: each key is read once). A row in one item is written out at once; a row in several leaves
  float32 partials, and the program that comes last adds them up.

Names: B rows (padding rows have length 0), H query heads, K key/value heads, G = H / K, D head size, S slots, P pages a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engine.kernels.compiler import is_compiled, tl, triton
from engine.kernels.tiled_attention import tiled_attention

logger = logging.getLogger(__name__)

NO_WINDOW = 2**31 - 1
# int32 a work item: row, slot, first visible key, first key, end key, number of the row's items, its first item, unused
ITEM_FIELDS = 8
MAX_HEADS_PER_PROGRAM = 32
KEYS_PER_WARP = 16  # what the matrix units take at least; one page of the usual size
PLAN_ITEMS_PER_PROGRAM = 32


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a program works: keys_per_warp of num_warps in a tile; num_stages of the load pipeline (num_stages - 1 tiles are
    under way while one is computed); items_per_sm: as many items as keep a multiprocessor busy."""

    keys_per_warp: int
    num_warps: int
    num_stages: int
    items_per_sm: int

    @property
    def block_n(self) -> int:
        """Keys a tile."""
        return self.keys_per_warp * self.num_warps


def decode_tiles(head_dim: int, element_bytes: int, shared_memory_bytes: int) -> DecodeTiles:
    """Tiles for keys of head_dim elements on a card with that much shared memory a program.

    Two programs share a multiprocessor, and each wants two tiles of keys and values on their way while it computes a third.
    """
    budget = shared_memory_bytes // 2 - 4096
    for num_warps in (4, 2, 1):
        tile_bytes = 2 * KEYS_PER_WARP * num_warps * _power_of_two(head_dim) * element_bytes
        num_stages = min(budget // tile_bytes + 1, 4)
        if num_stages >= 3:
            break
    return DecodeTiles(KEYS_PER_WARP, num_warps, num_stages, 1)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n and, as the matrix units want it, 16."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass(slots=True)
class DecodeWorkspace:
    """Everything the kernels need beside their arguments, for one KV group on one stream; launches that may overlap need one
    each. `make` allocates it once. I items at most.

    items [I, ITEM_FIELDS] int32, the plan; partials [I, H, D] float32, sums of values not yet divided; stats [I, H, 2]
    float32, each sum's maximal score (base 2) and weight; counters [B, programs a row] int32, zero between launches.
    """

    tiles: DecodeTiles
    max_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    head_blocks: int
    extra_items: int
    items: torch.Tensor
    partials: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @staticmethod
    def make(
        max_rows: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        num_kv_heads: int,
        block_size: int = 16,
        element_bytes: int = 2,
        tiles: DecodeTiles | None = None,
        multiprocessors: int | None = None,
    ) -> DecodeWorkspace:
        """element_bytes: of a stored key. tiles and multiprocessors: the card's own unless given (as a CPU must)."""
        device = torch.device(device)
        if tiles is None or multiprocessors is None:
            card: Any = torch.cuda.get_device_properties(device)
            tiles = tiles or decode_tiles(head_dim, element_bytes, card.shared_memory_per_block_optin)
            multiprocessors = multiprocessors or card.multi_processor_count
        group = num_heads // num_kv_heads
        head_blocks = -(-group // MAX_HEADS_PER_PROGRAM)
        extra_items = max(1, multiprocessors * tiles.items_per_sm // (num_kv_heads * head_blocks))
        num_items = max_rows + extra_items
        return DecodeWorkspace(
            tiles=tiles,
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            head_blocks=head_blocks,
            extra_items=extra_items,
            items=torch.zeros(num_items, ITEM_FIELDS, dtype=torch.int32, device=device),
            partials=torch.empty(num_items, num_heads, head_dim, dtype=torch.float32, device=device),
            stats=torch.empty(num_items, num_heads, 2, dtype=torch.float32, device=device),
            counters=torch.zeros(max_rows, num_kv_heads * head_blocks, dtype=torch.int32, device=device),
        )


def plan_decode(
    workspace: DecodeWorkspace, row_slots_B: torch.Tensor, seq_lens_B: torch.Tensor, *, window: int | None = None
) -> None:
    """Cut the step's rows into items; all layers of the KV group then share the plan. Lengths count the current token."""
    num_rows = seq_lens_B.shape[0]
    assert num_rows <= workspace.max_rows
    num_items = num_rows + workspace.extra_items
    _plan_kernel[(triton.cdiv(num_items, PLAN_ITEMS_PER_PROGRAM),)](
        seq_lens_B,
        row_slots_B,
        workspace.items,
        num_rows,
        num_items,
        workspace.extra_items,
        NO_WINDOW if window is None else window,
        ROWS=_power_of_two(workspace.max_rows),
        ITEMS=PLAN_ITEMS_PER_PROGRAM,
        FIELDS=ITEM_FIELDS,
        BLOCK_N=workspace.tiles.block_n,
        ALIGN=min(workspace.tiles.block_n, workspace.block_size),
        num_warps=4,
    )


def paged_decode_attention(
    q_BHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
    out_BHD: torch.Tensor,
    *,
    workspace: DecodeWorkspace,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token a row over the row's pages, as `plan_decode` cut them for the same slots, lengths and window
    (the kernel takes these from the plan; the arguments are checked for their shape).

    q [B, H, D] and out [B, H, D], last dimension contiguous; pages [N, K, block_size, D], contiguous, in q's dtype or
    float8_e4m3fn with scales [1] float32 (value = stored * scale); tables [S, P] int32, indexed by slot; sinks [H] float32,
    logits that take probability and give no value. A row of length 0 gives zeros.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads, block_size = k_pages.shape[1:3]
    assert (num_heads, num_kv_heads, head_dim, block_size) == (
        workspace.num_heads,
        workspace.num_kv_heads,
        workspace.head_dim,
        workspace.block_size,
    ), "the workspace was made for other pages"
    assert seq_lens_B.shape == row_slots_B.shape == (num_rows,)
    assert q_BHD.stride(2) == out_BHD.stride(2) == 1 and k_pages.is_contiguous() and v_pages.is_contiguous()
    group = num_heads // num_kv_heads
    split_heads = min(MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(group))
    decode_fp8 = k_pages.dtype == torch.float8_e4m3fn and not _has_native_fp8(k_pages.device)
    if decode_fp8:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    while True:
        tiles = workspace.tiles
        grid = (num_kv_heads * workspace.head_blocks, num_rows + workspace.extra_items, 1)
        arguments = (
            q_BHD, k_pages, v_pages, block_tables_SP, workspace.items, out_BHD, workspace.partials, workspace.stats,
            workspace.counters, sinks_H, k_scale, v_scale, *q_BHD.stride()[:2], *out_BHD.stride()[:2],
            block_tables_SP.stride(0), scaling, 0.0 if softcap is None else softcap,
            num_heads, group, workspace.head_blocks, head_dim, _power_of_two(head_dim), max(16, split_heads),
            tiles.num_warps.bit_length() - 1, tiles.keys_per_warp, block_size, ITEM_FIELDS, tiles.num_stages,
            max(1, min(16, 2048 * tiles.num_warps // (split_heads * _power_of_two(head_dim)))), split_heads,
            softcap is not None, decode_fp8,
        )  # fmt: skip
        # All that the compiled form depends on and that may differ between calls with one workspace.
        key = (
            q_BHD.dtype, out_BHD.dtype, k_pages.dtype, tiles, *arguments[12:17], scaling, softcap is None, k_scale is None,
            None if sinks_H is None else sinks_H.dtype, q_BHD.data_ptr() % 16, out_BHD.data_ptr() % 16,
        )  # fmt: skip
        compiled = workspace.compiled.get(key)
        if compiled is not None:  # launching through the compiler's own front door takes the host four times as long
            compiled[grid](*arguments)
            return out_BHD
        try:
            launched = _decode_kernel[grid](*arguments, num_warps=tiles.num_warps)
            if is_compiled(launched):
                workspace.compiled[key] = launched
            return out_BHD
        except triton.runtime.errors.OutOfResources as error:
            if tiles.num_stages == 1:
                raise
            workspace.tiles = replace(tiles, num_stages=tiles.num_stages - 1)
            logger.warning("decode attention: %s; now %d pipeline stages", error, tiles.num_stages - 1)


def decode_attention_reference(
    q_BHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, row by row: each row's pages gathered, then `tiled_attention`; returns float32 [B, H, D]."""
    block_size = k_pages.shape[2]
    out_BHD = torch.zeros(q_BHD.shape, dtype=torch.float32, device=q_BHD.device)
    for row, (slot, end) in enumerate(zip(row_slots_B.tolist(), seq_lens_B.tolist(), strict=True)):
        if end == 0:
            continue
        begin = 0 if window is None else max(0, end - window)
        positions_N = torch.arange(begin, end, device=q_BHD.device)
        pages_N = block_tables_SP[slot, positions_N // block_size].long()
        k_NKD, v_NKD = (pages[pages_N, :, positions_N % block_size].float() for pages in (k_pages, v_pages))
        if k_scale is not None:
            k_NKD = k_NKD * k_scale
        if v_scale is not None:
            v_NKD = v_NKD * v_scale
        q_1HD = q_BHD[row : row + 1].float()
        out_BHD[row] = tiled_attention(q_1HD, k_NKD, v_NKD, scaling=scaling, softcap=softcap, sinks_H=sinks_H, tile=1024)[0]
    return out_BHD


def _has_native_fp8(device: torch.device) -> bool:
    """Whether the card converts e4m3 itself (Ada and Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit(do_not_specialize=["num_rows", "num_items", "extra_items", "window"])
def _plan_kernel(
    seq_lens_ptr,
    row_slots_ptr,
    items_ptr,
    num_rows,
    num_items,
    extra_items,
    window,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Every program looks at all rows and writes ITEMS items. A row of t tiles gets max(1, ceil(t / c)) items, where c tiles
    an item are as few as leave at most num_rows + extra_items items (sum ceil(t / c) <= sum t / c + num_rows)."""
    rows = tl.arange(0, ROWS)
    lengths = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0)
    origins = tl.maximum(lengths - window, 0) // ALIGN * ALIGN
    tiles = (lengths - origins + BLOCK_N - 1) // BLOCK_N
    tiles_per_item = tl.maximum((tl.sum(tiles) + extra_items - 1) // extra_items, 1)
    splits = tl.where(rows < num_rows, tl.maximum((tiles + tiles_per_item - 1) // tiles_per_item, 1), 0)
    ends = tl.cumsum(splits)

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    passed = (ends[None, :] <= item[:, None]) & (rows < num_rows)[None, :]
    row = tl.sum(passed.to(tl.int32), axis=1)
    first_item = tl.max(tl.where(passed, ends[None, :], 0), axis=1)
    used = row < num_rows

    length = tl.load(seq_lens_ptr + row, mask=used, other=0)
    slot = tl.load(row_slots_ptr + row, mask=used, other=0)
    visible = tl.maximum(length - window, 0)
    origin = visible // ALIGN * ALIGN
    row_tiles = (length - origin + BLOCK_N - 1) // BLOCK_N
    row_splits = tl.where(used, tl.maximum((row_tiles + tiles_per_item - 1) // tiles_per_item, 1), 0)
    split = item - first_item
    divisor = tl.maximum(row_splits, 1)
    begin = origin + split * row_tiles // divisor * BLOCK_N
    end = tl.minimum(origin + (split + 1) * row_tiles // divisor * BLOCK_N, length)

    out = items_ptr + item * FIELDS
    wanted = item < num_items
    tl.store(out, row, mask=wanted)
    tl.store(out + 1, slot, mask=wanted)
    tl.store(out + 2, visible, mask=wanted)
    tl.store(out + 3, begin, mask=wanted)
    tl.store(out + 4, end, mask=wanted)
    tl.store(out + 5, row_splits, mask=wanted)
    tl.store(out + 6, first_item, mask=wanted)


@triton.jit
def _float16_of_e4m3(bits):
    """A 256th of the value of e4m3 bits, exactly: the exponent moves to float16's place, where the bias is larger by 8."""
    bits = bits.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _first_half(x):
    """[M] -> its first M / 2."""
    first, _ = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2]), (1, 0)))
    return first


@triton.jit
def _first_half_of_rows(x):
    """[W, M, D] -> [W, M / 2, D]."""
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, x.shape[2]])
    first, _ = tl.split(tl.permute(x, (0, 2, 3, 1)))
    return first


@triton.jit
def _sum_of_halves(x):
    """[W, M, D] -> [W / 2, M, D], as a split: Triton's reduction across warps would pass shared memory element by element."""
    x = tl.reshape(x, [2, x.shape[0] // 2, x.shape[1], x.shape[2]])
    first, second = tl.split(tl.permute(x, (1, 2, 3, 0)))
    return first + second


@triton.jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    items_ptr,
    out_ptr,
    partials_ptr,
    stats_ptr,
    counters_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_stride_b,
    q_stride_h,
    out_stride_b,
    out_stride_h,
    table_stride,
    scaling,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOG2_WARPS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_HEADS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DECODE_FP8: tl.constexpr,
):
    """One item of one key/value head. Heads run fastest over the grid, so that the heads of a page are read together.

    Each warp has its own keys of a tile, sums and maxima ([WARPS, ...], a batched product): the warps meet once, at the
    end of the item.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    LOWEST: tl.constexpr = -1.0e30  # below any score, and finite: the difference of two is no NaN
    PAGE: tl.constexpr = HEADS // GROUP * BLOCK_SIZE * D
    WARPS: tl.constexpr = 1 << LOG2_WARPS
    BLOCK_N: tl.constexpr = WARPS * KEYS
    # The matrix units take 16 rows; groups of at most 8 heads leave the other half at once.
    HALF: tl.constexpr = BLOCK_M == 16 and SPLIT_HEADS <= 8
    ROWS: tl.constexpr = 8 if HALF else BLOCK_M
    item = tl.program_id(1)
    item_ptr = items_ptr + item * FIELDS
    splits = tl.load(item_ptr + 5)
    row = tl.load(item_ptr)
    slot = tl.load(item_ptr + 1)
    visible = tl.load(item_ptr + 2)
    begin = tl.load(item_ptr + 3)
    end = tl.load(item_ptr + 4)
    first_item = tl.load(item_ptr + 6)
    if splits == 0:
        return

    table_ptr += slot.to(tl.int64) * table_stride
    lanes = (tl.arange(0, WARPS) * KEYS)[:, None] + tl.arange(0, KEYS)[None, :]
    # A warp's keys lie in one page, or a page's id is asked for by each of its keys.
    if KEYS <= BLOCK_SIZE:
        page_keys = begin + (tl.arange(0, WARPS) * KEYS)[:, None]
    else:
        page_keys = begin + lanes
    pages = tl.load(table_ptr + page_keys // BLOCK_SIZE, mask=page_keys < end, other=0)

    kv_head = tl.program_id(0) // GROUP_BLOCKS
    group_start = tl.program_id(0) % GROUP_BLOCKS * BLOCK_M
    d = tl.arange(0, D_PAD)
    heads = group_start + tl.arange(0, BLOCK_M)
    head_mask = heads < GROUP
    heads = kv_head * GROUP + heads
    row64 = row.to(tl.int64)
    q = tl.load(
        q_ptr + row64 * q_stride_b + heads[:, None] * q_stride_h + d[None, :],
        mask=head_mask[:, None] & (d < D)[None, :],
        other=0.0,
    )
    q = tl.broadcast_to(q[None, :, :], [WARPS, BLOCK_M, D_PAD])
    score_scale = scaling
    if k_scale_ptr is not None:
        score_scale *= tl.load(k_scale_ptr)
    if DECODE_FP8:
        score_scale *= 256.0

    k_ptr += kv_head * BLOCK_SIZE * D
    v_ptr += kv_head * BLOCK_SIZE * D

    top = tl.full([WARPS, BLOCK_M], LOWEST, tl.float32)
    weight = tl.zeros([WARPS, BLOCK_M], tl.float32)
    acc = tl.zeros([WARPS, BLOCK_M, D_PAD], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = start + lanes
        in_row = (keys >= visible) & (keys < end)
        offsets = (pages.to(tl.int64) * PAGE + keys % BLOCK_SIZE * D)[:, :, None] + d[None, None, :]
        mask = in_row[:, :, None] & (d < D)[None, None, :]
        # The ids of the next tile's pages: its loads then wait for nothing.
        page_keys += BLOCK_N
        pages = tl.load(table_ptr + page_keys // BLOCK_SIZE, mask=page_keys < end, other=0)

        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        if DECODE_FP8:
            k = _float16_of_e4m3(k)
        scores = tl.dot(q, tl.permute(k.to(q.dtype), (0, 2, 1)), input_precision="tf32x3")
        if SOFTCAP:
            doubled = scores * (score_scale * 2.0 * LOG2_E / softcap)
            scores = (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(doubled)))
        else:
            scores *= score_scale * LOG2_E
        scores = tl.where(in_row[:, None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=2))
        probabilities = tl.exp2(scores - new_top[:, :, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(probabilities, axis=2)
        top = new_top
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        if DECODE_FP8:
            v = _float16_of_e4m3(v)
        acc = tl.dot(probabilities.to(q.dtype), v.to(q.dtype), acc * shrink[:, :, None], input_precision="tf32x3")

    item_top = tl.max(top, axis=0)
    shrink = tl.exp2(top - item_top[None, :])
    item_weight = tl.sum(weight * shrink, axis=0)
    acc *= shrink[:, :, None]
    if HALF:
        item_top = _first_half(item_top)
        item_weight = _first_half(item_weight)
        acc = _first_half_of_rows(acc)
    for _ in tl.static_range(LOG2_WARPS):
        acc = _sum_of_halves(acc)
    item_acc = tl.reshape(acc, [ROWS, D_PAD])
    heads = group_start + tl.arange(0, ROWS)
    head_mask = heads < GROUP
    heads = kv_head * GROUP + heads

    value_scale = 1.0
    if v_scale_ptr is not None:
        value_scale = tl.load(v_scale_ptr)
    if DECODE_FP8:
        value_scale *= 256.0
    if splits == 1:
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + heads, mask=head_mask, other=0.0).to(tl.float32) * LOG2_E
            full_top = tl.maximum(item_top, sinks)
            rescale = tl.exp2(item_top - full_top)
            item_weight = item_weight * rescale + tl.exp2(sinks - full_top)
            item_acc *= rescale[:, None]
        item_acc *= (value_scale / tl.where(item_weight == 0.0, 1.0, item_weight))[:, None]
        tl.store(
            out_ptr + row64 * out_stride_b + heads[:, None] * out_stride_h + d[None, :],
            item_acc.to(out_ptr.dtype.element_ty),
            mask=head_mask[:, None] & (d < D)[None, :],
        )
    else:
        part = (item * HEADS + heads).to(tl.int64)
        tl.store(partials_ptr + part[:, None] * D + d[None, :], item_acc, mask=head_mask[:, None] & (d < D)[None, :])
        tl.store(stats_ptr + part * 2, item_top, mask=head_mask)
        tl.store(stats_ptr + part * 2 + 1, item_weight, mask=head_mask)
        # All threads' stores come before the count, and the last program's loads after it.
        tl.debug_barrier()
        counter_ptr = counters_ptr + row * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(counter_ptr, 0)
            heads_G = group_start + tl.arange(0, SPLIT_HEADS)
            mask_G = heads_G < GROUP
            heads_G = kv_head * GROUP + heads_G
            top_G = tl.full([SPLIT_HEADS], LOWEST, tl.float32)
            weight_G = tl.zeros([SPLIT_HEADS], tl.float32)
            if sinks_ptr is not None:
                top_G = tl.load(sinks_ptr + heads_G, mask=mask_G, other=0.0).to(tl.float32) * LOG2_E
                weight_G += 1.0
            acc_GD = tl.zeros([SPLIT_HEADS, D_PAD], tl.float32)
            for first in range(0, splits, SPLITS):
                for i in tl.static_range(SPLITS):
                    wanted = mask_G & (first + i < splits)
                    part_G = ((first_item + first + i) * HEADS + heads_G).to(tl.int64)
                    split_top = tl.load(stats_ptr + part_G * 2, mask=wanted, other=LOWEST, cache_modifier=".cg")
                    split_weight = tl.load(stats_ptr + part_G * 2 + 1, mask=wanted, other=0.0, cache_modifier=".cg")
                    split_acc = tl.load(
                        partials_ptr + part_G[:, None] * D + d[None, :],
                        mask=wanted[:, None] & (d < D)[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_top_G = tl.maximum(top_G, split_top)
                    shrink_G = tl.exp2(top_G - new_top_G)
                    share_G = tl.exp2(split_top - new_top_G)
                    weight_G = weight_G * shrink_G + split_weight * share_G
                    acc_GD = acc_GD * shrink_G[:, None] + split_acc * share_G[:, None]
                    top_G = new_top_G
            acc_GD *= (value_scale / weight_G)[:, None]
            tl.store(
                out_ptr + row64 * out_stride_b + heads_G[:, None] * out_stride_h + d[None, :],
                acc_GD.to(out_ptr.dtype.element_ty),
                mask=mask_G[:, None] & (d < D)[None, :],
            )
