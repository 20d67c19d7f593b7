"""The kernels of linears of few rows: `vector` and `matrix`. `skinny_linear` says when each is used, and launches them."""

from __future__ import annotations

from engine.kernels.compiler import tl, triton


@triton.jit
def _weight_rows(tile, num_outputs, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr):
    """The rows of W that a tile takes; with an activation, gate and up rows side by side."""
    slot = tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:
        row_N = tl.minimum(tile * (BLOCK_N // 2) + slot // 2, num_outputs - 1)
        return row_N + (slot % 2) * num_outputs
    else:
        return tl.minimum(tile * BLOCK_N + slot, num_outputs - 1)


@triton.jit
def _fetch_ahead(weight_ptr, rows_N, start, E: tl.constexpr, COLUMNS: tl.constexpr, LINE: tl.constexpr):
    """Asks the L2 for COLUMNS inputs of each row, from `start` on, a cache line of LINE of them at a time."""
    lines = start + tl.arange(0, COLUMNS // LINE) * LINE
    addresses = (weight_ptr + rows_N[:, None].to(tl.int64) * E + tl.minimum(lines, E - 1)[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_weights(weight_ptrs, start, e, E: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(weight_ptrs + start, mask=(start + e < E)[None, :], other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(weight_ptrs + start, eviction_policy="evict_first")


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    else:  # gelu_tanh; tanh(z) = 2 sigmoid(2z) - 1
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _side_by_side(parts, COUNT: tl.constexpr):
    """One or two tensors, two of them in a new last dimension."""
    if COUNT == 1:
        return parts[0]
    else:
        return tl.join(parts[0], parts[1])


@triton.jit
def _finish(
    acc,
    row_N,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    tile,
    num_rows,
    num_outputs,
    stride_y,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """What follows a product [BLOCK_N, ROWS] of rows row_N of W; rounded where separate kernels would round."""
    m = tl.arange(0, ROWS)[None, :]
    if SCALED:
        acc = acc * tl.load(scale_ptr + row_N)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + row_N).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        acc = acc.to(y_ptr.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, ROWS]), [0, 2, 1]))
        acc = _activate(gate, ACTIVATION).to(y_ptr.dtype.element_ty).to(tl.float32) * up
        n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
    else:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    mask = (n < num_outputs) & (m < num_rows)
    acc = acc.to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        residual_ptrs = residual_ptr + m * stride_y + n
        acc = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + acc.to(tl.float32)
        tl.store(residual_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + m * stride_y + n, acc, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def vector_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    num_rows,
    num_outputs,
    stride_x,
    stride_y,
    eps,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LANE: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products on the ordinary units: a tile of W, all of E, with one row of x or two."""
    row_N = _weight_rows(tl.program_id(0), num_outputs, BLOCK_N, ACTIVATION)
    e = tl.arange(0, BLOCK_E)
    weight_ptrs = weight_ptr + row_N[:, None].to(tl.int64) * E + e[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if STAGES > 1:  # the next tile's loads are under way while this one is multiplied, the first one's before x is there
        w_next = _load_weights(weight_ptrs, 0, e, E, E < BLOCK_E)
    if PDL:
        tl.extra.cuda.gdc_wait()

    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_E // LANE], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        squares = squares + (tl.zeros([BLOCK_E // LANE], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for start in tl.range(0, E, BLOCK_E, num_stages=1):
        if STAGES > 1:
            w = w_next.to(tl.float32)
            w_next = _load_weights(weight_ptrs, start + BLOCK_E, e, E, True)
        else:
            w = _load_weights(weight_ptrs, start, e, E, E % BLOCK_E != 0).to(tl.float32)
        inside = start + e < E
        if NORM:
            norm = tl.load(norm_ptr + start + e, mask=inside, other=0.0).to(tl.float32) + NORM_OFFSET
        # One tuple after another, since a tuple's parts cannot be assigned to.
        new_sums = ()
        new_squares = ()
        for m in tl.static_range(ROWS):
            x = tl.load(x_ptr + m * stride_x + start + e, mask=inside & (m < num_rows), other=0.0).to(tl.float32)
            if NORM:
                square = tl.sum(tl.reshape(x * x, [BLOCK_E // LANE, LANE]), axis=1)
                new_squares = new_squares + (squares[m] + square,)  # type: ignore[assignment]  # noqa: RUF005
                x = x * norm
            else:
                new_squares = new_squares + (squares[m],)  # type: ignore[assignment]  # noqa: RUF005
            product = tl.sum(tl.reshape(w * x[None, :], [BLOCK_N, BLOCK_E // LANE, LANE]), axis=2)
            new_sums = new_sums + (sums[m] + product,)  # type: ignore[assignment]  # noqa: RUF005
        sums = new_sums
        squares = new_squares

    acc = tl.sum(tl.reshape(_side_by_side(sums, ROWS), [BLOCK_N, BLOCK_E // LANE, ROWS]), axis=1)
    if NORM:
        total = tl.sum(tl.reshape(_side_by_side(squares, ROWS), [BLOCK_E // LANE, ROWS]), axis=0)
        acc = acc * tl.rsqrt(total / E + eps)[None, :]
    _finish(
        acc, row_N, scale_ptr, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), num_rows, num_outputs, stride_y,
        ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _product(
    x_ptr, weight_ptr, row_N, num_rows, stride_x, first, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, SPLIT_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows row_N of W times x over SPLIT_E inputs from `first` on: float32 [BLOCK_N, ROWS]."""
    m = tl.arange(0, ROWS)
    e = first + tl.arange(0, BLOCK_E)
    weight_ptrs = weight_ptr + row_N[:, None].to(tl.int64) * E + e[None, :]
    x_ptrs = x_ptr + m[None, :] * stride_x + e[:, None]
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in tl.range(0, SPLIT_E // BLOCK_E, num_stages=STAGES):
        offset = step * BLOCK_E
        w = _load_weights(weight_ptrs, offset, e, E, E != SPLITS * SPLIT_E)
        if E == SPLITS * SPLIT_E:
            x = tl.load(x_ptrs + offset, mask=m[None, :] < num_rows, other=0.0)
        else:
            x = tl.load(x_ptrs + offset, mask=(m[None, :] < num_rows) & (e + offset < E)[:, None], other=0.0)
        acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def matrix_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    parts_ptr,
    arrived_ptr,
    num_rows,
    num_outputs,
    stride_x,
    stride_y,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_E: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Products on the tensor cores: a tile of W over one split of E. The last split of a tile to arrive adds up all parts."""
    tile = tl.program_id(1)
    split = tl.program_id(0)
    row_N = _weight_rows(tile, num_outputs, BLOCK_N, ACTIVATION)
    first = split * SPLIT_E
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _fetch_ahead(weight_ptr, row_N, first, E, PREFETCH, 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
        tl.extra.cuda.gdc_wait()

    acc = _product(x_ptr, weight_ptr, row_N, num_rows, stride_x, first, E, ROWS, BLOCK_N, BLOCK_E, SPLITS, SPLIT_E, STAGES)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLITS == 1:
        _finish(
            acc, row_N, scale_ptr, bias_ptr, residual_ptr, y_ptr, tile, num_rows, num_outputs, stride_y,
            ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        m = tl.arange(0, ROWS)
        slot = tl.arange(0, BLOCK_N)
        part_ptrs = parts_ptr + tile * (SPLITS * ROWS * BLOCK_N) + m[None, :] * BLOCK_N + slot[:, None]
        used = (m[None, :] < num_rows) & (slot[:, None] >= 0)
        tl.store(part_ptrs + split * (ROWS * BLOCK_N), acc, mask=used)
        tl.debug_barrier()  # all threads' parts are written before one of them counts the program in
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(part_ptrs + other * (ROWS * BLOCK_N), mask=used, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _finish(
                acc, row_N, scale_ptr, bias_ptr, residual_ptr, y_ptr, tile, num_rows, num_outputs, stride_y,
                ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
            )  # fmt: skip
