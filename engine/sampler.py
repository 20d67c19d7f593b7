"""Logits to tokens: batched, on the device, the same for a row whatever its batch.

Order: logit_bias, penalties, banned and disallowed tokens, temperature, top_k, top_p (of what top_k left, renormalised), min_p;
then Gumbel-max (Maddison et al., "A* Sampling", NeurIPS 2014): argmax(logits / T - log E) draws from softmax(logits / T).
The noise is Philox keyed on the choice's seed with counter (vocabulary index // 4, output index, 0, 0), lane vocabulary
index % 4. Ties go to the lowest token id. Greedy rows take the plain argmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from engine.input_batch import FloatArray, IntArray, SamplingBatch, to_device
from engine.philox import WORD_MASK, log_exponential

NOISE_RANGE = 26.1
"""-log E of a 32-bit uniform lies in [-2.82, 22.88] (philox.log_exponential): a token this far below the best cannot win."""

_LANES = 4
_GROUPS_AT_ONCE = 65536  # on a CPU: temporaries of half a megabyte, which stay in the L2 cache
_NEGATIVE_INFINITY = float("-inf")


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Token ids, int64 [N], of float32 logits [N, V], which are overwritten."""
    _apply_biases(logits, batch)
    _apply_penalties(logits, batch)
    _apply_masks(logits, batch)
    random = np.flatnonzero(batch.temperature > 0)
    if random.size == 0:
        return logits.argmax(dim=-1)
    if random.size == batch.temperature.size:
        return _sample_random(logits, batch, random)
    token_ids = logits.argmax(dim=-1)
    rows = to_device(random, logits.device)
    token_ids[rows] = _sample_random(logits[rows], batch, random)
    return token_ids


def _sample_random(logits: torch.Tensor, batch: SamplingBatch, rows: IntArray) -> torch.Tensor:
    """Row i of `logits` belongs to row rows[i] of the batch; all have a temperature above 0."""
    device = logits.device
    scaled = logits.div_(to_device(batch.temperature[rows], device)[:, None])
    _apply_top_k_top_p(scaled, batch.top_k[rows], batch.top_p[rows])
    _apply_min_p(scaled, batch.min_p[rows])
    seed = batch.seed[rows]
    keys = np.stack([seed & np.uint64(WORD_MASK), seed >> np.uint64(32)]).astype(np.int64)
    noise_ids = to_device(np.concatenate([keys, batch.output_index[rows][None]]), device)
    if padding := -scaled.shape[1] % _LANES:
        scaled = F.pad(scaled, (0, padding), value=_NEGATIVE_INFINITY)
    choose = gumbel_argmax_pruned if device.type == "cpu" else gumbel_argmax_dense
    return choose(scaled, noise_ids)


