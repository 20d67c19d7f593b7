"""Paged attention by torch's own `varlen_attn`, which takes a block table from 2.12 on, through FlashAttention-3 only
(https://docs.pytorch.org/docs/main/nn.attention.varlen.html)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.attention.base import AttentionNeeds, LayerSpec
from engine.attention.pages import PagedBackend, PagedStep, common_problem, import_problem
from engine.step import KVGroupSpec


class TorchVarlenBackend(PagedBackend):
    """See the module. Makes FlashAttention-3 the flash attention of this process, which is torch's way of reaching it."""

    name: ClassVar[str] = "torch_varlen"
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
        importlib.import_module("torch.nn.attention").activate_flash_attention_impl("FA3")
        self._function = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why torch cannot serve these layers here; None when it can."""
        why = common_problem(needs, capability=(9, 0), softcap=False, sinks=False)
        if why is None and torch.cuda.get_device_capability(needs.device)[0] != 9:
            why = "FlashAttention-3 is reached through torch on compute capability 9 only"
        if why is None and not _has_block_table():
            why = f"torch {torch.__version__} has no block table in varlen_attn; 2.12 and later have one"
        return why or import_problem("flash_attn_interface", "flash-attn-3", "flash_attn_with_kvcache")

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
        assert sinks_H is None, "varlen_attn has no sinks"
        layer, rows = self._layers[layer_index], metadata.rows
        k_pages, v_pages = (pages.transpose(1, 2) for pages in self._pages[layer_index])
        attended_THD: torch.Tensor = self._function(
            q_THD,
            k_pages,
            v_pages,
            rows.query_starts,
            None,
            metadata.max_query_len,
            metadata.num_pages * self._block_size,
            scale=layer.scaling,
            window_size=(-1 if layer.window is None else layer.window - 1, 0),
            enable_gqa=True,
            seqused_k=rows.seq_lens,
            block_table=self._shared(layer_index, metadata),
        )
        return attended_THD if out_THD is None else out_THD.copy_(attended_THD)


def _has_block_table() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return "block_table" in inspect.signature(function).parameters
