"""Linears of few rows: y = x W^T where reading W is all the work.

A step of few tokens reads every weight once and multiplies it with a handful of rows, so its time is bytes over bandwidth, and
what is lost is lost at the edges: a kernel of 10 to 80 microseconds spends several of them on launch, first loads and last
waves. Two kernels here, and the same remedy in both:

- `vector`, up to 4 rows: products on the ordinary units, a program takes a few rows of W whole;
- `matrix`, up to 64 rows: products on the tensor cores with W as the tall operand, E split over programs where N alone
  gives too few; the last program to arrive adds the float32 parts in order, so that the sum does not depend on who was last;
- on Hopper, programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"): a
  kernel starts while its predecessor ends and fetches its first weights into the L2, since nothing before it writes weights,
  and only then waits for its input.

Around the product, each saving a kernel: RMSNorm of the input, bias, gated activation of merged gate and up rows, and the
addition to the residual stream.

The bits of a row do not depend on the number of rows within one kernel. Names: M rows, E inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch.nn import functional as F

from engine.kernels.compiler import tl, triton

MAX_VECTOR_ROWS = 8
MAX_ROWS = 64
Activation = Literal["silu", "gelu_tanh"]
_SMALLEST_WEIGHT = 1 << 18
"""Elements below which a product is all launch, whoever makes it."""
_LANE = 8  # inputs a thread loads at once: 16 bytes of a 16-bit weight


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How one product is cut. block_rows: rows of x a program holds (padded); block_n, block_e: its tile of W; splits: programs
    along E (matrix); num_stages: tiles of W under way (vector: 1 or 2). As a programmatic dependent: prefetch: inputs of each
    row of W asked for before the predecessor has ended; trigger: inputs after which the successor may start, -1 for at once."""

    kind: Literal["vector", "matrix", "stream"]
    block_rows: int
    block_n: int
    block_e: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0
    trigger: int = -1


@dataclass(frozen=True, slots=True)
class Card:
    """What of a GPU decides a plan. shared_bytes: shared memory that one program may have."""

    capability: tuple[int, int]
    shared_bytes: int
    num_sms: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        properties = torch.cuda.get_device_properties(device)
        return cls(
            (properties.major, properties.minor),
            properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            properties.multi_processor_count,
        )

    @property
    def has_dependent_launch(self) -> bool:
        return self.capability >= (9, 0)


