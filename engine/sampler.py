"""Logits to tokens: batched, on the device, the same for a row whatever its batch.

Order: logit_bias, penalties, banned and disallowed tokens, temperature, top_k, top_p (of what top_k left, renormalised), min_p,
typical_p (of what these left, renormalised; transformers has the same order); then Gumbel-max (Maddison et al., "A* Sampling",
NeurIPS 2014): argmax(logits / T - log E) draws from softmax(logits / T).
The noise is Philox keyed on the choice's seed with counter (vocabulary index // 4, output index, 0, 0), lane vocabulary
index % 4. Ties go to the lowest token id. Greedy rows take the plain argmax.

A row with a logit that is NaN or +inf, or without any that is finite, has no token: it gets BAD_TOKEN, which costs no wait for
the device, and tells the scheduler to end the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from engine.philox import WORD_MASK, token_noise, token_noise_on_host
from engine.sampling_slots import FloatArray, SamplingBatch, SeedArray
from engine.step import BAD_TOKEN
from engine.step_feed import to_device
from engine.token_masks import IntArray

NOISE_RANGE = 26.1
"""-log E of a 32-bit uniform lies in [-2.82, 22.88] (philox.log_exponential): a token this far below the best cannot win."""

_LANES = 4
_NEGATIVE_INFINITY = float("-inf")


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Token ids, int64 [N], of float32 logits [N, V], which are overwritten."""
    edit(logits, batch)
    token_ids = _argmax(logits)
    is_sound = _soundness(logits, token_ids)
    random = np.flatnonzero(batch.temperature > 0)
    if random.size == batch.temperature.size:
        token_ids = _sample_random(logits, batch, random)
    elif random.size:
        rows = to_device(random, logits.device)
        token_ids[rows] = _sample_random(logits[rows], batch, random)
    return token_ids if is_sound is None else torch.where(is_sound, token_ids, BAD_TOKEN)


