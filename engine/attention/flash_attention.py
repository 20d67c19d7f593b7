"""Paged attention by FlashAttention-3 or -2 (Dao-AILab/flash-attention), whichever is installed and takes our pages.

Their pages are [blocks, block_size, K, D] with any strides, of which ours are a transposed view. One call serves a step's
decodes and chunks. The log-sum-exp that both return brings sinks in afterwards.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionNeeds, LayerSpec
from engine.attention.pages import PagedBackend, PagedStep, common_problem, import_problem, with_sinks
from engine.step import KVGroupSpec

_PAGE_OF_VERSION_2 = 256


class FlashAttentionBackend(PagedBackend):
    """See the module."""

    name: ClassVar[str] = "flash_attention"
    graphs: ClassVar[bool] = True

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers, groups, block_size, dtype, device)
        self._is_version_3 = _version_3_problem() is None
        module = importlib.import_module("flash_attn_interface" if self._is_version_3 else "flash_attn")
        self._function: Any = module.flash_attn_with_kvcache if self._is_version_3 else module.flash_attn_varlen_func

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why neither version can serve these layers here; None when one can."""
        why = common_problem(needs)
        if why is not None or (version_3 := _version_3_problem()) is None:
            return why
        version_2 = None
        if needs.block_size % _PAGE_OF_VERSION_2:
            version_2 = f"its pages hold a multiple of {_PAGE_OF_VERSION_2} tokens, ours {needs.block_size} (--block-size)"
        version_2 = version_2 or import_problem("flash_attn", "flash-attn", "flash_attn_varlen_func")
        return version_2 and f"of version 3, {version_3}; of version 2, {version_2}"

    def _share(self, step: PagedStep, table_RP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' page ids, and their lengths: as they are for version 3, summed up for version 2."""
        lens = step.rows.seq_lens
        return table_RP, lens if self._is_version_3 else F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))

    def attend(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: PagedStep,
        sinks_H: torch.Tensor | None = None,
        *,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See FusedAttentionBackend."""
        layer, rows = self._layers[layer_index], metadata.rows
        table_RP, lens = self._shared(layer_index, metadata)
        k_pages, v_pages = (pages.transpose(1, 2) for pages in self._pages[layer_index])
        options = {
            "softmax_scale": layer.scaling,
            "causal": True,
            "window_size": (-1, -1) if layer.window is None else (layer.window - 1, 0),
            "softcap": layer.softcap or 0.0,
        }
        if self._is_version_3:
            attended_THD, lse_HT, *_ = self._function(
                q_THD,
                k_pages,
                v_pages,
                cache_seqlens=lens,
                page_table=table_RP,
                cu_seqlens_q=rows.query_starts,
                max_seqlen_q=metadata.max_query_len,
                return_softmax_lse=True,
                **options,
            )
        else:
            attended_THD, lse_HT, _ = self._function(
                q_THD,
                k_pages,
                v_pages,
                cu_seqlens_q=rows.query_starts,
                cu_seqlens_k=lens,
                max_seqlen_q=metadata.max_query_len,
                max_seqlen_k=metadata.num_pages * self._block_size,
                block_table=table_RP,
                return_attn_probs=True,
                **options,
            )
        if sinks_H is not None:
            attended_THD = with_sinks(attended_THD, lse_HT, sinks_H)
        return attended_THD if out_THD is None else out_THD.copy_(attended_THD)


def _version_3_problem() -> str | None:
    """Why FlashAttention-3 is not to be had; None when it is."""
    why = import_problem("flash_attn_interface", "flash-attn-3", "flash_attn_with_kvcache")
    if why is None:
        function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
        if "page_table" not in inspect.signature(function).parameters:
            why = "this build has no page tables"
    return why
