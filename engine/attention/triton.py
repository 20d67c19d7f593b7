"""Paged attention by our own Triton kernels: the default on a GPU.

Pages of a layer: keys and values, each [num_blocks + 1, K, block_size, D], so that one head's page is one contiguous run. A
step's decodes and chunks go to two kernels on two streams: a chunk's program fills a multiprocessor, so the chunks take over
one after the other as the decodes leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionNeeds, DeviceRows, FusedRotation, LayerSpec, RaggedBatch
from engine.attention.pages import copy_pages, zero_pages
from engine.kernels.compiler import HAS_TRITON
from engine.kernels.decode_attention import DecodeTiles, DecodeWorkspace, paged_decode_attention, plan_decode
from engine.kernels.prefill_attention import (
    PrefillWorkspace,
    paged_prefill_attention,
    plan_prefill,
    queries_per_tile,
    wants_workspace,
)
from engine.kernels.rotary import write_kv
from engine.step import KVGroupSpec

_INTERPRETED: dict[str, Any] = {"tiles": DecodeTiles(16, 1, 1, 1), "multiprocessors": 4}  # on a CPU, for tests
_GATHERED_TOKENS = 16384  # of long contexts, copied out of their pages once a layer: 64 MB for 8 heads of 128 in bfloat16
_FP8_SCALE = 1.0  # keys and values of the models served lie well within e4m3's +-448


@dataclass(frozen=True, slots=True)
class _Chunks:
    """A step's prompt chunks: rows, and host-made tiles by KV group, on the device."""

    row_slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    tiles: tuple[torch.Tensor, ...]
    any_context: bool


@dataclass(frozen=True, slots=True)
class TritonStep:
    """What all layers of a step share."""

    rows: DeviceRows
    num_decodes: int
    chunks: _Chunks | None


