"""The plain kernels of paged prefill attention: the gather of contexts into scratch, and one tile of queries.

`prefill_attention` says when each is used, launches them and names the dimensions.
"""

from __future__ import annotations

from engine.kernels.compiler import tl, triton

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
def gather_context_kernel(
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


@triton.jit
def _attend_scratch(
    q, acc, peak, total, k_scratch_ptr, v_scratch_ptr, row_start, begin, end, context, query, offs_n, offs_d, scale, softcap,
    window, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over a gathered context's tokens [begin, end); token t lies at row_start + t."""
    full = end // BLOCK_N * BLOCK_N
    for at in tl.range(begin, full, BLOCK_N):
        k = _load_keys(k_scratch_ptr, row_start + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        v = _load_keys(v_scratch_ptr, row_start + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        if HAS_WINDOW:
            visible = (at - context + offs_n)[None, :] > (query - window)[:, None]
            acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
        else:
            acc, peak, total = _attend(q, k, v, acc, peak, total, None, scale, softcap, False, HAS_SOFTCAP)
    # The context's end: the gather left zeros behind it.
    for at in tl.range(tl.maximum(begin, full), end, BLOCK_N, num_stages=1):
        k = _load_keys(k_scratch_ptr, row_start + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        v = _load_keys(v_scratch_ptr, row_start + at, HEAD_DIM, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        visible = (at + offs_n < context)[None, :]
        if HAS_WINDOW:
            visible = visible & ((at - context + offs_n)[None, :] > (query - window)[:, None])
        acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
    return acc, peak, total


@triton.jit
def _attend_pages(
    q, acc, peak, total, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, begin, end, context, oldest,
    query, offs_n, offs_d, scale, softcap, window, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over a context's tokens [begin, end) in their pages."""
    inside_d = offs_d < HEAD_DIM
    for at in tl.range(begin, end, BLOCK_N):
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
    return acc, peak, total


@triton.jit
def _attend_own(
    q, acc, peak, total, k_ptr, v_ptr, k_stride, v_stride, query_start, query_len, first, begin, end, query, offs_n, offs_d,
    scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over the chunk's own tokens [begin, end): those that all queries of the tile see, then the diagonal."""
    full = (first + 1) // BLOCK_N * BLOCK_N
    for at in tl.range(begin, full, BLOCK_N):
        k = _load_keys(k_ptr, query_start + at, k_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        v = _load_keys(v_ptr, query_start + at, v_stride, offs_n, offs_d, 0, HEAD_DIM, BLOCK_D, False)
        if HAS_WINDOW:
            visible = (at + offs_n)[None, :] > (query - window)[:, None]
            acc, peak, total = _attend(q, k, v, acc, peak, total, visible, scale, softcap, True, HAS_SOFTCAP)
        else:
            acc, peak, total = _attend(q, k, v, acc, peak, total, None, scale, softcap, False, HAS_SOFTCAP)
    # The diagonal. In its last tile the keys may end inside the tile: what follows belongs to another row and is not read.
    diagonal_begin = tl.maximum(begin, full)
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
    return acc, peak, total


@triton.jit(do_not_specialize=_VARYING)
def prefill_kernel(
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
        acc, peak, total = _attend_scratch(
            q, acc, peak, total, k_scratch_ptr, v_scratch_ptr, scratch_row, context_begin, scratch_end, context, query,
            offs_n, offs_d, scale, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    table_ptr = block_tables_ptr + tl.load(row_slots_ptr + row).to(tl.int64) * table_stride
    acc, peak, total = _attend_pages(
        q, acc, peak, total, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr, table_ptr, kv_head, context_begin, pages_end,
        context, oldest, query, offs_n, offs_d, scale, softcap, window,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip
    own_begin = tl.maximum(oldest, 0) // BLOCK_N * BLOCK_N
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    acc, peak, total = _attend_own(
        q, acc, peak, total, k_ptr, v_ptr, k_stride, v_stride, query_start, query_len, first, own_begin, end, query,
        offs_n, offs_d, scale, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out_ptr + tokens[:, None] * out_stride + heads[:, None] * HEAD_DIM + offs_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real_d,
    )