def gumbel_argmax_dense(scaled: torch.Tensor, noise_ids: torch.Tensor) -> torch.Tensor:
    """argmax(scaled - log E), int64 [R]. scaled: [R, V], V a multiple of 4. noise_ids: key low, key high, output index, [3, R].

    Noise for every token and no synchronisation: for accelerators, and the definition of gumbel_argmax_pruned.
    """
    key_low, key_high, output_index = noise_ids[:, :, None]
    groups = torch.arange(scaled.shape[1] // _LANES, device=scaled.device)
    zero = torch.zeros_like(output_index)
    log_e = log_exponential((groups, output_index, zero, zero), (key_low, key_high))
    return (scaled - log_e.view_as(scaled)).argmax(dim=-1)


def gumbel_argmax_pruned(scaled: torch.Tensor, noise_ids: torch.Tensor) -> torch.Tensor:
    """The same result bit for bit, with noise only for the groups of four tokens of which one can still win."""
    num_rows = scaled.shape[0]
    alive = ~(scaled < scaled.amax(dim=-1, keepdim=True) - NOISE_RANGE)  # so written, a row of NaN keeps candidates
    rows, groups = torch.nonzero(alive.view(torch.int32), as_tuple=True)  # four bools at once
    scores = scaled.view(num_rows, -1, _LANES)[rows, groups]
    zero = torch.zeros(1, dtype=torch.int64)
    for start in range(0, rows.numel(), _GROUPS_AT_ONCE):
        part = slice(start, start + _GROUPS_AT_ONCE)
        key_low, key_high, output_index = noise_ids[:, rows[part]]
        scores[part] -= log_exponential((groups[part], output_index, zero, zero), (key_low, key_high))
    ends = torch.bincount(rows, minlength=num_rows).cumsum(0).tolist()
    tokens, start = [], 0
    for end in ends:
        best = int(scores[start:end].argmax())  # groups ascend within a row: the first maximum is the lowest token id
        tokens.append(int(groups[start + best // _LANES]) * _LANES + best % _LANES)
        start = end
    return torch.tensor(tokens, dtype=torch.int64)


def _apply_biases(logits: torch.Tensor, batch: SamplingBatch) -> None:
    if batch.biases:
        rows = np.concatenate([np.full(ids.size, row) for row, ids, _ in batch.biases])
        ids = np.concatenate([ids for _, ids, _ in batch.biases])
        values = np.concatenate([values for _, _, values in batch.biases])
        device = logits.device
        logits[to_device(rows, device), to_device(ids, device)] += to_device(values, device)


def _apply_penalties(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Repetition divides positive and multiplies negative logits of tokens seen; the others subtract from output tokens."""
    state = batch.penalties
    if state is None:
        return
    device = logits.device
    rows, state_rows = to_device(state.rows, device), to_device(state.state_rows, device)
    repetition, presence, frequency = (
        to_device(values[state.rows], device)[:, None]
        for values in (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
    )
    counts = state.output_counts[state_rows]
    in_output = counts > 0
    before = logits[rows]
    repeated = torch.where(before > 0, before / repetition, before * repetition)
    after = torch.where(in_output | state.prompt_seen[state_rows], repeated, before)
    logits[rows] = after - frequency * counts - presence * in_output


def _apply_masks(logits: torch.Tensor, batch: SamplingBatch) -> None:
    device = logits.device
    if batch.banned:
        rows = np.concatenate([np.full(ids.size, row) for row, ids in batch.banned])
        ids = np.concatenate([ids for _, ids in batch.banned])
        logits[to_device(rows, device), to_device(ids, device)] = _NEGATIVE_INFINITY
    if batch.allowed:
        rows = np.fromiter(batch.allowed, dtype=np.int64)
        words = to_device(np.stack(list(batch.allowed.values())), device)
        bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device) & 1
        disallowed = bits.view(len(rows), -1)[:, : logits.shape[1]] == 0
        row_index = to_device(rows, device)
        logits[row_index] = logits[row_index].masked_fill(disallowed, _NEGATIVE_INFINITY)


def _apply_top_k_top_p(scaled: torch.Tensor, top_k: IntArray, top_p: FloatArray) -> None:
    """top_k keeps tokens as good as the k-th; top_p the best whose mass reaches p, and tokens as good as the last of them."""
    vocab_size = scaled.shape[1]
    limits = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    wants_k = np.flatnonzero(limits < vocab_size)
    if wants_k.size:
        rows = to_device(wants_k, scaled.device)
        part = scaled[rows]
        best = part.topk(int(limits[wants_k].max()), dim=-1).values
        floor = best.gather(1, to_device(limits[wants_k, None] - 1, scaled.device))
        scaled[rows] = part.masked_fill(part < floor, _NEGATIVE_INFINITY)
    wants_p = np.flatnonzero(top_p < 1.0)
    if wants_p.size:
        rows = to_device(wants_p, scaled.device)
        scaled[rows] = _masked_by_top_p(scaled[rows], to_device(top_p[wants_p], scaled.device)[:, None])


def _masked_by_top_p(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    probs = scaled.softmax(dim=-1)
    width = scaled.shape[1]
    if scaled.device.type == "cpu":
        # Tokens below (1 - p) / V have less than 1 - p together, so all that is kept lies above: sort no further than that.
        # The half leaves room for rounding.
        width = max(1, int((probs >= 0.5 * (1.0 - top_p) / width).sum(dim=-1).max()))
    best = probs.topk(width, dim=-1).values
    mass_before = best.cumsum(dim=-1) - best
    num_kept = (mass_before < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
    # By value, not by id: topk breaks ties in an order that depends on the width, and so on the batch.
    return scaled.masked_fill(probs < best.gather(1, num_kept - 1), _NEGATIVE_INFINITY)


def _apply_min_p(scaled: torch.Tensor, min_p: FloatArray) -> None:
    """Keeps tokens at least min_p times as probable as the best: a threshold on logits, which needs no softmax."""
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            log_floor = to_device(np.log(min_p), scaled.device)[:, None]
        scaled.masked_fill_(scaled < scaled.amax(dim=-1, keepdim=True) + log_floor, _NEGATIVE_INFINITY)


@dataclass(slots=True)
class LogprobsTensors:
    """Logprobs of L positions: `chosen` [L], `ranks` [L] (1 is best), the best tokens `top_ids` and `top_values` [L, k]."""

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_best: int) -> LogprobsTensors:
    """log_softmax of raw float32 logits [L, V] at `token_ids` [L] and at the `num_best` best tokens."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_best, logprobs.shape[1]), dim=-1)
    return LogprobsTensors(chosen[:, 0], ranks, top.indices, top.values)
