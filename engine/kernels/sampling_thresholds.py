"""The thresholds of top_k, top_p and min_p: logits above which are exactly the tokens that they keep, found without a sort."""

from __future__ import annotations

from engine.kernels.compiler import tl, triton


@triton.jit
def scaled(logits, temperature, inverse):
    """logits / temperature, rounded as a division rounds it, given 1 / temperature."""
    quotient = logits * inverse
    corrected = tl.fma(tl.fma(-quotient, temperature, logits), inverse, quotient)
    return tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)


@triton.jit
def load_tile(row_ptr, start, vocab_size, TILE: tl.constexpr):
    """Logits of tokens start .. as float32 [TILE / 8, 8], +inf for NaN and -inf past the end, and the token ids."""
    tokens = start + tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logits < float("inf"), logits, float("inf")), tokens


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
def depth_below(value, temperature, dtype: tl.constexpr):
    """A logit below which no mass matters, given one that won a draw: it is at most sampler.NOISE_RANGE below the best."""
    return _from_key(_to_key(value - 40.0 * temperature, dtype), dtype)


@triton.jit
def above_min_p(logits, best, min_p, temperature, inverse):
    floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
    return scaled(logits, temperature, inverse) >= scaled(best, temperature, inverse) + floor


@triton.jit
def _survey(row_ptr, vocab_size, value, to_log2, x0, x1, x2, x3, TILE: tl.constexpr):
    """Masses and counts of the tokens above each of four logits, and the best logit. A token like `value` has mass 1."""
    m0 = tl.zeros((TILE // 8,), tl.float32)
    m1, m2, m3 = m0, m0, m0
    n0 = tl.zeros((TILE // 8,), tl.int32)
    n1, n2, n3 = n0, n0, n0
    best = tl.full((TILE // 8,), float("-inf"), tl.float32)
    ahead, _ = load_tile(row_ptr, 0, vocab_size, TILE)
    for start in range(0, vocab_size, TILE):
        logits = ahead
        ahead, _ = load_tile(row_ptr, start + TILE, vocab_size, TILE)
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
def find_threshold(
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
def find_floor(row_ptr, vocab_size, value, depth, to_log2, top_k, top_p, TILE: tl.constexpr):
    """A logit above which are exactly the tokens that top_k and top_p keep, and the best logit. `value` won a draw, and nothing
    below `depth` has any mass beside it."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    floor = tl.full((), float("-inf"), tl.float32)
    mass_above, mass, _, _, count_above, count, _, _, best = _survey(
        row_ptr, vocab_size, value, to_log2, value, depth, value, value, TILE
    )
    if (top_k > 0) & (top_k < count):
        # The k-th token lies above `value` or between it and `depth`.
        is_above = count_above >= top_k
        floor, mass, count = find_threshold(
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
            floor, mass, count = find_threshold(
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
    return floor, best
