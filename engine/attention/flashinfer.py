"""Paged attention by FlashInfer (https://docs.flashinfer.ai/api/attention.html): decodes by its batch-decode wrapper, chunks
by its batch-prefill wrapper.

A wrapper plans from lengths on the host, once a step and KV group, never once a layer. The plan holds for one step, so forward
cannot be captured. Its kernels are compiled by nvcc at their first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from engine.attention.base import AttentionNeeds, DeviceRows, LayerSpec, RaggedBatch
from engine.attention.pages import PagedBackend, common_problem, import_problem, to_device
from engine.step import KVGroupSpec

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


@dataclass(frozen=True, slots=True)
class _Step:
    """The step's rows; by KV group, the wrappers that were planned for its decodes and its chunks, None where it has none."""

    rows: DeviceRows
    decodes: list[Any]
    chunks: list[Any]


class FlashInferBackend(PagedBackend):
    """See the module."""

    name: ClassVar[str] = "flashinfer"
    graphs: ClassVar[bool] = False

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers, groups, block_size, dtype, device)
        flashinfer = importlib.import_module("flashinfer")
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decoders = [
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True) for _ in groups
        ]
        self._prefillers = [flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND") for _ in groups]

    @classmethod
    def unusable(cls, needs: AttentionNeeds) -> str | None:
        """Why FlashInfer cannot serve these layers here; None when it can."""
        why = common_problem(needs, head_dims=(64, 128, 256), sinks=False)
        why = why or import_problem("flashinfer", "flashinfer-python", "BatchDecodeWithPagedKVCacheWrapper")
        if why is None and not _has_nvcc() and importlib.util.find_spec("flashinfer_jit_cache") is None:
            why = "it compiles its kernels, and neither nvcc nor flashinfer-jit-cache is installed"
        members = {layer.layer_index: (layer.num_heads, layer.scaling, layer.softcap) for layer in needs.layers}
        if why is None and any(len({members[index] for index in group.layer_indices}) > 1 for group in needs.groups):
            why = "it plans once for all layers of a group, and they differ in heads, scaling or soft cap"
        return why

    def prepare(self, batch: RaggedBatch) -> _Step:  # type: ignore[override]
        """See AttentionBackend. Tables are cut to what the first query's window sees: only distances matter to the mask."""
        assert batch.device is not None, "flashinfer takes the step's tokens from the device"
        num_decodes = min(batch.device.num_decodes, len(batch.query_lens))
        step = _Step(batch.device, [], [])
        for g, tables in enumerate(batch.block_tables):
            for first, last, planned in ((0, num_decodes, step.decodes), (num_decodes, len(tables), step.chunks)):
                planned.append(self._plan(g, batch, tables, first, last, planned is step.decodes) if first < last else None)
        return step

    def _plan(self, g: int, batch: RaggedBatch, tables: list[Sequence[int]], first: int, last: int, is_decode: bool) -> Any:
        """A wrapper ready for rows first .. last - 1."""
        group, size = self._groups[g], self._block_size
        layer = self._layers[group.layer_indices[0]]
        contexts = np.array(batch.context_lens[first:last])
        ends = contexts + np.array(batch.query_lens[first:last])
        first_keys = 0 if group.window is None else np.maximum(contexts - group.window + 1, 0)
        first_pages = np.broadcast_to(first_keys // size, ends.shape)
        counts = -(-ends // size) - first_pages
        indices = np.concatenate(
            [np.asarray(tables[first + row][p : p + n]) for row, (p, n) in enumerate(zip(first_pages, counts, strict=True))]
        )
        indptr, last_page_lens, starts = (
            torch.from_numpy(x.astype(np.int32)) for x in (_starts(counts), (ends - 1) % size + 1, _starts(ends - contexts))
        )
        options = {
            "window_left": -1 if group.window is None else group.window - 1,
            "logits_soft_cap": layer.softcap,
            "sm_scale": layer.scaling,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }
        page_ids = to_device(indices.astype(np.int32), self._device)
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, size)
        if is_decode:
            wrapper = self._decoders[g]
            wrapper.plan(indptr, page_ids, last_page_lens, *shape, **options)
        else:
            wrapper = self._prefillers[g]
            wrapper.plan(starts, indptr, page_ids, last_page_lens, *shape, causal=True, **options)
        return wrapper

    def attend(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: _Step,
        sinks_H: torch.Tensor | None = None,
        *,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See FusedAttentionBackend."""
        assert sinks_H is None, "FlashInfer's decodes are run without sinks"
        g, num_decodes = self._group_of[layer_index], metadata.rows.num_decodes
        q_THD = q_THD.contiguous()
        out_THD = torch.zeros_like(q_THD) if out_THD is None else out_THD
        for wrapper, tokens in (
            (metadata.decodes[g], slice(0, num_decodes)),
            (metadata.chunks[g], slice(num_decodes, None)),
        ):
            if wrapper is not None:
                wrapper.run(q_THD[tokens], self._pages[layer_index], out=out_THD[tokens])
        return out_THD


def _has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


def _starts(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[R + 1]: where each row begins when rows of these counts follow one another."""
    return np.concatenate([[0], np.cumsum(counts)])
