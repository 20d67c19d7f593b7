"""The kernels of paged decode attention: the plan of a step's work items, and one item of one key/value head.

`decode_attention` says what they do together, launches them and names the dimensions. A score is in base 2 throughout.
"""

from __future__ import annotations

from engine.kernels.compiler import HAS_TRITON, tl, triton

_LOG2_E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634
_LOWEST = tl.constexpr(-1.0e30) if HAS_TRITON else -1.0e30  # below any score, and finite: the difference of two is no NaN


@triton.jit(do_not_specialize=["num_rows", "num_items", "extra_items", "window"])
def plan_kernel(
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
def _query_heads(kv_head, group_start, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT query heads of a key/value head, from group_start of its group on, and which of them exist."""
    heads = group_start + tl.arange(0, COUNT)
    return kv_head * GROUP + heads, heads < GROUP


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    pages,
    page_keys,
    lanes,
    d,
    visible,
    begin,
    end,
    score_scale,
    softcap,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DECODE_FP8: tl.constexpr,
):
    """Online softmax over an item's keys [begin, end): each warp's maxima [W, M], weights [W, M] and sums [W, M, D].

    `pages` of `page_keys` are the first tile's: asked for by the caller, so that they are on their way while it loads q.
    """
    top = tl.full([q.shape[0], q.shape[1]], _LOWEST, tl.float32)
    weight = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    acc = tl.zeros([q.shape[0], q.shape[1], q.shape[2]], tl.float32)
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
            doubled = scores * (score_scale * 2.0 * _LOG2_E / softcap)
            scores = (softcap * _LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(doubled)))
        else:
            scores *= score_scale * _LOG2_E
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
    return top, weight, acc


@triton.jit
def _join_warps(top, weight, acc, LOG2_WARPS: tl.constexpr, HALF: tl.constexpr):
    """The item's maxima [M], weights [M] and sums [M, D] of its warps' own; of the first M / 2 heads if HALF."""
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
    return item_top, item_weight, tl.reshape(acc, [acc.shape[1], acc.shape[2]])


@triton.jit
def _divided(top, weight, acc, value_scale, sinks_ptr, heads, head_mask):
    """The output of a row in one item: its sums over its weights, the sinks' among them."""
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, mask=head_mask, other=0.0).to(tl.float32) * _LOG2_E
        full_top = tl.maximum(top, sinks)
        rescale = tl.exp2(top - full_top)
        weight = weight * rescale + tl.exp2(sinks - full_top)
        acc *= rescale[:, None]
    return acc * (value_scale / tl.where(weight == 0.0, 1.0, weight))[:, None]


@triton.jit
def _store_part(partials_ptr, stats_ptr, item, top, weight, acc, heads, head_mask, d, HEADS: tl.constexpr, D: tl.constexpr):
    """What an item leaves for the program of its row that comes last."""
    part = (item * HEADS + heads).to(tl.int64)
    tl.store(partials_ptr + part[:, None] * D + d[None, :], acc, mask=head_mask[:, None] & (d < D)[None, :])
    tl.store(stats_ptr + part * 2, top, mask=head_mask)
    tl.store(stats_ptr + part * 2 + 1, weight, mask=head_mask)


@triton.jit
def _sum_of_parts(
    partials_ptr,
    stats_ptr,
    sinks_ptr,
    first_item,
    splits,
    heads_G,
    mask_G,
    d,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weights [G] and sums [G, D] of a row's items, SPLITS loads of them at a time; the sinks are among the weights."""
    top_G = tl.full([heads_G.shape[0]], _LOWEST, tl.float32)
    weight_G = tl.zeros([heads_G.shape[0]], tl.float32)
    if sinks_ptr is not None:
        top_G = tl.load(sinks_ptr + heads_G, mask=mask_G, other=0.0).to(tl.float32) * _LOG2_E
        weight_G += 1.0
    acc_GD = tl.zeros([heads_G.shape[0], d.shape[0]], tl.float32)
    for first in range(0, splits, SPLITS):
        for i in tl.static_range(SPLITS):
            wanted = mask_G & (first + i < splits)
            part_G = ((first_item + first + i) * HEADS + heads_G).to(tl.int64)
            split_top = tl.load(stats_ptr + part_G * 2, mask=wanted, other=_LOWEST, cache_modifier=".cg")
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
    return weight_G, acc_GD


@triton.jit
def _store_row(row_ptr, stride_h, values, heads, head_mask, d, D: tl.constexpr):
    """Values [M, D] of a row's heads, to where the row is written out."""
    tl.store(
        row_ptr + heads[:, None] * stride_h + d[None, :],
        values.to(row_ptr.dtype.element_ty),
        mask=head_mask[:, None] & (d < D)[None, :],
    )


@triton.jit
def decode_kernel(
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
    PAGE: tl.constexpr = HEADS // GROUP * BLOCK_SIZE * D
    WARPS: tl.constexpr = 1 << LOG2_WARPS
    # The matrix units take 16 rows; groups of at most 8 heads leave the other half at once.
    HALF: tl.constexpr = BLOCK_M == 16 and SPLIT_HEADS <= 8
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
    heads, head_mask = _query_heads(kv_head, group_start, GROUP, BLOCK_M)
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
    top, weight, acc = _attend(
        q, k_ptr, v_ptr, table_ptr, pages, page_keys, lanes, d, visible, begin, end, score_scale, softcap,
        PAGE, D, WARPS * KEYS, BLOCK_SIZE, STAGES, SOFTCAP, DECODE_FP8,
    )  # fmt: skip
    item_top, item_weight, item_acc = _join_warps(top, weight, acc, LOG2_WARPS, HALF)
    heads, head_mask = _query_heads(kv_head, group_start, GROUP, 8 if HALF else BLOCK_M)

    value_scale = 1.0
    if v_scale_ptr is not None:
        value_scale = tl.load(v_scale_ptr)
    if DECODE_FP8:
        value_scale *= 256.0
    if splits == 1:
        values = _divided(item_top, item_weight, item_acc, value_scale, sinks_ptr, heads, head_mask)
        _store_row(out_ptr + row64 * out_stride_b, out_stride_h, values, heads, head_mask, d, D)
    else:
        _store_part(partials_ptr, stats_ptr, item, item_top, item_weight, item_acc, heads, head_mask, d, HEADS, D)
        # All threads' stores come before the count, and the last program's loads after it.
        tl.debug_barrier()
        counter_ptr = counters_ptr + row * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(counter_ptr, 0)
            heads_G, mask_G = _query_heads(kv_head, group_start, GROUP, SPLIT_HEADS)
            weight_G, acc_GD = _sum_of_parts(
                partials_ptr, stats_ptr, sinks_ptr, first_item, splits, heads_G, mask_G, d, HEADS, D, SPLITS
            )
            acc_GD *= (value_scale / weight_G)[:, None]
            _store_row(out_ptr + row64 * out_stride_b, out_stride_h, acc_GD, heads_G, mask_G, d, D)