def edit(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """In place, all that comes before the temperature: what is left is for the sampling kernel, where there is one."""
    _apply_biases(logits, batch)
    _apply_penalties(logits, batch)
    _apply_masks(logits, batch)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Of each row, the lowest index where several are best. On a CPU by numpy, which takes a tenth of torch's time."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.device.type == "cpu" else logits.argmax(dim=-1)


def _soundness(logits: torch.Tensor, best_ids: torch.Tensor) -> torch.Tensor | None:
    """Whether each row has numbers to choose by; None where a CPU knows that all have.

    NaN passes for the greatest of numbers in an argmax, so the best logit tells of the whole row.
    """
    if logits.device.type != "cpu":
        return logits.gather(1, best_ids[:, None])[:, 0].isfinite()
    is_finite = np.isfinite(logits.numpy()[np.arange(len(logits)), best_ids.numpy()])
    return None if is_finite.all() else torch.from_numpy(is_finite)


def _sample_random(logits: torch.Tensor, batch: SamplingBatch, rows: IntArray) -> torch.Tensor:
    """Row i of `logits` belongs to row rows[i] of the batch; all have a temperature above 0."""
    device = logits.device
    scaled = logits.div_(to_device(batch.temperature[rows], device)[:, None])
    _apply_top_k_top_p(scaled, batch.top_k[rows], batch.top_p[rows])
    _apply_min_p(scaled, batch.min_p[rows])
    _apply_typical_p(scaled, batch.typical_p[rows])
    if padding := -scaled.shape[1] % _LANES:
        scaled = F.pad(scaled, (0, padding), value=_NEGATIVE_INFINITY)
    choose = gumbel_argmax_pruned if device.type == "cpu" else gumbel_argmax_dense
    return choose(scaled, batch.seed[rows], batch.output_index[rows])


def gumbel_argmax_dense(scaled: torch.Tensor, seeds: SeedArray, output_index: IntArray) -> torch.Tensor:
    """argmax(scaled - log E), int64 [R], of scaled [R, V], V a multiple of 4, with seeds and output indices [R].

    Noise for every token and no synchronisation: for accelerators, and the definition of gumbel_argmax_pruned.
    """
    keys = np.stack([seeds & np.uint64(WORD_MASK), seeds >> np.uint64(32)]).astype(np.int64)
    noise_ids = to_device(np.concatenate([keys, output_index[None]]), scaled.device)
    key_low, key_high, index = noise_ids[:, :, None]
    groups = torch.arange(scaled.shape[1] // _LANES, device=scaled.device)
    return (scaled - token_noise(groups, index, (key_low, key_high)).view_as(scaled)).argmax(dim=-1)


def gumbel_argmax_pruned(scaled: torch.Tensor, seeds: SeedArray, output_index: IntArray) -> torch.Tensor:
    """The same bit for bit on a CPU, with noise only for the groups of four tokens of which one can still win."""
    tokens = []
    for row, seed, index in zip(scaled, seeds.tolist(), output_index.tolist(), strict=True):
        alive = ~(row < row.max() - NOISE_RANGE)  # so written, a row of NaN keeps candidates
        groups = torch.nonzero(alive.view(torch.int32))[:, 0]  # four bools at once
        scores = row.view(-1, _LANES)[groups] - token_noise_on_host(groups.numpy().view(np.uint64), index, seed)
        best = int(scores.argmax())  # groups ascend: the first maximum is the lowest token id
        tokens.append(int(groups[best // _LANES]) * _LANES + best % _LANES)
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
        # A tensor, because assigning a plain number through an index waits for the device.
        index = to_device(rows, device), to_device(ids, device)
        logits.index_put_(index, logits.new_full((), _NEGATIVE_INFINITY))
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
        part = scaled[rows]
        probs = part.softmax(dim=-1)
        floor = _top_p_floors(probs, top_p[wants_p])
        # By value, not by rank: which of two equal tokens a sort puts first may depend on the batch.
        scaled[rows] = part.masked_fill(probs < floor[:, None], _NEGATIVE_INFINITY)


def _top_p_floors(probs: torch.Tensor, top_p: FloatArray) -> torch.Tensor:
    """The probability of the last token that top_p keeps, [R]."""
    if probs.device.type == "cpu":
        return torch.tensor([_top_p_floor(row, p) for row, p in zip(probs.numpy(), top_p.tolist(), strict=True)])
    best = probs.sort(dim=-1, descending=True).values
    short_of_p = _running_sums(best)[:, :-1] < to_device(top_p, probs.device)[:, None]
    return best.gather(1, short_of_p.sum(dim=-1, keepdim=True))[:, 0]


def _top_p_floor(probs: FloatArray, top_p: float) -> float:
    # Tokens below (1 - p) / V have less than 1 - p together, so all that is kept lies above. The half is for rounding.
    best = np.sort(probs[probs >= 0.5 * (1.0 - top_p) / probs.size])[::-1]
    return float(best[np.count_nonzero(np.cumsum(best)[:-1] < top_p)]) if best.size else 0.0


def _apply_min_p(scaled: torch.Tensor, min_p: FloatArray) -> None:
    """Keeps tokens at least min_p times as probable as the best: a threshold on logits, which needs no softmax."""
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            log_floor = to_device(np.log(min_p), scaled.device)[:, None]
        scaled.masked_fill_(scaled < scaled.amax(dim=-1, keepdim=True) + log_floor, _NEGATIVE_INFINITY)


def _apply_typical_p(scaled: torch.Tensor, typical_p: FloatArray) -> None:
    """Locally typical sampling (Meister et al., TACL 2023, arXiv 2202.00666): keeps the tokens whose surprise -log p is closest
    to the expected one, the entropy, until their mass reaches typical_p, and those as close as the last of them. The best token
    may go."""
    wants = np.flatnonzero(typical_p < 1.0)
    if not wants.size:
        return
    rows = to_device(wants, scaled.device)
    part = scaled[rows]
    logprobs = part.log_softmax(dim=-1)
    probs = logprobs.exp()
    entropy = _running_sums(torch.special.entr(probs))[:, -1:]
    distance = (logprobs + entropy).abs()  # infinite where a token is out already
    nearest, order = distance.sort(dim=-1, stable=True)
    mass = _running_sums(probs.gather(1, order))
    short_of_p = mass[:, :-1] < to_device(typical_p[wants], scaled.device)[:, None]
    limit = nearest.gather(1, short_of_p.sum(dim=-1, keepdim=True))
    scaled[rows] = part.masked_fill(distance > limit, _NEGATIVE_INFINITY)


def _running_sums(values: torch.Tensor) -> torch.Tensor:
    """values [R, N] summed up along N, each row in the same order whatever R: torch chooses its own by the number of rows."""
    step = 1
    while step < values.shape[1]:
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], dim=1)
        step *= 2
    return values


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