class TritonBackend:
    """See AttentionBackend. kv_dtype: of the pages; torch.float8_e4m3fn stores FP8 and computes in `dtype`."""

    name: ClassVar[str] = "triton"
    graphs: ClassVar[bool] = True

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kv_dtype: torch.dtype | None = None,
        max_num_seqs: int = 256,
    ) -> None:
        self._layers = {layer.layer_index: layer for layer in layers}
        self._groups = tuple(groups)
        self._group_of = {index: g for g, group in enumerate(groups) for index in group.layer_indices}
        self._block_size = block_size
        self._kv_dtype = kv_dtype or dtype
        self._device = device
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        scale = torch.full((1,), _FP8_SCALE, dtype=torch.float32, device=device)
        self._scale = scale if self._kv_dtype == torch.float8_e4m3fn else None
        self._heads = tuple(self._layers[group.layer_indices[0]].num_heads for group in groups)
        self._decode_workspaces = tuple(
            DecodeWorkspace.make(
                max_num_seqs,
                heads,
                group.head_dim,
                device,
                num_kv_heads=group.num_kv_heads,
                block_size=block_size,
                element_bytes=self._kv_dtype.itemsize,
                **({} if device.type == "cuda" else _INTERPRETED),
            )
            for group, heads in zip(groups, self._heads, strict=True)
        )
        self._prefill_workspaces = tuple(
            PrefillWorkspace.allocate(_GATHERED_TOKENS, group.num_kv_heads, group.head_dim, dtype, device)
            if wants_workspace(group.head_dim, dtype, self._kv_dtype, block_size, device)
            else None
            for group in groups
        )
        self._tile_queries = tuple(
            queries_per_tile(group.head_dim, heads // group.num_kv_heads, dtype, device)
            for group, heads in zip(groups, self._heads, strict=True)
        )
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._events = (torch.cuda.Event(), torch.cuda.Event()) if device.type == "cuda" else None

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why these kernels cannot serve these layers; None where they can."""
        if not HAS_TRITON:
            return "Triton is not installed"
        if needs.device.type != "cuda":
            return "its kernels run on CUDA devices"
        if torch.cuda.get_device_capability(needs.device) < (8, 0):
            return "its kernels need an Ampere card (compute capability 8.0) or a later one"
        if needs.dtype not in (torch.float16, torch.bfloat16):
            return f"its kernels compute in float16 or bfloat16, not {str(needs.dtype).removeprefix('torch.')}"
        if needs.kv_cache_dtype != needs.dtype and torch.cuda.get_device_capability(needs.device) < (8, 9):
            return "pages in FP8 need an Ada or Hopper card (compute capability 8.9) or a later one"
        wide = [layer.head_dim for layer in needs.layers if layer.head_dim > 256]
        return f"heads of {wide[0]} channels are wider than its 256" if wide else None

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See AttentionBackend. Replaces earlier pages."""
        self._pages.clear()
        for group, count in zip(self._groups, num_blocks, strict=True):
            shape = (2, count + 1, group.num_kv_heads, self._block_size, group.head_dim)
            for index in group.layer_indices:
                pages = torch.zeros(shape, dtype=self._kv_dtype, device=self._device)
                self._pages[index] = (pages[0], pages[1])

    def prepare(self, batch: RaggedBatch) -> TritonStep:
        """Plans how the decodes are split, on the device, and how the chunks are tiled, on the host."""
        rows = batch.device
        assert rows is not None, "this backend takes a step's rows from the device"
        decodes = rows.num_decodes
        if decodes:
            for group, workspace in zip(self._groups, self._decode_workspaces, strict=True):
                plan_decode(workspace, rows.row_slots[:decodes], rows.seq_lens[:decodes], window=group.window)
        chunks = None
        if len(batch.query_lens) > decodes:
            queries, contexts = batch.query_lens[decodes:], batch.context_lens[decodes:]
            chunks = _Chunks(
                row_slots=rows.row_slots[decodes:],
                query_starts=rows.query_starts[decodes:],
                context_lens=rows.context_lens[decodes:],
                tiles=tuple(
                    self._to_device(plan_prefill(queries, contexts, block_m, group.window))
                    for group, block_m in zip(self._groups, self._tile_queries, strict=True)
                ),
                any_context=any(contexts),
            )
        return TritonStep(rows, decodes, chunks)

    def _to_device(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def rotate_and_write(self, rotation: FusedRotation, qkv: torch.Tensor, rows: DeviceRows) -> None:
        """See FusedAttentionBackend."""
        index = rotation.index
        table = rows.block_tables[self._group_of[index]]
        scales = (self._scale, self._scale)
        rotation.rotate(qkv, rows.positions, rows.token_slots, table, self._pages[index], scales)

    def forward(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: TritonStep,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        rows = metadata.rows
        write_kv(
            k_TKD,
            v_TKD,
            rows.positions,
            rows.token_slots,
            rows.block_tables[self._group_of[layer_index]],
            *self._pages[layer_index],
            k_scale=self._scale,
            v_scale=self._scale,
        )
        return self.attend(layer_index, q_THD, k_TKD, v_TKD, metadata, sinks_H)

    def attend(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: TritonStep,
        sinks_H: torch.Tensor | None = None,
        *,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward`, with the step's keys and values in their pages already; into out_THD where given."""
        if out_THD is None:
            out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if metadata.num_decodes == 0:
            self._prefill(layer_index, q_THD, k_TKD, v_TKD, out_THD, metadata, sinks_H)
        elif metadata.chunks is None:
            self._decode(layer_index, q_THD, out_THD, metadata, sinks_H)
        elif self._side_stream is None or self._events is None:
            self._decode(layer_index, q_THD, out_THD, metadata, sinks_H)
            self._prefill(layer_index, q_THD, k_TKD, v_TKD, out_THD, metadata, sinks_H)
        else:
            main = torch.cuda.current_stream(self._device)
            fork, join = self._events
            fork.record(main)
            self._side_stream.wait_event(fork)
            with torch.cuda.stream(self._side_stream):
                self._decode(layer_index, q_THD, out_THD, metadata, sinks_H)
                join.record(self._side_stream)
            self._prefill(layer_index, q_THD, k_TKD, v_TKD, out_THD, metadata, sinks_H)
            main.wait_event(join)
        return out_THD

    def _decode(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        out_THD: torch.Tensor,
        step: TritonStep,
        sinks_H: torch.Tensor | None,
    ) -> None:
        layer, group, count = self._layers[layer_index], self._group_of[layer_index], step.num_decodes
        paged_decode_attention(
            q_THD[:count],
            *self._pages[layer_index],
            step.rows.block_tables[group],
            step.rows.row_slots[:count],
            step.rows.seq_lens[:count],
            out_THD[:count],
            workspace=self._decode_workspaces[group],
            scaling=layer.scaling,
            window=layer.window,
            softcap=layer.softcap,
            sinks_H=sinks_H,
            k_scale=self._scale,
            v_scale=self._scale,
        )

    def _prefill(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        out_THD: torch.Tensor,
        step: TritonStep,
        sinks_H: torch.Tensor | None,
    ) -> None:
        layer, chunks, group = self._layers[layer_index], step.chunks, self._group_of[layer_index]
        assert chunks is not None
        paged_prefill_attention(
            q_THD,
            k_TKD,
            v_TKD,
            *self._pages[layer_index],
            step.rows.block_tables[group],
            chunks.row_slots,
            chunks.query_starts,
            chunks.context_lens,
            chunks.tiles[group],
            out_THD,
            scaling=layer.scaling,
            window=layer.window,
            softcap=layer.softcap,
            sinks_H=sinks_H,
            k_scale=self._scale,
            v_scale=self._scale,
            workspace=self._prefill_workspaces[group] if chunks.any_context else None,
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See AttentionBackend."""
        copy_pages(self._groups, self._pages, copies, self._device)

    def zero_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """See AttentionBackend."""
        zero_pages(self._groups, self._pages, blocks, self._device)
