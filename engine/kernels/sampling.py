"""Logits to tokens without a sort and without a wait: Gumbel-max draws, top_k, top_p and min_p by rejection.

A draw is argmax(logits / T - log E), E standard exponentials from Philox4x32-10 keyed on (seed, output index, token), as
engine/sampler.py defines it. top_k, top_p and min_p each keep the tokens above some threshold, so whether a token is kept
follows from one pass that counts and weighs the tokens above it. Hence: draw from all tokens; check the winner; where it
falls out, draw again among the tokens above it (with the same noise, so this is the draw among the kept ones) and check
again; rows still open find their thresholds by bisection. Most rows are done after the first check.
The idea of rejection in place of sorting is that of FlashInfer's sampling kernels (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.kernels.compiler import HAS_TRITON, tl, triton
from engine.step import BAD_TOKEN

_TILE = 2048
"""Tokens a program takes. The same for every batch, because sums over a row are made from sums over tiles."""

_STATISTICS = 8
"""Numbers that a checked tile leaves behind, padded to a power of two."""

_NEVER = -(2**63)

# Where a row of a filtered step stands.
_DONE, _DRAWN, _REJECTED, _OPEN = (tl.constexpr(state) if HAS_TRITON else state for state in range(4))

_BAD_TOKEN = tl.constexpr(BAD_TOKEN) if HAS_TRITON else BAD_TOKEN
_HIGHEST = tl.constexpr(3.4028234663852886e38) if HAS_TRITON else 3.4028234663852886e38  # of finite float32


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """What sampling knows of each slot, on the device: temperature, top_p, min_p float32 [S], top_k int32 [S], seed int64
    [S] (the 64 bits of the choice's seed), output_index int32 [S], which advances by one with every token drawn."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    output_index: torch.Tensor

    @classmethod
    def create(cls, num_slots: int, device: torch.device) -> SamplingColumns:
        """Greedy slots."""
        floats = torch.zeros(3, num_slots, device=device)
        ints = torch.zeros(2, num_slots, dtype=torch.int32, device=device)
        floats[1] = 1.0
        seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        return cls(floats[0].clone(), ints[0].clone(), floats[1].clone(), floats[2].clone(), seed, ints[1].clone())


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Scratch of sample_tokens for up to B rows; every launch leaves it as it found it.

    best, arrived: int64, int32 [B]. states: int32 [B]. floors: float32 [B]. statistics: float32 [B, tiles, 8].
    """

    best: torch.Tensor
    arrived: torch.Tensor
    states: torch.Tensor
    floors: torch.Tensor
    statistics: torch.Tensor

    @classmethod
    def create(cls, max_rows: int, vocab_size: int, device: torch.device) -> SamplingWorkspace:
        tiles = -(-vocab_size // _TILE)
        return cls(
            torch.full((max_rows,), _NEVER, dtype=torch.int64, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
            torch.zeros(max_rows, device=device),
            torch.zeros(max_rows, tiles, _STATISTICS, device=device),
        )


def sample_tokens(
    logits_BV: torch.Tensor,
    row_slots_B: torch.Tensor,
    params: SamplingColumns,
    out_B: torch.Tensor,
    last_token_S: torch.Tensor,
    *,
    workspace: SamplingWorkspace,
    mode: str,
) -> None:
    """A token for each row, into out_B[row] and last_token_S[slot] (int64); the slot's output index advances.

    logits_BV: any float type, rows may be strided. row_slots_B: int32, -1 for padding rows, which write nothing.
    mode: the most that any row asks for: "greedy", "random" (a temperature) or "filtered" (top_k, top_p, min_p as well).
    Ties go to the lowest token id. A row with NaN or +inf, or without a finite logit, gets BAD_TOKEN, and its slot token 0 for
    its last: the next step may read it before the host knows.
    """
    num_rows, vocab_size = logits_BV.shape
    assert mode in ("greedy", "random", "filtered") and logits_BV.stride(1) == 1
    if num_rows == 0:
        return
    logits = logits_BV, vocab_size, logits_BV.stride(0)
    rows = row_slots_B, params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.output_index
    results = out_B, last_token_S, workspace.states, workspace.floors
    tiles = triton.cdiv(vocab_size, _TILE)

    def draw(again: bool) -> None:
        _draw_kernel[(tiles, num_rows)](
            *logits, *rows, *results, workspace.best, workspace.arrived, MODE=mode, AGAIN=again, TILE=_TILE, num_warps=8
        )

    def check() -> None:
        _check_kernel[(tiles, num_rows)](
            *logits,
            *rows,
            *results,
            workspace.statistics,
            workspace.arrived,
            TILE=_TILE,
            TILES=triton.next_power_of_2(tiles),
            num_warps=4,
        )

    draw(again=False)
    if mode == "filtered":
        check()
        draw(again=True)
        check()
        _finish_kernel[(num_rows,)](*logits, *rows, *results, TILE=4096, num_warps=16)


def sample_tokens_reference(
    logits_BV: torch.Tensor,
    log_exponentials_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    min_p_B: torch.Tensor,
) -> torch.Tensor:
    """The token of each row, int64 [B], in plain torch and by sorting; the noise log E [B, V] is given."""
    tokens = []
    for row, noise, temperature, top_k, top_p, min_p in zip(
        logits_BV.float(), log_exponentials_BV, temperature_B, top_k_B, top_p_B, min_p_B, strict=True
    ):
        if not row.max().isfinite():
            tokens.append(torch.tensor(BAD_TOKEN, device=row.device))
            continue
        if temperature == 0:
            tokens.append(row.argmax())
            continue
        scaled = row / temperature
        if 0 < top_k < row.numel():
            scaled = scaled.masked_fill(scaled < scaled.topk(int(top_k)).values[-1], -math.inf)
        if top_p < 1:
            probs = scaled.softmax(dim=0)
            best = probs.sort(descending=True).values
            scaled = scaled.masked_fill(probs < best[(best.cumsum(0)[:-1] < top_p).sum()], -math.inf)
        if min_p > 0:
            scaled = scaled.masked_fill(scaled < scaled.max() + min_p.log(), -math.inf)
        tokens.append((scaled - noise).argmax())
    return torch.stack(tokens)


# -- noise ------------------------------------------------------------------------------------------------------------


@triton.jit
def _philox(c0, c1, k0, k1):
    """Four words of Philox4x32-10 for counters (c0, c1, 0, 0), uint32 in and out; shapes broadcast."""
    c2 = tl.full((), 0, tl.uint32)
    c3 = c2
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _token_words(start, seed, output_index, TILE: tl.constexpr):
    """The random words of tokens start .. start + TILE - 1, uint32 [TILE / 8, 8]; start is a multiple of 8."""
    groups = start // 4 + tl.arange(0, TILE // 8)[:, None] * 2 + tl.arange(0, 2)[None, :]
    key_low, key_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(groups.to(tl.uint32), output_index.to(tl.uint32), key_low, key_high)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (TILE // 8, 8))


@triton.jit
def _log(x):
    """The natural logarithm of normal positive float32 numbers to about one unit in the last place, without branches."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # so that the mantissa lies in [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # (log(1 + f) - f) / f ** 2, fitted for the least relative error of the logarithm
    p = tl.fma(f, 0.1437405884911526, -0.15372527754403098)
    p = tl.fma(f, p, 0.13920940574722532)
    p = tl.fma(f, p, -0.16419394866747558)
    p = tl.fma(f, p, 0.200160575332522)
    p = tl.fma(f, p, -0.25007596046314534)
    p = tl.fma(f, p, 0.33333106397453405)
    p = tl.fma(f, p, -0.49999940213228167)
    return tl.fma(exponent.to(tl.float32) * 1.1920928955078125e-07, 0.6931471805599453, tl.fma(f * p, f, f))


@triton.jit
def _log_exponential(words):
    """log E for each random word: engine.philox.log_exponential, where the clamp and the small numbers are explained."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    rest = 1.0 - u
    # -log(1 - u) = -log(rest) + what `rest` has lost of u by rounding
    return _log((u - (1.0 - rest)) - _log(rest))


# -- pieces of the kernels --------------------------------------------------------------------------------------------


@triton.jit
def _scale(logits, temperature, inverse):
    """logits / temperature, rounded as a division rounds it, given 1 / temperature."""
    quotient = logits * inverse
    corrected = tl.fma(tl.fma(-quotient, temperature, logits), inverse, quotient)
    return tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)


@triton.jit
def _load_tile(row_ptr, start, vocab_size, TILE: tl.constexpr):
    """Logits of tokens start .. as float32 [TILE / 8, 8], +inf for NaN and -inf past the end, and the token ids."""
    tokens = start + tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logits < float("inf"), logits, float("inf")), tokens


@triton.jit
def _pack(scores, tokens):
    """int64 that order by score, then by lowest token id."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are one number
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def _best_of_tile(scores, tokens):
    """The best score of a tile and its lowest token, packed."""
    best = tl.max(scores)
    return _pack(best, tl.min(tl.where(scores == best, tokens, 0x7FFFFFFF)))


@triton.jit
def _token_of(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def _is_sound(packed):
    """Whether the best score of a row is a finite number."""
    high = packed >> 32
    return (high < 0x7F800000) & (high > -0x7F800001)


@triton.jit
def _emit(token, row, slot, out_ptr, last_token_ptr, output_index_ptr):
    tl.store(out_ptr + row, token.to(tl.int64))
    tl.store(last_token_ptr + slot, tl.maximum(token, 0).to(tl.int64))
    tl.store(output_index_ptr + slot, tl.load(output_index_ptr + slot) + 1)


@triton.jit
def _has_filter(slot, vocab_size, temperature, top_k_ptr, top_p_ptr, min_p_ptr):
    top_k = tl.load(top_k_ptr + slot)
    limited = ((top_k > 0) & (top_k < vocab_size)) | (tl.load(top_p_ptr + slot) < 1.0) | (tl.load(min_p_ptr + slot) > 0.0)
    return limited & (temperature > 0.0)


@triton.jit
def _to_key(value, dtype: tl.constexpr):
    """Integers in the order of the numbers of `dtype`, int64: neighbours differ by one. From float32, rounded to dtype."""
    if dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    else:
        bits = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int64)


@triton.jit
def _from_key(key, dtype: tl.constexpr):
    bits = key.to(tl.int32)
    if dtype == tl.float32:
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        return (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _depth(value, temperature, dtype: tl.constexpr):
    """A logit below which no mass matters, given one that won a draw: it is at most sampler.NOISE_RANGE below the best."""
    return _from_key(_to_key(value - 40.0 * temperature, dtype), dtype)


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _draw_kernel(
    logits_ptr,
    vocab_size,
    row_stride,
    row_slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    output_index_ptr,
    out_ptr,
    last_token_ptr,
    states_ptr,
    floors_ptr,
    best_ptr,
    arrived_ptr,
    MODE: tl.constexpr,
    AGAIN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The best token of a tile of a row; the last tile of a row to arrive emits the row's, or leaves it to be checked.

    AGAIN: only rows whose token was rejected, among the tokens above it.
    """
    row = tl.program_id(1)
    slot = tl.load(row_slots_ptr + row)
    if slot < 0:
        return
    floor = float("-inf")
    if AGAIN:
        floor = tl.load(floors_ptr + row)
        if tl.load(states_ptr + row) != _REJECTED:
            return
    start = tl.program_id(0) * TILE
    scores, tokens = _load_tile(logits_ptr + row.to(tl.int64) * row_stride, start, vocab_size, TILE)
    if AGAIN:
        scores = tl.where(scores > floor, scores, float("-inf"))
    temperature = 0.0
    if MODE != "greedy":
        temperature = tl.load(temperature_ptr + slot)
        if temperature > 0.0:
            words = _token_words(start, tl.load(seed_ptr + slot), tl.load(output_index_ptr + slot), TILE)
            noisy = _scale(scores, temperature, tl.div_rn(1.0, temperature)) - _log_exponential(words)
            # A small temperature makes no logit infinite: only those are that were.
            bounded = tl.minimum(tl.maximum(noisy, -_HIGHEST), _HIGHEST)
            scores = tl.where(tl.abs(scores) < float("inf"), bounded, scores)
    tl.atomic_max(best_ptr + row, _best_of_tile(scores, tokens), sem="relaxed")
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        best = tl.atomic_xchg(best_ptr + row, -0x8000000000000000, sem="relaxed")
        is_sound = _is_sound(best)
        token = tl.where(is_sound, _token_of(best), _BAD_TOKEN)
        tl.store(arrived_ptr + row, 0)
        if MODE == "filtered":
            if is_sound & _has_filter(slot, vocab_size, temperature, top_k_ptr, top_p_ptr, min_p_ptr):
                tl.store(out_ptr + row, token)
                tl.store(states_ptr + row, _DRAWN)
            else:
                tl.store(states_ptr + row, _DONE)
                _emit(token, row, slot, out_ptr, last_token_ptr, output_index_ptr)
        else:
            _emit(token, row, slot, out_ptr, last_token_ptr, output_index_ptr)


@triton.jit
def _check_kernel(
    logits_ptr,
    vocab_size,
    row_stride,
    row_slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    output_index_ptr,
    out_ptr,
    last_token_ptr,
    states_ptr,
    floors_ptr,
    statistics_ptr,
    arrived_ptr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Counts and weighs the tokens above a row's drawn token, tile by tile; the last tile to arrive accepts or rejects it."""
    row = tl.program_id(1)
    slot = tl.load(row_slots_ptr + row)
    if slot < 0:
        return
    if tl.load(states_ptr + row) != _DRAWN:
        return
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + slot)
    token = tl.load(out_ptr + row)
    value = tl.load(row_ptr + token).to(tl.float32)
    depth = _depth(value, temperature, logits_ptr.dtype.element_ty)
    logits, _ = _load_tile(row_ptr, tl.program_id(0) * TILE, vocab_size, TILE)
    weights = tl.exp2((logits - value) * (1.4426950408889634 / temperature))
    above, from_here, deep = logits > value, logits >= value, logits > depth

    tile_ptr = statistics_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(tile_ptr, tl.sum(tl.where(above, weights, 0.0)))
    tl.store(tile_ptr + 1, tl.sum(tl.where(from_here, weights, 0.0)))
    tl.store(tile_ptr + 2, tl.sum(tl.where(deep, weights, 0.0)))
    tl.store(tile_ptr + 3, tl.sum(above.to(tl.int32)).to(tl.float32))
    tl.store(tile_ptr + 4, tl.sum(deep.to(tl.int32)).to(tl.float32))
    tl.store(tile_ptr + 5, tl.max(logits))
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived_ptr + row, 0)
        tiles = tl.arange(0, TILES)
        tile_ptrs = statistics_ptr + (row * tl.num_programs(0) + tiles) * 8
        there = tiles < tl.num_programs(0)
        # Past the first-level cache, which does not see what other programs wrote.
        mass_above = tl.sum(tl.load(tile_ptrs, mask=there, other=0.0, cache_modifier=".cg"))
        mass_from_here = tl.sum(tl.load(tile_ptrs + 1, mask=there, other=0.0, cache_modifier=".cg"))
        mass = tl.sum(tl.load(tile_ptrs + 2, mask=there, other=0.0, cache_modifier=".cg"))
        count_above = tl.sum(tl.load(tile_ptrs + 3, mask=there, other=0.0, cache_modifier=".cg"))
        count = tl.sum(tl.load(tile_ptrs + 4, mask=there, other=0.0, cache_modifier=".cg"))
        best = tl.max(tl.load(tile_ptrs + 5, mask=there, other=float("-inf"), cache_modifier=".cg"))

        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot)
        limits_k = (top_k > 0) & (top_k < vocab_size)
        inverse = tl.div_rn(1.0, temperature)
        in_k = (count_above < top_k) | (limits_k == 0)
        in_min_p = _above_min_p(value, best, tl.load(min_p_ptr + slot), temperature, inverse)
        # top_p is of the mass that top_k leaves, which is not known here where top_k leaves less than all: it lies between
        # the token's own and everything.
        least_mass = tl.where(limits_k & (count > top_k), mass_from_here, mass)
        in_p = (mass_above < top_p * least_mass) | (top_p >= 1.0)
        out_of_p = (mass_above >= top_p * mass) & (top_p < 1.0)
        if in_k & in_min_p & in_p:
            tl.store(states_ptr + row, _DONE)
            _emit(token, row, slot, out_ptr, last_token_ptr, output_index_ptr)
        else:
            rejected = (in_k == 0) | (in_min_p == 0) | out_of_p
            tl.store(states_ptr + row, tl.where(rejected, _REJECTED, _OPEN))
            tl.store(floors_ptr + row, value)


