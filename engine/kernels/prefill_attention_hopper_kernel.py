"""Prefill attention for Hopper, in Gluon: what `prefill_attention` does, with warps that load and warps that compute.

FlashAttention-3's plan (arXiv 2407.08608). One warp brings queries, keys and values by TMA, 16-token pages straight into the
rows of a tile of keys, so that nothing is gathered first; two warpgroups of 64 rows compute. Each issues the next tile's scores
before it accumulates the last tile's values, so that its softmax runs under tensor-core work; the two take turns in issuing.
Programs are persistent: the loading warp is at the next work item while the others finish this one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _work_item(tiles_ptr, query_starts_ptr, context_lens_ptr, n, num_items, HEADS: gl.constexpr):
    """The program's n-th item: (row, first query, head block, row's first token, its queries, its context). Items are sorted by
    falling work; programs take them back and forth, so that each gets much the same sum."""
    programs = gl.num_programs(0)
    item = n * programs + gl.where(n % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    item = gl.minimum(item, num_items - 1)
    row = gl.load(tiles_ptr + 2 * (item // HEADS))
    first = gl.load(tiles_ptr + 2 * (item // HEADS) + 1)
    query_start = gl.load(query_starts_ptr + row)
    query_len = gl.load(query_starts_ptr + row + 1) - query_start
    return row, first, item % HEADS, query_start, query_len, gl.load(context_lens_ptr + row)


@gluon.jit
def _num_items(num_items):
    """How many items the program has: one in each full round, and one of the last round if that reaches it."""
    programs = gl.num_programs(0)
    rounds = num_items // programs
    place = gl.where(rounds % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return rounds + gl.where(rounds * programs + place < num_items, 1, 0)


@gluon.jit
def _spans(first, query_len, context, window, QUERIES: gl.constexpr, BLOCK_N: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """The tiles of an item's keys, which are context [-context, 0) and own [0, first + QUERIES), from the window's `oldest` on.
    In this order: the diagonal, the context's partial end (both masked), own full tiles, full tiles of the context."""
    end = gl.minimum(first + QUERIES, query_len)
    oldest = -context
    if HAS_WINDOW:
        oldest = gl.maximum(oldest, first - window + 1)
    own_begin = gl.maximum(oldest, 0) // BLOCK_N * BLOCK_N
    own_full = gl.maximum((first + 1) // BLOCK_N * BLOCK_N, own_begin)
    context_begin = (gl.minimum(oldest, 0) + context) // BLOCK_N * BLOCK_N
    context_full = gl.maximum(context // BLOCK_N * BLOCK_N, context_begin)
    num_diagonal = (end - own_full + BLOCK_N - 1) // BLOCK_N
    num_masked = num_diagonal + gl.where(context > context_full, 1, 0)
    num_own = num_masked + (own_full - own_begin) // BLOCK_N
    num_tiles = num_own + (context_full - context_begin) // BLOCK_N
    return oldest, own_begin, own_full, context_begin, context_full, num_diagonal, num_masked, num_own, num_tiles


@gluon.jit
def _tile_position(i, spans, BLOCK_N: gl.constexpr):
    """(of the row's own keys or of its context, first key) of the i-th tile, from the chunk's or the context's start."""
    _, own_begin, own_full, context_begin, context_full, num_diagonal, num_masked, num_own, _ = spans
    own = (i < num_diagonal) | ((i >= num_masked) & (i < num_own))
    at = gl.where(i < num_own, own_begin + (i - num_masked) * BLOCK_N, context_begin + (i - num_own) * BLOCK_N)
    at = gl.where(i < num_masked, context_full, at)
    return own, gl.where(i < num_diagonal, own_full + i * BLOCK_N, at)


@gluon.jit
def _copy_tokens(qkv_desc, token, first_head, kv_head, tile, full, empty, phase, HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr):
    """Brings a tile of the step's own keys or values, from `token` on, once its last readers have left it."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    TILE_BYTES: gl.constexpr = BLOCK_N * tile.shape[1] * 2
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, TILE_BYTES)
    for b in gl.static_range(0, BLOCK_N, TOKENS):
        column = (first_head + kv_head) * HEAD_DIM
        part = tile.slice(b, TOKENS)
        tma.async_copy_global_to_shared(qkv_desc, [token + b, column], full, part)


@gluon.jit
def _copy_pages(pages_desc, first_row, rows, offs_p, tile, full, empty, phase, PAGE_ROWS: gl.constexpr):
    """Brings a tile of a context's keys or values out of its pages, at first_row + rows of the descriptor's matrix."""
    PAGES: gl.constexpr = tile.shape[0] // PAGE_ROWS
    TILE_BYTES: gl.constexpr = tile.shape[0] * tile.shape[1] * 2
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, TILE_BYTES)
    for p in gl.static_range(PAGES):
        page_row = gl.sum(gl.where(offs_p == p, rows, 0), 0)
        part = tile.slice(p * PAGE_ROWS, PAGE_ROWS)
        tma.async_copy_global_to_shared(pages_desc, [first_row + page_row, 0], full, part)


@gluon.jit
def _producer(
    qkv_desc, pages_desc, block_tables_ptr, row_slots_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr,
    q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    k_first_head, v_first_head, k_first_page_row, v_first_page_row, window, table_stride, num_items,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: keeps STAGES tiles of keys and of values on their way. A box of tokens is as long as a tile has queries, so
    that one descriptor serves queries, keys and values."""
    QUERIES: gl.constexpr = BLOCK_M // PACKED
    PACKS: gl.constexpr = GROUP // PACKED
    TOKENS: gl.constexpr = min(QUERIES, BLOCK_N)
    PAGE_ROWS: gl.constexpr = min(BLOCK_SIZE, BLOCK_N)
    PAGES: gl.constexpr = BLOCK_N // PAGE_ROWS
    done = 0
    for n in range(_num_items(num_items)):
        row, first, head_block, query_start, query_len, context = _work_item(
            tiles_ptr, query_starts_ptr, context_lens_ptr, n, num_items, NUM_KV_HEADS * PACKS
        )
        spans = _spans(first, query_len, context, window, QUERIES, BLOCK_N, HAS_WINDOW)
        kv_head = head_block // PACKS
        first_head = head_block * PACKED
        table_ptr = block_tables_ptr + gl.load(row_slots_ptr + row).to(gl.int64) * table_stride
        last_page = (context - 1) // BLOCK_SIZE

        mbarrier.wait(q_empty, (n + 1) & 1)
        mbarrier.expect(q_full, BLOCK_M * BLOCK_D * 2)
        for m in gl.static_range(0, BLOCK_M, TOKENS):
            q_column = (first_head + m // QUERIES) * HEAD_DIM
            q_part = q_tile.slice(m, TOKENS)
            tma.async_copy_global_to_shared(qkv_desc, [query_start + first + m % QUERIES, q_column], q_full, q_part)
        for i in range(spans[8]):
            own, at = _tile_position(i, spans, BLOCK_N)
            stage = (done + i) % STAGES
            phase = ((done + i) // STAGES + 1) & 1
            k_tile = k_tiles.index(stage)
            v_tile = v_tiles.index(stage)
            if own:
                _copy_tokens(
                    qkv_desc, query_start + at, k_first_head, kv_head, k_tile, k_full.index(stage), k_empty.index(stage), phase,
                    HEAD_DIM, TOKENS,
                )  # fmt: skip
                _copy_tokens(
                    qkv_desc, query_start + at, v_first_head, kv_head, v_tile, v_full.index(stage), v_empty.index(stage), phase,
                    HEAD_DIM, TOKENS,
                )  # fmt: skip
            else:
                # Past the context's end any page will do: its scores are masked and its values zeroed.
                offs_p = gl.arange(0, PAGES, gl.BlockedLayout([1], [32], [1], [0]))
                positions = at + offs_p * PAGE_ROWS
                pages = gl.load(table_ptr + gl.minimum(positions // BLOCK_SIZE, last_page))
                rows = (pages * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
                _copy_pages(
                    pages_desc, k_first_page_row, rows, offs_p, k_tile, k_full.index(stage), k_empty.index(stage), phase,
                    PAGE_ROWS,
                )  # fmt: skip
                _copy_pages(
                    pages_desc, v_first_page_row, rows, offs_p, v_tile, v_full.index(stage), v_empty.index(stage), phase,
                    PAGE_ROWS,
                )  # fmt: skip
        done += spans[8]


@gluon.jit
def _softmax(
    scores, peak, total, lower, upper, scale, softcap, MMA: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Online softmax in base 2 over each row's keys [lower, upper) of the tile: weights, the factor for what was accumulated
    before, the new peak and total. scale turns scores into log2."""
    if SOFTCAP:
        # softcap is in log2 units here; tanh(x) = 1 - 2 / (1 + e^2x) keeps its sign and limits for any x.
        scores = softcap * (1.0 - 2.0 / (1.0 + gl.exp2(scores * scale)))
        scale = 1.0
    if MASKED:
        offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
        visible = offs_n[None, :] < upper[:, None]
        if WINDOW:
            visible = visible & (offs_n[None, :] >= lower[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _bounds(i, spans, query, query_len, context, window, BLOCK_N: gl.constexpr):
    """Of the i-th tile's keys: each row's visible [lower, upper), and the tile's [begin, end) that exist. Context from before
    the oldest key that any row sees counts as missing: its page may be gone."""
    own, at = _tile_position(i, spans, BLOCK_N)
    begin = gl.where(own, 0, spans[0] + context - at)
    end = gl.where(own, query_len, context) - at
    diagonal = query + 1 + gl.where(own, 0, context) - at
    return diagonal - window, gl.minimum(diagonal, end), begin, end


@gluon.jit
def _zero_missing_values(v_tile, begin, end, BLOCK_N: gl.constexpr):
    """Zeroes all values but the tile's [begin, end): the others may be NaN, which a weight of zero would not silence. Both
    warpgroups do so, each before it reads; what one writes under the other's eyes is what is there already."""
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
def _step(
    tile, step, acc, weights, peak, total, lower, upper, q_part, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn,
    next_turn, scale, softcap, DTYPE: gl.constexpr, MMA: gl.constexpr, ACC: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Scores of a tile while the values of the one before are accumulated with its weights. tile counts those of all items."""
    stage = tile % STAGES
    before = (tile - 1) % STAGES
    p = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, ACC, 2))
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    mbarrier.wait(turn, step & 1)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, MMA)
    scores = warpgroup_mma(q_part, k_tiles.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((tile - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    mbarrier.arrive(next_turn, count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, decay, peak, total = _softmax(
        scores, peak, total, lower, upper, scale, softcap, MMA, BLOCK_N, MASKED, WINDOW, SOFTCAP
    )
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC))[:, None]
    return acc, weights, peak, total


@gluon.jit
def _start_softmax(sinks_ptr, head_block, offs_m, PACKED: gl.constexpr, QUERIES: gl.constexpr, MMA: gl.constexpr):
    """Each row's first peak and total: its head's sink, or nothing."""
    if sinks_ptr is not None:
        sinks = gl.load(sinks_ptr + head_block * PACKED + offs_m // QUERIES)
        peak = sinks.to(gl.float32) * 1.4426950408889634
        total = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, MMA))
    else:
        peak = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, MMA))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, MMA))
    return peak, total


@gluon.jit
def _store_item(
    out_ptr, acc, total, first, query_start, query_len, head_block, out_stride, store_m, store_d,
    QUERIES: gl.constexpr, PACKED: gl.constexpr, HEAD_DIM: gl.constexpr, ACC: gl.constexpr, STORE: gl.constexpr,
):  # fmt: skip
    """Divides the warpgroup's sums by their totals and writes them out."""
    inverse = 1.0 / gl.where(total > 0.0, total, 1.0)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, ACC))[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORE)
    store_query = first + store_m % QUERIES
    column = (head_block * PACKED + store_m // QUERIES) * HEAD_DIM
    out_at = (query_start + store_query).to(gl.int64) * out_stride + column
    mask = (store_query < query_len)[:, None] & (store_d < HEAD_DIM)[None, :]
    gl.store(out_ptr + out_at[:, None] + store_d[None, :], out, mask=mask)


@gluon.jit
def _consumer(
    out_ptr, sinks_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full,
    k_empty, v_full, v_empty, turns, out_stride, scale, softcap, window, num_items,
    PART: gl.constexpr, HEADS: gl.constexpr, PACKED: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows 64 · PART to 64 · PART + 63 of each item."""
    QUERIES: gl.constexpr = BLOCK_M // PACKED
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    DTYPE: gl.constexpr = q_tile.dtype
    q_part = q_tile.slice(PART * 64, 64)
    turn = turns.index(PART)
    next_turn = turns.index(1 - PART)
    offs_m = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    store_m = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
    store_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, STORE))

    done = 0
    steps = 0
    count = _num_items(num_items)
    _, first, head_block, query_start, query_len, context = _work_item(
        tiles_ptr, query_starts_ptr, context_lens_ptr, 0, num_items, HEADS
    )
    for n in range(count):
        # The next item's numbers are on their way while this one is computed.
        _, next_first, next_head_block, next_query_start, next_query_len, next_context = _work_item(
            tiles_ptr, query_starts_ptr, context_lens_ptr, n + 1, num_items, HEADS
        )
        spans = _spans(first, query_len, context, window, QUERIES, BLOCK_N, HAS_WINDOW)
        num_tiles = spans[8]
        query = first + offs_m % QUERIES
        peak, total = _start_softmax(sinks_ptr, head_block, offs_m, PACKED, QUERIES, MMA)
        acc = gl.zeros([64, BLOCK_D], gl.float32, ACC)

        # Tile 0, always masked: its scores alone.
        lower, upper, begin, end = _bounds(0, spans, query, query_len, context, window, BLOCK_N)
        stage = done % STAGES
        mbarrier.wait(q_full, n & 1)
        if HEAD_DIM != BLOCK_D:
            # Past a head lie the next one's channels: they count only where q has any.
            q_part.store(gl.where((store_d < HEAD_DIM)[None, :], q_part.load(STORE), 0.0).to(DTYPE))
            fence_async_shared()
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        zeros = gl.zeros([64, BLOCK_N], gl.float32, MMA)
        scores = warpgroup_mma(q_part, k_tiles.index(stage).permute([1, 0]), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, _decay, peak, total = _softmax(
            scores, peak, total, lower, upper, scale, softcap, MMA, BLOCK_N, True, HAS_WINDOW, HAS_SOFTCAP
        )
        if (end < BLOCK_N) | (begin > 0):
            mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
            _zero_missing_values(v_tiles.index(stage), begin, end, BLOCK_N)

        end_masked = num_tiles if HAS_WINDOW else spans[6]
        for i in range(1, end_masked):
            lower, upper, begin, end = _bounds(i, spans, query, query_len, context, window, BLOCK_N)
            acc, weights, peak, total = _step(
                done + i, steps + i - 1, acc, weights, peak, total, lower, upper, q_part, k_tiles, v_tiles, k_full, k_empty,
                v_full, v_empty, turn, next_turn, scale, softcap, DTYPE, MMA, ACC, BLOCK_N, STAGES, True, HAS_WINDOW,
                HAS_SOFTCAP,
            )  # fmt: skip
            if (end < BLOCK_N) | (begin > 0):
                mbarrier.wait(v_full.index((done + i) % STAGES), ((done + i) // STAGES) & 1)
                _zero_missing_values(v_tiles.index((done + i) % STAGES), begin, end, BLOCK_N)
        for i in range(end_masked, num_tiles):
            acc, weights, peak, total = _step(
                done + i, steps + i - 1, acc, weights, peak, total, None, None, q_part, k_tiles, v_tiles, k_full, k_empty,
                v_full, v_empty, turn, next_turn, scale, softcap, DTYPE, MMA, ACC, BLOCK_N, STAGES, False, False, HAS_SOFTCAP,
            )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)

        last = done + num_tiles - 1
        p = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, ACC, 2))
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(last % STAGES), acc)
        mbarrier.arrive(v_empty.index(last % STAGES), count=1)

        _store_item(
            out_ptr, acc, total, first, query_start, query_len, head_block, out_stride, store_m, store_d,
            QUERIES, PACKED, HEAD_DIM, ACC, STORE,
        )  # fmt: skip
        done += num_tiles
        steps += num_tiles - 1
        first, head_block, query_start, query_len, context = (
            next_first, next_head_block, next_query_start, next_query_len, next_context,
        )  # fmt: skip


# Views of a step's buffers may start anywhere: their alignment must not make another compilation.
@gluon.jit(
    do_not_specialize=[
        "block_tables_ptr",
        "row_slots_ptr",
        "query_starts_ptr",
        "context_lens_ptr",
        "tiles_ptr",
        "table_stride",
        "k_first_head",
        "v_first_head",
        "k_first_page_row",
        "v_first_page_row",
        "window",
        "num_items",
    ]
)
def prefill_kernel(
    qkv_desc, pages_desc, block_tables_ptr, row_slots_ptr, query_starts_ptr, context_lens_ptr, tiles_ptr, out_ptr, sinks_ptr,
    k_first_head, v_first_head, k_first_page_row, v_first_page_row, out_stride, scale, softcap, window, table_stride, num_items,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Work items are (tile of queries, key/value head, PACKED of its query heads), 128 rows each: row m is query
    first + m % QUERIES of the pack's head m // QUERIES."""
    BLOCK_M: gl.constexpr = 128
    HEADS: gl.constexpr = NUM_KV_HEADS * GROUP // PACKED
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_D], LAYOUT)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
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
                out_ptr, sinks_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr, q_tile, k_tiles, v_tiles, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, turns, out_stride, scale, softcap, window, num_items,
                0, HEADS, PACKED, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STAGES, HAS_WINDOW, HAS_SOFTCAP,
            )),
            (_consumer, (
                out_ptr, sinks_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr, q_tile, k_tiles, v_tiles, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, turns, out_stride, scale, softcap, window, num_items,
                1, HEADS, PACKED, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STAGES, HAS_WINDOW, HAS_SOFTCAP,
            )),
            (_producer, (
                qkv_desc, pages_desc, block_tables_ptr, row_slots_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr,
                q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                k_first_head, v_first_head, k_first_page_row, v_first_page_row, window, table_stride, num_items,
                NUM_KV_HEADS, GROUP, PACKED, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STAGES, HAS_WINDOW,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
