"""Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

The same key and counter give the same four words everywhere: no state, no order, no dependence on the batch. torch has no
unsigned 32-bit arithmetic, so words travel in int64 and are cut to 32 bits where a product follows.
"""

from __future__ import annotations

import torch

WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four random words a counter. All tensors are int64 with values below 2**32 and broadcast against each other;
    the rounds mix all of them, so every result has the broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index > 0:
            # The key's carry past 32 bits is harmless: the mask below removes it after the xor.
            k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
        # int64 products wrap modulo 2**64, so both halves are right although the sign is not.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & WORD_MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & WORD_MASK
        c1, c3 = product1, product0
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def log_exponential(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """log E of four standard exponentials a counter, float32, lanes in a new last dimension.

    u = (word + 0.5) / 2**32 and E = -log1p(-u): near 0, where a token wins its place (Gumbel noise is -log E), float32
    keeps every one of the 2**32 values. Near 1 u would round to 1 and E to infinity, so u stops one float below.
    """
    words = torch.stack(philox4x32(counter, key), dim=-1)
    u = words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_()
