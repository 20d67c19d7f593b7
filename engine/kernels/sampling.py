"""Logits to tokens without a sort and without a wait: Gumbel-max draws, top_k, top_p and min_p by rejection.

A draw is argmax(logits / T - log E), E standard exponentials from Philox4x32-10 keyed on (seed, output index, token), as
engine/sampler.py defines it. top_k, top_p and min_p each keep the tokens above some threshold, so whether a token is kept
follows from one pass that counts and weighs the tokens above it. Hence: draw from all tokens; check the winner; where it
falls out, draw again among the tokens above it (with the same noise, so this is the draw among the kept ones) and check
again; rows still open find their thresholds by bisection. Most rows are done after the first check.
The idea of rejection in place of sorting is that of FlashInfer's sampling kernels (2024).

The kernels are in sampling_kernels.py, their noise in sampling_noise.py, the search for thresholds in sampling_thresholds.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.kernels.compiler import triton
from engine.kernels.sampling_kernels import check_kernel, draw_kernel, finish_kernel
from engine.step import BAD_TOKEN

_TILE = 2048
"""Tokens a program takes. The same for every batch, because sums over a row are made from sums over tiles."""

_STATISTICS = 8
"""Numbers that a checked tile leaves behind, padded to a power of two."""

_NEVER = -(2**63)


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
        draw_kernel[(tiles, num_rows)](
            *logits, *rows, *results, workspace.best, workspace.arrived, MODE=mode, AGAIN=again, TILE=_TILE, num_warps=8
        )

    def check() -> None:
        check_kernel[(tiles, num_rows)](
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
        finish_kernel[(num_rows,)](*logits, *rows, *results, TILE=4096, num_warps=16)


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