@triton.jit
def _above_min_p(logits, best, min_p, temperature, inverse):
    floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
    return _scale(logits, temperature, inverse) >= _scale(best, temperature, inverse) + floor


@triton.jit
def _survey(row_ptr, vocab_size, value, to_log2, x0, x1, x2, x3, TILE: tl.constexpr):
    """Masses and counts of the tokens above each of four logits, and the best logit. A token like `value` has mass 1."""
    m0 = tl.zeros((TILE // 8,), tl.float32)
    m1, m2, m3 = m0, m0, m0
    n0 = tl.zeros((TILE // 8,), tl.int32)
    n1, n2, n3 = n0, n0, n0
    best = tl.full((TILE // 8,), float("-inf"), tl.float32)
    ahead, _ = _load_tile(row_ptr, 0, vocab_size, TILE)
    for start in range(0, vocab_size, TILE):
        logits = ahead
        ahead, _ = _load_tile(row_ptr, start + TILE, vocab_size, TILE)
        weights = tl.exp2((logits - value) * to_log2)
        m0 += tl.sum(tl.where(logits > x0, weights, 0.0), axis=1)
        m1 += tl.sum(tl.where(logits > x1, weights, 0.0), axis=1)
        m2 += tl.sum(tl.where(logits > x2, weights, 0.0), axis=1)
        m3 += tl.sum(tl.where(logits > x3, weights, 0.0), axis=1)
        n0 += tl.sum((logits > x0).to(tl.int32), axis=1)
        n1 += tl.sum((logits > x1).to(tl.int32), axis=1)
        n2 += tl.sum((logits > x2).to(tl.int32), axis=1)
        n3 += tl.sum((logits > x3).to(tl.int32), axis=1)
        best = tl.maximum(best, tl.max(logits, axis=1))
    return tl.sum(m0), tl.sum(m1), tl.sum(m2), tl.sum(m3), tl.sum(n0), tl.sum(n1), tl.sum(n2), tl.sum(n3), tl.max(best)


@triton.jit
def _narrow(key, mass, count, limit, low, high, low_mass, low_count, high_count, BY_COUNT: tl.constexpr):
    """The bracket (low, high] of the threshold after looking at `key`, above which are `mass` and `count`."""
    if BY_COUNT:
        below_threshold = count >= limit
    else:
        below_threshold = mass >= limit
    raises = below_threshold & (key > low)
    lowers = (below_threshold == 0) & (key < high)
    low_mass, low_count = tl.where(raises, mass, low_mass), tl.where(raises, count, low_count)
    high_count = tl.where(lowers, count, high_count)
    return tl.where(raises, key, low), tl.where(lowers, key, high), low_mass, low_count, high_count


@triton.jit
def _find(
    row_ptr,
    vocab_size,
    value,
    to_log2,
    limit,
    low,
    high,
    low_mass,
    low_count,
    high_count,
    BY_COUNT: tl.constexpr,
    TILE: tl.constexpr,
):
    """A logit above which are exactly the tokens that top_k (BY_COUNT) or top_p keep, and their mass and number.

    The worst kept token lies in (low, high], that is, the count or mass above `low` reaches the limit and above `high` does
    not. Each turn looks at the quarters of the bracket, and at the number halfway between its ends in the order of
    representable numbers, which ends the search whatever the logits.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    low_key, high_key = _to_key(low, dtype), _to_key(high, dtype)
    open_ = (high_key - low_key > 1) & (low_count - high_count > 1)
    while open_:
        low, high = _from_key(low_key, dtype), _from_key(high_key, dtype)
        step = (high - low) * 0.25
        k0 = tl.minimum(tl.maximum(_to_key(low + step, dtype), low_key + 1), high_key - 1)
        k1 = tl.minimum(tl.maximum(_to_key(low + step * 2.0, dtype), low_key + 1), high_key - 1)
        k2 = tl.minimum(tl.maximum(_to_key(low + step * 3.0, dtype), low_key + 1), high_key - 1)
        k3 = low_key + (high_key - low_key) // 2
        m0, m1, m2, m3, n0, n1, n2, n3, _ = _survey(
            row_ptr,
            vocab_size,
            value,
            to_log2,
            _from_key(k0, dtype),
            _from_key(k1, dtype),
            _from_key(k2, dtype),
            _from_key(k3, dtype),
            TILE,
        )
        low_key, high_key, low_mass, low_count, high_count = _narrow(
            k0, m0, n0, limit, low_key, high_key, low_mass, low_count, high_count, BY_COUNT
        )
        low_key, high_key, low_mass, low_count, high_count = _narrow(
            k1, m1, n1, limit, low_key, high_key, low_mass, low_count, high_count, BY_COUNT
        )
        low_key, high_key, low_mass, low_count, high_count = _narrow(
            k2, m2, n2, limit, low_key, high_key, low_mass, low_count, high_count, BY_COUNT
        )
        low_key, high_key, low_mass, low_count, high_count = _narrow(
            k3, m3, n3, limit, low_key, high_key, low_mass, low_count, high_count, BY_COUNT
        )
        open_ = (high_key - low_key > 1) & (low_count - high_count > 1)
        if BY_COUNT:
            open_ = open_ & (low_count > limit)
    return _from_key(low_key, dtype), low_mass, low_count


@triton.jit
def _finish_kernel(
    logits_ptr,
    vocab_size,
    row_stride,
    row_slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    output_index_ptr,
    out_ptr,
    last_token_ptr,
    states_ptr,
    floors_ptr,
    TILE: tl.constexpr,
):
    """One program a row: the rows that two draws left open find their thresholds, and draw among the tokens above them."""
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    if slot < 0:
        return
    if tl.load(states_ptr + row) == _DONE:
        return
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + slot)
    inverse = tl.div_rn(1.0, temperature)
    to_log2 = 1.4426950408889634 / temperature
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    value = tl.load(floors_ptr + row)
    depth = _depth(value, temperature, dtype)
    floor = tl.full((), float("-inf"), tl.float32)

    mass_above, mass, _, _, count_above, count, _, _, best = _survey(
        row_ptr, vocab_size, value, to_log2, value, depth, value, value, TILE
    )
    if (top_k > 0) & (top_k < count):
        # The k-th token lies above `value` or between it and `depth`.
        is_above = count_above >= top_k
        floor, mass, count = _find(
            row_ptr,
            vocab_size,
            value,
            to_log2,
            top_k,
            tl.where(is_above, value, depth),
            tl.where(is_above, best, value),
            tl.where(is_above, mass_above, mass),
            tl.where(is_above, count_above, count),
            tl.where(is_above, 0, count_above),
            True,
            TILE,
        )
    if top_p < 1.0:
        limit = top_p * mass
        if (mass_above >= limit) | (value <= floor):
            # `value` is out: the threshold lies above it, and above what top_k gave.
            by_value = value > floor
            floor, mass, count = _find(
                row_ptr,
                vocab_size,
                value,
                to_log2,
                limit,
                tl.where(by_value, value, floor),
                best,
                tl.where(by_value, mass_above, mass),
                tl.where(by_value, count_above, count),
                tl.full((), 0, tl.int32),
                False,
                TILE,
            )
        else:
            # Nothing below `value` can win, which won against it.
            floor = _from_key(_to_key(value, dtype) - 1, dtype)

    seed = tl.load(seed_ptr + slot)
    output_index = tl.load(output_index_ptr + slot)
    winner = tl.full((), -0x8000000000000000, tl.int64)
    for start in range(0, vocab_size, TILE):
        logits, tokens = _load_tile(row_ptr, start, vocab_size, TILE)
        kept = (logits > floor) & _above_min_p(logits, best, min_p, temperature, inverse)
        words = _token_words(start, seed, output_index, TILE)
        scores = _scale(logits, temperature, inverse) - _log_exponential(words)
        winner = tl.maximum(winner, _best_of_tile(tl.where(kept, scores, float("-inf")), tokens))
    tl.store(states_ptr + row, _DONE)
    _emit(_token_of(winner), row, slot, out_ptr, last_token_ptr, output_index_ptr)
