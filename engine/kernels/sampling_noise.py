"""The noise of a draw, made inside the kernels: Philox4x32-10 and the logarithm of a standard exponential, as engine/philox.py
defines them."""

from __future__ import annotations

from engine.kernels.compiler import tl, triton


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
def token_words(start, seed, output_index, TILE: tl.constexpr):
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
def log_exponential(words):
    """log E for each random word: engine.philox.log_exponential, where the clamp and the small numbers are explained."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    rest = 1.0 - u
    # -log(1 - u) = -log(rest) + what `rest` has lost of u by rounding
    return _log((u - (1.0 - rest)) - _log(rest))
