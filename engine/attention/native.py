"""Paged attention by the compiled CPU kernels, which read pages where they lie. Layout of a page: `kernels/cpu/attention.h`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.attention.base import AttentionNeeds, LayerSpec, RaggedBatch
from engine.attention.pages import copy_pages, zero_pages, zeros
from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.cpu_ops import AttentionStruct, CpuKernels, StepRows
from engine.step import KVGroupSpec

BLOCK_SIZES = (16, 32, 64)
_MOST_HEADS = 48  # query heads of one key/value head: the rows of a tile


class NativeBackend:
    """Pages in the model's dtype, float32 or bfloat16; sums in float32. A layer's keys, or values: [blocks + 1, K, D * S]."""

    name: ClassVar[str] = "native"
    graphs: ClassVar[bool] = False

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kernels: CpuKernels | None = None,
    ) -> None:
        """kernels: those of this process, where none are given."""
        del device
        self._kernels = kernels if kernels is not None else cpu_kernels()
        self._groups = tuple(groups)
        self._dtype = dtype
        self._group_of = {index: g for g, group in enumerate(groups) for index in group.layer_indices}
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._structs = {layer.layer_index: self._struct(layer, block_size) for layer in layers}

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why it cannot serve these layers; None where it can."""
        if needs.device.type != "cpu":
            return "it runs on a CPU"
        if needs.dtype not in (torch.float32, torch.bfloat16) or needs.kv_cache_dtype != needs.dtype:
            return "it keeps pages in the model's dtype, float32 or bfloat16"
        if needs.block_size not in BLOCK_SIZES:
            return f"its pages hold {', '.join(map(str, BLOCK_SIZES))} tokens, not {needs.block_size}"
        for layer in needs.layers:
            if layer.head_dim % 16:
                return f"it needs head sizes that are multiples of 16, not {layer.head_dim}"
            if layer.num_heads // layer.num_kv_heads > _MOST_HEADS:
                return f"it takes up to {_MOST_HEADS} query heads over one key/value head"
        return unavailable_reason()

    def _struct(self, layer: LayerSpec, block_size: int) -> AttentionStruct:
        return AttentionStruct(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            block_size=block_size,
            group=self._group_of[layer.layer_index],
            window=layer.window or 0,
            is_bf16=self._dtype == torch.bfloat16,
            scaling=layer.scaling,
            softcap=layer.softcap or 0.0,
        )

    def struct(self, layer_index: int) -> AttentionStruct:
        """The layer as the kernels see it: this very object for the backend's life, whatever pages it points to."""
        return self._structs[layer_index]

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See AttentionBackend. Replaces earlier pages."""
        self._pages.clear()
        for group, count in zip(self._groups, num_blocks, strict=True):
            for index in group.layer_indices:
                struct = self._structs[index]
                shape = (count + 1, group.num_kv_heads, struct.block_size * group.head_dim)
                keys, values = (zeros(shape, self._dtype, torch.device("cpu")) for _ in range(2))
                self._pages[index] = keys, values
                struct.keys, struct.values = keys.data_ptr(), values.data_ptr()

    def prepare(self, batch: RaggedBatch) -> StepRows:
        """See AttentionBackend."""
        return StepRows.of(batch.query_lens, batch.context_lens, batch.block_tables)

    def forward(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: StepRows,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        struct = AttentionStruct.from_buffer_copy(self._structs[layer_index])
        sinks = None if sinks_H is None else sinks_H.float().contiguous()
        struct.sinks = None if sinks is None else sinks.data_ptr()
        return self._kernels.attention(struct, metadata, q_THD, k_TKD, v_TKD).to(q_THD.dtype)

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See AttentionBackend. Sources are read before any target is written."""
        copy_pages(self._groups, self._pages, copies, torch.device("cpu"))

    def zero_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """See AttentionBackend."""
        zero_pages(self._groups, self._pages, blocks, torch.device("cpu"))
