"""Attention in plain torch, to be read: as it is defined, and by tiles with an online softmax, as the kernels compute it.

Attention weighs values by softmax(q k^T) (https://arxiv.org/abs/1706.03762). As it is written down, that takes a matrix of
scores with a row for each query and a column for each key: memory grows with the square of the length. But of a row, softmax
needs only the largest score and the sum of all exponentials, and both can be kept up to date while the keys come by
(https://arxiv.org/abs/1805.02867). For a query that has seen some keys, with maximum m, sum l and weighted values o, a tile of
further keys with scores s and values v gives

    m' = max(m, max(s))
    l' = l exp(m - m') + sum(exp(s - m'))
    o' = o exp(m - m') + exp(s - m') v

and after the last tile o / l is the result: not an approximation, the same sum in another order. So only one tile of scores
exists at any moment, small enough for the fast memory of a multiprocessor or a core (FlashAttention,
https://arxiv.org/abs/2205.14135), and memory grows with the length alone. The order of the loops, all keys for a tile of
queries and the division at the end, is that of FlashAttention-2 (algorithm 1 of https://arxiv.org/abs/2307.08691).

The references of the paged kernels (`prefill_attention_reference`, `decode_attention_reference`) are `tiled_attention` over
keys and values gathered from their pages, and it is tested against `standard_attention` and torch's own.
"""

from __future__ import annotations

import torch

TILE = 256
"""Queries, and keys, of a tile. For these functions it only has to be large enough to make torch's calls worth their while."""


