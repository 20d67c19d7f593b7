"""Philox4x32-10, the counter-based random generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

The same key and counter give the same four words everywhere: no state, no order, no dependence on the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four random words a counter, from words below 2**32: all int64 tensors, or numpy uint64 arrays and plain ints.

    They broadcast against each other; the rounds mix all of them, so every result has the broadcast shape. There is no
    unsigned 32-bit arithmetic in torch: words travel in 64 bits and are cut to 32 where a product follows.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index > 0:
            # The key's carry past 32 bits is harmless: the mask below removes it after the xor.
            k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
        # Products wrap modulo 2**64, and only their 64 bits are looked at, so the sign of int64 does not matter.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & WORD_MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & WORD_MASK
        c1, c3 = product1, product0
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def log_exponential(words: torch.Tensor) -> torch.Tensor:
    """log E of a standard exponential E for each random word, given as float32 and overwritten.

    u = (word + 0.5) / 2**32 and E = -log1p(-u): near 0, where a token wins its place (Gumbel noise is -log E), float32
    tells apart what 32 bits tell apart. Near 1 u would round to 1 and E to infinity, so u stops one float below.
    """
    u = words.add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_()


def token_noise(groups: torch.Tensor, output_index: torch.Tensor, key: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """log E of the tokens 4 * group .. + 3 in a new last dimension; int64 tensors that broadcast against each other."""
    zero = torch.zeros_like(output_index)
    words = philox4x32((groups, output_index, zero, zero), key)
    return log_exponential(torch.stack(words, dim=-1).to(torch.float32))


def token_noise_on_host(groups: npt.NDArray[np.uint64], output_index: int, seed: int) -> torch.Tensor:
    """The same for one row on a CPU, float32 [G, 4]: numpy's integer arithmetic is several times faster there than torch's."""
    words = philox4x32((groups, output_index, 0, 0), (seed & WORD_MASK, seed >> 32))
    lanes = np.empty((groups.size, 4), dtype=np.uint32)
    for lane, word in enumerate(words):
        lanes[:, lane] = word
    return log_exponential(torch.from_numpy(lanes.astype(np.float32)))