@dataclass(frozen=True, slots=True)
class SkinnyWorkspace:
    """Memory that launches on one stream share: float32 parts of split products, and how many have arrived (zero at rest)."""

    parts: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(cls, device: torch.device | str, parts_bytes: int = 32 << 20, tiles: int = 8192) -> SkinnyWorkspace:
        return cls(
            torch.empty(parts_bytes // 4, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class SkinnyDevice:
    """A card, and the workspace for one stream of it."""

    card: Card
    workspace: SkinnyWorkspace

    @classmethod
    def of(cls, device: torch.device) -> SkinnyDevice:
        return cls(Card.of(device), SkinnyWorkspace.allocate(device))

    def plan(self, rows: int, num_outputs: int, num_inputs: int, weight_bytes: int, gated: bool = False) -> SkinnyPlan | None:
        return plan_skinny(rows, num_outputs, num_inputs, weight_bytes, gated, self.card)


@cache
def plan_skinny(rows: int, num_outputs: int, num_inputs: int, weight_bytes: int, gated: bool, card: Card) -> SkinnyPlan | None:
    """How to multiply `rows` rows by a weight of so many bytes an element, or None where cuBLAS is not beaten.

    gated: with an activation. Only 16-bit activations have plans.
    """
    if not 1 <= rows <= MAX_ROWS or weight_bytes > 2 or num_inputs % 16 or num_outputs * num_inputs < _SMALLEST_WEIGHT:
        return None
    if rows <= 2:  # beyond, arithmetic and reads of x take longer than reads of W
        return SkinnyPlan("vector", triton.next_power_of_2(rows), 4, 2048, 1, 8, 2)
    if weight_bytes == 1:
        return None
    block_rows = 16 if rows <= 16 else 64
    block_n, block_e, num_warps, num_stages = (64, 256, 4, 3) if block_rows == 16 else (64, 128, 4, 4)
    tiles = triton.cdiv(num_outputs, block_n)
    splits = 1 if tiles >= 2 * card.num_sms else 2
    while num_stages > 2 and _shared_bytes(block_rows, block_n, block_e, num_stages, weight_bytes) > card.shared_bytes:
        num_stages -= 1
    while _shared_bytes(block_rows, block_n, block_e, num_stages, weight_bytes) > card.shared_bytes:
        block_e //= 2
    return SkinnyPlan("matrix", block_rows, block_n, block_e, splits, num_warps, num_stages, 512, 1 << 20)


def _shared_bytes(block_rows: int, block_n: int, block_e: int, num_stages: int, weight_bytes: int) -> int:
    """Shared memory of a matrix program: its tiles of W and x under way. The result passes through less."""
    return num_stages * block_e * (block_n * weight_bytes + block_rows * 2)


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
    """COUNT tensors in new last dimensions of 2 each, which flattened are in order."""
    if COUNT == 1:
        return parts[0]
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    elif COUNT == 4:
        return tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        return tl.join(even, tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])))


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
def _vector_kernel(
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
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    slot = tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:  # gate and up rows side by side
        row_N = tl.program_id(0) * (BLOCK_N // 2) + slot // 2
        row_N = tl.minimum(row_N, num_outputs - 1) + (slot % 2) * num_outputs
    else:
        row_N = tl.minimum(tl.program_id(0) * BLOCK_N + slot, num_outputs - 1)
    e = tl.arange(0, BLOCK_E)
    weight_ptrs = weight_ptr + row_N[:, None].to(tl.int64) * E + e[None, :]
    if PDL:
        if TRIGGER < 0:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _fetch_ahead(weight_ptr, row_N, 0, E, PREFETCH, 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
    if STAGES > 1:  # the next tile's loads are under way while this one is multiplied, the first one's before x is there
        w_next = _load_weights(weight_ptrs, 0, e, E, E < BLOCK_E)
    if PDL:
        tl.extra.cuda.gdc_wait()

    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_E // LANE], tl.float32),)  # noqa: RUF005
        squares = squares + (tl.zeros([BLOCK_E // LANE], tl.float32),)  # noqa: RUF005
    for start in tl.range(0, E, BLOCK_E, num_stages=1):
        if PDL and TRIGGER >= 0:  # noqa: SIM102 (known at compile time, unlike what follows)
            if start == TRIGGER:
                tl.extra.cuda.gdc_launch_dependents()
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
                new_squares = new_squares + (squares[m] + square,)  # noqa: RUF005
                x = x * norm
            else:
                new_squares = new_squares + (squares[m],)  # noqa: RUF005
            product = tl.sum(tl.reshape(w * x[None, :], [BLOCK_N, BLOCK_E // LANE, LANE]), axis=2)
            new_sums = new_sums + (sums[m] + product,)  # noqa: RUF005
        sums = new_sums
        squares = new_squares

    if PDL and TRIGGER >= E:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.sum(tl.reshape(_side_by_side(sums, ROWS), [BLOCK_N, BLOCK_E // LANE, ROWS]), axis=1)
    if NORM:
        total = tl.sum(tl.reshape(_side_by_side(squares, ROWS), [BLOCK_E // LANE, ROWS]), axis=0)
        acc = acc * tl.rsqrt(total / E + eps)[None, :]
    _finish(
        acc, row_N, scale_ptr, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), num_rows, num_outputs, stride_y,
        ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _matrix_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    parts_ptr,
    arrived_ptr,
    num_rows,
    num_outputs,
    stride_x,
    stride_y,
    eps,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_E: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    tile = tl.program_id(1)
    split = tl.program_id(0)
    slot = tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:
        row_N = tile * (BLOCK_N // 2) + slot // 2
        row_N = tl.minimum(row_N, num_outputs - 1) + (slot % 2) * num_outputs
    else:
        row_N = tl.minimum(tile * BLOCK_N + slot, num_outputs - 1)
    first = split * SPLIT_E
    if PDL:
        if TRIGGER < 0:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _fetch_ahead(weight_ptr, row_N, first, E, PREFETCH, 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
        tl.extra.cuda.gdc_wait()

    m = tl.arange(0, ROWS)
    e = first + tl.arange(0, BLOCK_E)
    weight_ptrs = weight_ptr + row_N[:, None].to(tl.int64) * E + e[None, :]
    x_ptrs = x_ptr + m[None, :] * stride_x + e[:, None]
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([BLOCK_E, ROWS], tl.float32)
    for step in tl.range(0, SPLIT_E // BLOCK_E, num_stages=STAGES):
        offset = step * BLOCK_E
        w = _load_weights(weight_ptrs, offset, e, E, E != SPLITS * SPLIT_E)
        if E == SPLITS * SPLIT_E:
            x = tl.load(x_ptrs + offset, mask=m[None, :] < num_rows, other=0.0)
        else:
            x = tl.load(x_ptrs + offset, mask=(m[None, :] < num_rows) & (e + offset < E)[:, None], other=0.0)
        if NORM:
            norm = tl.load(norm_ptr + e + offset, mask=e + offset < E, other=0.0).to(tl.float32) + NORM_OFFSET
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * norm[:, None]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc, input_precision="ieee")

    if PDL and TRIGGER >= 0:
        tl.extra.cuda.gdc_launch_dependents()
    if NORM:
        acc = acc * tl.rsqrt(tl.sum(squares, axis=0) / E + eps)[None, :]
    if SPLITS == 1:
        _finish(
            acc, row_N, scale_ptr, bias_ptr, residual_ptr, y_ptr, tile, num_rows, num_outputs, stride_y,
            ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
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


@triton.jit(do_not_specialize=["num_rows", "num_units"])
def _stream_kernel(
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
    num_units,
    stride_x,
    stride_y,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    STEPS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = program * num_units // programs
    last = (program + 1) * num_units // programs
    slot = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    m = tl.arange(0, ROWS)
    if ACTIVATION is not None:  # gate and up rows side by side
        TILE: tl.constexpr = BLOCK_N // 2
        place_N = slot // 2
        row_N = place_N + (slot % 2) * num_outputs
    else:
        TILE: tl.constexpr = BLOCK_N
        place_N = slot
        row_N = slot
    if PDL:
        if TRIGGER < 0:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            ahead = weight_ptr + ((first // STEPS) * TILE).to(tl.int64) * E
            line: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
            _fetch_ahead(ahead, row_N, (first % STEPS) * BLOCK_E, E, PREFETCH, line)
        tl.extra.cuda.gdc_wait()

    weight_ptrs = weight_ptr + row_N[:, None].to(tl.int64) * E + e[None, :]
    x_ptrs = x_ptr + m[None, :] * stride_x + e[:, None]
    cell = m[None, :] * BLOCK_N + slot[:, None]
    used = (m[None, :] < num_rows) & (slot[:, None] >= 0)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for unit in tl.range(first, last, num_stages=STAGES):
        tile = unit // STEPS
        step = unit % STEPS
        tile_ptrs = weight_ptrs + (tile.to(tl.int64) * (TILE * E) + step * BLOCK_E)
        x_mask = m[None, :] < num_rows
        if RAGGED:
            inside = step * BLOCK_E + e < E
            w_mask = (tile * TILE + place_N < num_outputs)[:, None] & inside[None, :]
            w = tl.load(tile_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_first")
            x_mask = x_mask & inside[:, None]
        else:
            w = tl.load(tile_ptrs, eviction_policy="evict_first")
        x = tl.load(x_ptrs + step * BLOCK_E, mask=x_mask, other=0.0)
        acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc, input_precision="ieee")
        if (step == STEPS - 1) | (unit == last - 1):
            if (step == STEPS - 1) & (first <= tile * STEPS):
                _finish(
                    acc, tl.minimum(tile * TILE + place_N, num_outputs - 1) + row_N - place_N,
                    scale_ptr, bias_ptr, residual_ptr, y_ptr, tile, num_rows, num_outputs, stride_y,
                    ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
                )  # fmt: skip
            else:
                part = program * 2 + (tile != first // STEPS).to(tl.int32)
                tl.store(parts_ptr + part * (ROWS * BLOCK_N) + cell, acc, mask=used)
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)

    if PDL and TRIGGER >= 0:
        tl.extra.cuda.gdc_launch_dependents()
    tl.debug_barrier()  # all threads' parts are written before one of them counts the program in
    for end in tl.static_range(2):
        if end == 0:
            tile = first // STEPS
            shared = (first % STEPS != 0) | (last < (tile + 1) * STEPS)
        else:
            tile = (last - 1) // STEPS
            shared = (tile != first // STEPS) & (last % STEPS != 0)
        if shared:
            first_program = ((tile * STEPS + 1) * programs - 1) // num_units
            last_program = ((tile + 1) * STEPS * programs - 1) // num_units
            before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
            if before == last_program - first_program:
                total = tl.zeros([BLOCK_N, ROWS], tl.float32)
                for other in range(first_program, last_program + 1):
                    part = other * 2 + (tile != (other * num_units // programs) // STEPS).to(tl.int32)
                    total += tl.load(parts_ptr + part * (ROWS * BLOCK_N) + cell, mask=used, other=0.0, cache_modifier=".cg")
                tl.store(arrived_ptr + tile, 0)
                _finish(
                    total, tl.minimum(tile * TILE + place_N, num_outputs - 1) + row_N - place_N,
                    scale_ptr, bias_ptr, residual_ptr, y_ptr, tile, num_rows, num_outputs, stride_y,
                    ROWS, BLOCK_N, SCALED, BIAS, RESIDUAL, ACTIVATION,
                )  # fmt: skip


def skinny_linear(
    x_ME: torch.Tensor,
    weight_NE: torch.Tensor,
    plan: SkinnyPlan,
    workspace: SkinnyWorkspace | None = None,
    *,
    weight_scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    norm_weight_E: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: Activation | None = None,
    residual_MN: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """act(norm(x) W^T * scale + bias), [M, N] ([M, N / 2] with an activation, whose gate rows come first); or, with a residual,
    that added to it in place and the residual returned.

    weight_NE: contiguous, in x's dtype or float8_e4m3fn with weight_scale_N. norm_weight_E (vector plans): RMSNorm of x
    in float32, times norm_weight + norm_offset, not rounded in between. pdl: launched as a programmatic dependent; every kernel
    of the chain whose output this one reads must then be whole once its grid has ended, which is so for all that do not write
    after triggering their dependents' own completion.
    """
    rows, num_inputs = x_ME.shape
    assert x_ME.stride(1) == weight_NE.stride(1) == 1 and weight_NE.stride(0) == num_inputs
    num_outputs = weight_NE.shape[0] // (2 if activation else 1)
    if residual_MN is not None:
        y = residual_MN
    else:
        y = out_MN if out_MN is not None else x_ME.new_empty((rows, num_outputs))
    if rows > plan.block_rows:
        raise ValueError(f"{rows} rows are more than the plan's {plan.block_rows}")
    options: dict[str, object] = {"num_warps": plan.num_warps}
    if pdl:
        options["launch_pdl"] = True
    block_outputs = plan.block_n // (2 if activation else 1)
    tiles = triton.cdiv(num_outputs, block_outputs)
    # Arguments that a variant does not read still need a pointer.
    scale = x_ME if weight_scale_N is None else weight_scale_N
    bias = x_ME if bias_N is None else bias_N
    norm = x_ME if norm_weight_E is None else norm_weight_E
    shared = {
        "E": num_inputs,
        "ROWS": plan.block_rows,
        "BLOCK_N": plan.block_n,
        "BLOCK_E": plan.block_e,
        "STAGES": plan.num_stages,
        "SCALED": weight_scale_N is not None,
        "BIAS": bias_N is not None,
        "NORM": norm_weight_E is not None,
        "NORM_OFFSET": norm_offset,
        "RESIDUAL": residual_MN is not None,
        "ACTIVATION": activation,
        "PDL": pdl,
        "PREFETCH": plan.prefetch if pdl else 0,
        "TRIGGER": plan.trigger if pdl else -1,
    }
    # The stride of a single row means nothing, and must not pick another specialisation of the kernel.
    stride_x, stride_y = (x_ME.stride(0), y.stride(0)) if rows > 1 else (num_inputs, num_outputs)
    if plan.kind == "vector":
        _vector_kernel[(tiles,)](
            x_ME, weight_NE, scale, bias, norm, y, y, rows, num_outputs, stride_x, stride_y, eps,
            LANE=_LANE, **shared, **options,
        )  # fmt: skip
        return y
    if plan.kind == "stream":
        units = tiles * triton.cdiv(num_inputs, plan.block_e)
        programs = min(units, plan.splits)
        del shared["NORM"], shared["NORM_OFFSET"]
        _stream_kernel[(programs,)](
            x_ME, weight_NE, scale, bias, y, y, workspace.parts, workspace.arrived, rows, num_outputs, units,
            stride_x, stride_y, RAGGED=num_outputs % block_outputs != 0 or num_inputs % plan.block_e != 0, **shared, **options,
        )  # fmt: skip
        return y
    if norm_weight_E is not None and (plan.splits > 1 or x_ME.dtype == torch.float16):
        raise ValueError("a matrix plan has a norm only if it is not split, and in dtypes of float32's range")
    split_e = triton.cdiv(triton.cdiv(num_inputs, plan.splits), plan.block_e) * plan.block_e
    parts, arrived = (workspace.parts, workspace.arrived) if workspace is not None else (y, y)
    if plan.splits > 1:
        needed = tiles * plan.splits * plan.block_rows * plan.block_n
        if workspace is None or parts.numel() < needed or arrived.numel() < tiles:
            raise ValueError(f"a product split {plan.splits} times needs {4 * needed} bytes of workspace and {tiles} counters")
    _matrix_kernel[(plan.splits, tiles)](
        x_ME, weight_NE, scale, bias, norm, y, y, parts, arrived, rows, num_outputs, stride_x, stride_y, eps,
        SPLITS=plan.splits, SPLIT_E=split_e, **shared, **options,
    )  # fmt: skip
    return y


def skinny_linear_reference(
    x_ME: torch.Tensor,
    weight_NE: torch.Tensor,
    *,
    weight_scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    norm_weight_E: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: Activation | None = None,
    residual_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, float32 inside; the residual is not changed."""
    x, weight = x_ME.float(), weight_NE.float()
    if norm_weight_E is not None:
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * (norm_weight_E.float() + norm_offset)
    if weight_scale_N is not None:
        weight = weight * weight_scale_N.reshape(-1, 1)
    y = F.linear(x, weight, None if bias_N is None else bias_N.float()).to(x_ME.dtype)
    if activation is not None:
        gate, up = y.chunk(2, dim=1)
        y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return y if residual_MN is None else residual_MN + y
