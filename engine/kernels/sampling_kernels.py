"""The kernels of sampling: a draw, the check of its winner, and what is left of the rows that two draws leave open.

`sampling` says how they play together, and launches them.
"""

from __future__ import annotations

from engine.kernels.compiler import HAS_TRITON, tl, triton
from engine.kernels.sampling_noise import log_exponential, token_words
from engine.kernels.sampling_thresholds import above_min_p, depth_below, find_floor, load_tile, scaled
from engine.step import BAD_TOKEN

# Where a row of a filtered step stands.
_DONE, _DRAWN, _REJECTED, _OPEN = (tl.constexpr(state) if HAS_TRITON else state for state in range(4))

_BAD_TOKEN = tl.constexpr(BAD_TOKEN) if HAS_TRITON else BAD_TOKEN
_HIGHEST = tl.constexpr(3.4028234663852886e38) if HAS_TRITON else 3.4028234663852886e38  # of finite float32


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
def draw_kernel(
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
    scores, tokens = load_tile(logits_ptr + row.to(tl.int64) * row_stride, start, vocab_size, TILE)
    if AGAIN:
        scores = tl.where(scores > floor, scores, float("-inf"))
    temperature = 0.0
    if MODE != "greedy":
        temperature = tl.load(temperature_ptr + slot)
        if temperature > 0.0:
            words = token_words(start, tl.load(seed_ptr + slot), tl.load(output_index_ptr + slot), TILE)
            noisy = scaled(scores, temperature, tl.div_rn(1.0, temperature)) - log_exponential(words)
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
def _store_statistics(statistics_ptr, row, logits, weights, value, depth):
    """What the check asks of a tile: masses above `value`, from it on and above `depth`, two counts, the best logit."""
    above, from_here, deep = logits > value, logits >= value, logits > depth
    tile_ptr = statistics_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(tile_ptr, tl.sum(tl.where(above, weights, 0.0)))
    tl.store(tile_ptr + 1, tl.sum(tl.where(from_here, weights, 0.0)))
    tl.store(tile_ptr + 2, tl.sum(tl.where(deep, weights, 0.0)))
    tl.store(tile_ptr + 3, tl.sum(above.to(tl.int32)).to(tl.float32))
    tl.store(tile_ptr + 4, tl.sum(deep.to(tl.int32)).to(tl.float32))
    tl.store(tile_ptr + 5, tl.max(logits))


@triton.jit
def _sum_statistics(statistics_ptr, row, TILES: tl.constexpr):
    """The same of a row, from all its tiles."""
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
    return mass_above, mass_from_here, mass, count_above, count, best


@triton.jit
def check_kernel(
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
    depth = depth_below(value, temperature, logits_ptr.dtype.element_ty)
    logits, _ = load_tile(row_ptr, tl.program_id(0) * TILE, vocab_size, TILE)
    weights = tl.exp2((logits - value) * (1.4426950408889634 / temperature))
    _store_statistics(statistics_ptr, row, logits, weights, value, depth)
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived_ptr + row, 0)
        mass_above, mass_from_here, mass, count_above, count, best = _sum_statistics(statistics_ptr, row, TILES)
        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot)
        limits_k = (top_k > 0) & (top_k < vocab_size)
        inverse = tl.div_rn(1.0, temperature)
        in_k = (count_above < top_k) | (limits_k == 0)
        in_min_p = above_min_p(value, best, tl.load(min_p_ptr + slot), temperature, inverse)
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
def finish_kernel(
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
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + slot)
    inverse = tl.div_rn(1.0, temperature)
    to_log2 = 1.4426950408889634 / temperature
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    value = tl.load(floors_ptr + row)
    depth = depth_below(value, temperature, logits_ptr.dtype.element_ty)
    floor, best = find_floor(row_ptr, vocab_size, value, depth, to_log2, top_k, top_p, TILE)

    seed = tl.load(seed_ptr + slot)
    output_index = tl.load(output_index_ptr + slot)
    winner = tl.full((), -0x8000000000000000, tl.int64)
    for start in range(0, vocab_size, TILE):
        logits, tokens = load_tile(row_ptr, start, vocab_size, TILE)
        kept = (logits > floor) & above_min_p(logits, best, min_p, temperature, inverse)
        words = token_words(start, seed, output_index, TILE)
        scores = scaled(logits, temperature, inverse) - log_exponential(words)
        winner = tl.maximum(winner, _best_of_tile(tl.where(kept, scores, float("-inf")), tokens))
    tl.store(states_ptr + row, _DONE)
    _emit(_token_of(winner), row, slot, out_ptr, last_token_ptr, output_index_ptr)
