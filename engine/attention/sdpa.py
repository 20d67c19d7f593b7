"""Exact paged attention in plain torch: the default on a CPU, and everywhere the oracle that kernels are compared with.

Pages of a layer: [2, K, num_blocks + 1, block_size, D], keys then values, so that a row's pages come with one gather and a
run of neighbouring pages comes as a view, without a copy. Each row reads only the pages its queries can see, and nothing
past its own length, so that what another request left in a page never enters a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.attention.base import AttentionNeeds, LayerSpec, RaggedBatch
from engine.attention.pages import zero_pages, zeros
from engine.step import KVGroupSpec

_MAX_SCORES = 1 << 24  # scores of a row materialised at once (heads x queries x keys); the softcap and sink path slices to it


@dataclass(frozen=True, slots=True)
class RowStep:
    """One row's share of a step in one KV group.

    tokens: its new tokens among the step's. pages: a slice where the page ids are neighbours, else their ids.
    skip: positions to leave out at the front of the first page. num_keys: positions attended from there on.
    mask_QL: additive, None where every query sees every key or plain causality says it all.
    """

    tokens: slice
    pages: slice | torch.Tensor
    skip: int
    num_keys: int
    is_causal: bool
    mask_QL: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _GroupStep:
    slots_T: torch.Tensor  # flat page slot of every new token, int64
    rows: tuple[RowStep, ...]


class SdpaBackend:
    """Paged attention by `scaled_dot_product_attention`, and by explicit products where a layer has a softcap or sinks."""

    name: ClassVar[str] = "sdpa"
    graphs: ClassVar[bool] = False

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers = {layer.layer_index: layer for layer in layers}
        self._groups = tuple(groups)
        self._group_of = {index: g for g, group in enumerate(groups) for index in group.layer_indices}
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._pages: dict[int, torch.Tensor] = {}

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why it cannot serve these layers; None where it can."""
        if needs.kv_cache_dtype != needs.dtype:
            names = [str(x).removeprefix("torch.") for x in (needs.dtype, needs.kv_cache_dtype)]
            return f"it keeps pages in the model's {names[0]}, not in {names[1]}"
        return None

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See AttentionBackend. Replaces earlier pages."""
        self._pages.clear()
        for group, count in zip(self._groups, num_blocks, strict=True):
            shape = (2, group.num_kv_heads, count + 1, self._block_size, group.head_dim)
            for index in group.layer_indices:
                self._pages[index] = zeros(shape, self._dtype, self._device)

    def prepare(self, batch: RaggedBatch) -> tuple[_GroupStep, ...]:
        """Slots, pages and masks of every row, by KV group."""
        return tuple(
            self._prepare_group(batch, tables, group.window)
            for group, tables in zip(self._groups, batch.block_tables, strict=True)
        )

    def _prepare_group(self, batch: RaggedBatch, tables: list[Sequence[int]], window: int | None) -> _GroupStep:
        rows: list[RowStep] = []
        slots: list[npt.NDArray[np.int64]] = []
        first_token = 0
        for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, tables, strict=True):
            end = context_len + query_len
            block_ids = np.asarray(table[: -(-end // self._block_size)], dtype=np.int64)
            positions = np.arange(context_len, end)
            slots.append(block_ids[positions // self._block_size] * self._block_size + positions % self._block_size)
            tokens = slice(first_token, first_token + query_len)
            rows.append(self._prepare_row(tokens, context_len, block_ids, window))
            first_token = tokens.stop
        slots_T = torch.from_numpy(np.concatenate(slots)) if slots else torch.empty(0, dtype=torch.int64)
        return _GroupStep(slots_T.to(self._device), tuple(rows))

    def _prepare_row(self, tokens: slice, context_len: int, block_ids: npt.NDArray[np.int64], window: int | None) -> RowStep:
        query_len = tokens.stop - tokens.start
        end = context_len + query_len
        first_key = 0 if window is None else max(0, context_len - window + 1)  # the first query's window begins here
        first_page = first_key // self._block_size
        cut_by_window = window is not None and end - first_key > window
        is_causal = query_len > 1 and first_key == context_len == 0 and not cut_by_window
        mask_QL = None
        if query_len > 1 and not is_causal:
            mask_QL = self._mask(context_len, query_len, first_key, window)
        return RowStep(
            tokens=tokens,
            pages=self._pages_index(block_ids[first_page:]),
            skip=first_key - first_page * self._block_size,
            num_keys=end - first_key,
            is_causal=is_causal,
            mask_QL=mask_QL,
        )

    def _pages_index(self, block_ids: npt.NDArray[np.int64]) -> slice | torch.Tensor:
        if block_ids[-1] - block_ids[0] == len(block_ids) - 1 and bool((np.diff(block_ids) == 1).all()):
            return slice(int(block_ids[0]), int(block_ids[-1]) + 1)
        return torch.from_numpy(block_ids).to(self._device)

    def _mask(self, context_len: int, query_len: int, first_key: int, window: int | None) -> torch.Tensor:
        """Additive [Q, L] mask for queries at context_len .. over keys at first_key .. ."""
        end = context_len + query_len
        query_Q1 = torch.arange(context_len, end, device=self._device)[:, None]
        key_1L = torch.arange(first_key, end, device=self._device)[None, :]
        hidden = key_1L > query_Q1
        if window is not None:
            hidden |= key_1L <= query_Q1 - window
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))

    def forward(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: tuple[_GroupStep, ...],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        layer = self._layers[layer_index]
        pages = self._pages[layer_index]
        step = metadata[self._group_of[layer_index]]
        num_heads, num_kv_heads, head_dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        flat = pages.view(2, num_kv_heads, -1, head_dim)
        flat[0].index_copy_(1, step.slots_T, k_TKD.transpose(0, 1).to(pages.dtype))
        flat[1].index_copy_(1, step.slots_T, v_TKD.transpose(0, 1).to(pages.dtype))
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        grouped = (-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        q_TKGD, out_TKGD = q_THD.to(pages.dtype).reshape(grouped), out_THD.view(grouped)
        for row in step.rows:
            gathered = pages[:, :, row.pages] if isinstance(row.pages, slice) else pages.index_select(2, row.pages)
            kv = gathered.flatten(2, 3)[:, :, row.skip : row.skip + row.num_keys]
            q_KGQD = q_TKGD[row.tokens].permute(1, 2, 0, 3)
            out_TKGD[row.tokens] = self.attend_row(layer, row, q_KGQD, kv[0], kv[1], sinks_H).permute(2, 0, 1, 3)
        return out_THD

    def attend_row(
        self,
        layer: LayerSpec,
        row: RowStep,
        q_KGQD: torch.Tensor,
        k_KLD: torch.Tensor,
        v_KLD: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """[K, G, Q, D]: one row's attention over its keys and values, out of their pages already."""
        if layer.softcap is not None or sinks_H is not None:
            return _attend_explicitly(layer, row, q_KGQD, k_KLD, v_KLD, sinks_H)
        return _attend(layer, row, q_KGQD, k_KLD, v_KLD)

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See AttentionBackend. Sources are read before any target is written."""
        for g, group in enumerate(self._groups):
            pairs = [(source, target) for copied_group, source, target in copies if copied_group == g]
            if not pairs:
                continue
            sources, targets = torch.tensor(pairs, dtype=torch.int64, device=self._device).unbind(1)
            for index in group.layer_indices:
                pages = self._pages[index]
                pages.index_copy_(2, targets, pages.index_select(2, sources))

    def zero_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """See AttentionBackend."""
        pages_by_layer = {index: (pages,) for index, pages in self._pages.items()}
        zero_pages(self._groups, pages_by_layer, blocks, self._device, dim=2)


def _attend(layer: LayerSpec, row: RowStep, q_KGQD: torch.Tensor, k_KLD: torch.Tensor, v_KLD: torch.Tensor) -> torch.Tensor:
    """[K, G, Q, D]. One query: the G heads of a key head become the queries of one attention, which needs no mask."""
    if q_KGQD.shape[2] == 1:
        q_1KGD = q_KGQD.squeeze(2).unsqueeze(0)
        out_1KGD = F.scaled_dot_product_attention(q_1KGD, k_KLD.unsqueeze(0), v_KLD.unsqueeze(0), scale=layer.scaling)
        return out_1KGD.squeeze(0).unsqueeze(2)
    shape = (*q_KGQD.shape[:2], *k_KLD.shape[1:])
    return F.scaled_dot_product_attention(
        q_KGQD,
        k_KLD.unsqueeze(1).expand(shape),  # shared by stride, not copied
        v_KLD.unsqueeze(1).expand(shape),
        attn_mask=row.mask_QL,
        is_causal=row.is_causal,
        scale=layer.scaling,
    )


def _attend_explicitly(
    layer: LayerSpec, row: RowStep, q_KGQD: torch.Tensor, k_KLD: torch.Tensor, v_KLD: torch.Tensor, sinks_H: torch.Tensor | None
) -> torch.Tensor:
    """As `_attend`, with a softcap or sinks: scores in float32, by slices of queries so that memory stays bounded."""
    num_keys = k_KLD.shape[1]
    step = max(1, _MAX_SCORES // (layer.num_heads * num_keys))
    k_K1DL, v_K1LD = k_KLD.transpose(1, 2).unsqueeze(1), v_KLD.unsqueeze(1)
    parts = []
    for first in range(0, q_KGQD.shape[2], step):
        q_slice = q_KGQD[:, :, first : first + step]
        scores = torch.matmul(q_slice, k_K1DL).float() * layer.scaling
        if layer.softcap is not None:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        if row.mask_QL is not None:
            scores = scores + row.mask_QL[first : first + step]
        elif row.is_causal:
            last_key_Q1 = torch.arange(first, first + scores.shape[2], device=scores.device)[:, None]
            scores.masked_fill_(torch.arange(num_keys, device=scores.device) > last_key_Q1, float("-inf"))
        if sinks_H is None:
            weights = scores.softmax(dim=-1)
        else:
            sinks_KGQ1 = sinks_H.float().view(layer.num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks_KGQ1], dim=-1).softmax(dim=-1)[..., :-1]
        parts.append(torch.matmul(weights.to(v_KLD.dtype), v_K1LD))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