def standard_attention(
    q_QHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    *,
    scaling: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """[Q, H, D] in q's dtype, with all [H, Q, N] scores in memory at once. Arguments as in `tiled_attention`."""
    num_queries, num_heads, head_dim = q_QHD.shape
    num_keys, num_kv_heads, _ = k_NKD.shape
    q_KGQD = _by_kv_head(q_QHD, num_kv_heads)
    scores_KGQN = torch.einsum("kgqd,nkd->kgqn", q_KGQD * scaling, k_NKD)
    if softcap is not None:
        scores_KGQN = softcap * torch.tanh(scores_KGQN / softcap)
    visible_QN = _visible(range(num_queries), range(num_keys), num_keys - num_queries, is_causal, window, q_QHD.device)
    if visible_QN is not None:
        scores_KGQN.masked_fill_(~visible_QN, float("-inf"))
        v_NKD = v_NKD.masked_fill(~visible_QN.any(dim=0)[:, None, None], 0.0)
    if sinks_H is not None:
        sinks_KGQ1 = sinks_H.to(q_QHD.dtype).view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_queries, 1)
        weights_KGQN = torch.softmax(torch.cat([scores_KGQN, sinks_KGQ1], dim=-1), dim=-1)[..., :-1]
    else:
        weights_KGQN = torch.softmax(scores_KGQN, dim=-1)
    del scores_KGQN
    out_KGQD = torch.einsum("kgqn,nkd->kgqd", weights_KGQN, v_NKD)
    return out_KGQD.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def tiled_attention(
    q_QHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    *,
    scaling: float,
    is_causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """[Q, H, D] in q's dtype; sums in float32, or in float64 where that is q's dtype.

    Q queries at the last Q of N positions, whose keys and values these are; H a multiple of K, each key head serves H / K
    query heads in a row. is_causal: a query sees no later position. window, softcap, sinks_H: see LayerSpec.
    """
    sums_dtype = torch.promote_types(q_QHD.dtype, torch.float32)
    out_QHD = torch.empty_like(q_QHD)
    num_queries, num_keys = len(q_QHD), len(k_NKD)
    context = num_keys - num_queries
    for first in range(0, num_queries, tile):
        queries = range(first, min(first + tile, num_queries))
        begin = 0 if window is None else max(0, context + queries.start + 1 - window)
        end = context + queries.stop if is_causal else num_keys
        rows = _Rows(q_QHD[queries.start : queries.stop].to(sums_dtype) * scaling, k_NKD.shape[1], sinks_H)
        for first_key in range(begin, end, tile):
            keys = range(first_key, min(first_key + tile, end))
            rows.take(
                k_NKD[keys.start : keys.stop].to(sums_dtype),
                v_NKD[keys.start : keys.stop].to(sums_dtype),
                _visible(queries, keys, context, is_causal, window, q_QHD.device),
                softcap,
            )
        out_QHD[queries.start : queries.stop] = rows.result()
    return out_QHD


class _Rows:
    """A tile of M queries on their way along the keys: the module's m, l and o. sinks: keys of the given score without a
    value, seen before all others."""

    def __init__(self, q_MHD: torch.Tensor, num_kv_heads: int, sinks_H: torch.Tensor | None) -> None:
        self._q_KGMD = _by_kv_head(q_MHD, num_kv_heads)
        shape = self._q_KGMD.shape[:-1]
        if sinks_H is None:
            self._maximum_KGM = q_MHD.new_full(shape, float("-inf"))
            self._sum_KGM = q_MHD.new_zeros(shape)
        else:
            self._maximum_KGM = sinks_H.to(q_MHD.dtype).view(num_kv_heads, -1, 1).expand(shape)
            self._sum_KGM = q_MHD.new_ones(shape)
        self._out_KGMD = torch.zeros_like(self._q_KGMD)

    def take(self, k_NKD: torch.Tensor, v_NKD: torch.Tensor, visible_MN: torch.Tensor | None, softcap: float | None) -> None:
        """Let the queries see a tile of keys, or those that are visible to each."""
        scores_KGMN = torch.einsum("kgmd,nkd->kgmn", self._q_KGMD, k_NKD)
        if softcap is not None:
            scores_KGMN = softcap * torch.tanh(scores_KGMN / softcap)
        if visible_MN is not None:
            scores_KGMN.masked_fill_(~visible_MN, float("-inf"))
            # What nobody sees may be anything, and zero times that is not always zero.
            v_NKD = v_NKD.masked_fill(~visible_MN.any(dim=0)[:, None, None], 0.0)
        maximum_KGM = torch.maximum(self._maximum_KGM, scores_KGMN.amax(dim=-1))
        # A query that has seen no key yet has no maximum to subtract: all its exponentials are zero.
        subtracted_KGM = maximum_KGM.masked_fill(maximum_KGM == float("-inf"), 0.0)
        weights_KGMN = torch.exp(scores_KGMN - subtracted_KGM[..., None])
        shrink_KGM = torch.exp(self._maximum_KGM - subtracted_KGM)
        self._sum_KGM = self._sum_KGM * shrink_KGM + weights_KGMN.sum(dim=-1)
        self._out_KGMD = self._out_KGMD * shrink_KGM[..., None] + torch.einsum("kgmn,nkd->kgmd", weights_KGMN, v_NKD)
        self._maximum_KGM = maximum_KGM

    def result(self) -> torch.Tensor:
        """[M, H, D]."""
        out_KGMD = self._out_KGMD / self._sum_KGM[..., None]
        return out_KGMD.permute(2, 0, 1, 3).flatten(1, 2)


def _by_kv_head(q_QHD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[K, G, Q, D]: the queries of the heads that share a key head stand together."""
    q_QKGD: torch.Tensor = q_QHD.unflatten(1, (num_kv_heads, -1))
    return q_QKGD.permute(1, 2, 0, 3)


def _visible(
    queries: range, keys: range, context: int, is_causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which of these keys each of these queries sees, bool [queries, keys]; None where all see all."""
    sees_last = not is_causal or keys.stop - 1 <= context + queries.start
    sees_first = window is None or keys.start > context + queries.stop - 1 - window
    if sees_last and sees_first:
        return None
    query_at_Q1 = context + torch.arange(queries.start, queries.stop, device=device)[:, None]
    key_at_N = torch.arange(keys.start, keys.stop, device=device)
    newest_Q1 = query_at_Q1 if is_causal else torch.full_like(query_at_Q1, keys.stop)
    visible_QN: torch.Tensor = key_at_N <= newest_Q1
    if window is not None:
        visible_QN &= key_at_N > query_at_Q1 - window
    return visible_QN
