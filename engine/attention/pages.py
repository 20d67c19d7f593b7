"""What the backends that call other people's kernels share: pages, how they are written and copied, and a step's tables.

Pages of a layer: keys and values, each [num_blocks + 1, K, block_size, D] in the model's dtype, page 0 scratch. Those kernels
mask scores, not values, past a row's length or before its window; pages therefore start as zeros, and a page that held bad
numbers is zeroed before reuse.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionNeeds, DeviceRows, FusedRotation, LayerSpec, RaggedBatch
from engine.kernels.compiler import HAS_TRITON
from engine.kernels.rotary import write_kv, write_kv_reference
from engine.step import KVGroupSpec


@dataclass(slots=True)
class PagedStep:
    """One step for kernels that take one table a row.

    max_query_len: tokens of the longest row. num_pages: columns of the tables that any row reads; all there are in a step of
    decodes alone, which may be captured and then replayed for longer rows. shared: by KV group, what the group's first
    layer makes for all of its layers on the device, where it is part of what is captured.
    """

    rows: DeviceRows
    max_query_len: int
    num_pages: int
    shared: dict[int, Any] = field(default_factory=dict)


class PagedBackend:
    """Pages in our layout, whoever's kernels attend to them; see AttentionBackend."""

    name: ClassVar[str]
    graphs: ClassVar[bool]

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
        self._pages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """See AttentionBackend. Replaces earlier pages."""
        self._pages.clear()
        for group, count in zip(self._groups, num_blocks, strict=True):
            shape = (count + 1, group.num_kv_heads, self._block_size, group.head_dim)
            for index in group.layer_indices:
                keys, values = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
                self._pages[index] = keys, values

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """See AttentionBackend."""
        copy_pages(self._groups, self._pages, copies, self._device)

    def zero_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """See AttentionBackend."""
        zero_pages(self._groups, self._pages, blocks, self._device)

    def prepare(self, batch: RaggedBatch) -> PagedStep:
        """See AttentionBackend."""
        rows = batch.device
        assert rows is not None, f"{self.name} takes the step's rows from the device"
        num_pages = rows.block_tables[0].shape[1]
        if rows.num_decodes == rows.row_slots.shape[0]:
            return PagedStep(rows, 1, num_pages)
        longest = max(query + context for query, context in zip(batch.query_lens, batch.context_lens, strict=True))
        return PagedStep(rows, max(batch.query_lens), min(num_pages, -(-longest // self._block_size)))

    def rotate_and_write(self, rotation: FusedRotation, qkv: torch.Tensor, rows: DeviceRows) -> None:
        """See FusedAttentionBackend."""
        index = rotation.index
        table = rows.block_tables[self._group_of[index]]
        rotation.rotate(qkv, rows.positions, rows.token_slots, table, self._pages[index], (None, None))

    def forward(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: Any,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        rows = metadata.rows
        write = write_kv if self._device.type == "cuda" else write_kv_reference
        table = rows.block_tables[self._group_of[layer_index]]
        write(k_TKD, v_TKD, rows.positions, rows.token_slots, table, *self._pages[layer_index])
        return self.attend(layer_index, q_THD, k_TKD, v_TKD, metadata, sinks_H)

    def attend(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: Any,
        sinks_H: torch.Tensor | None = None,
        *,
        out_THD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See FusedAttentionBackend."""
        raise NotImplementedError

    def _shared(self, layer_index: int, step: PagedStep) -> Any:
        """What `_share` made for the layer's group in this step."""
        g = self._group_of[layer_index]
        if self._groups[g].layer_indices[0] == layer_index:
            rows = step.rows
            step.shared[g] = self._share(step, rows.block_tables[g][:, : step.num_pages].index_select(0, rows.row_slots))
        return step.shared[g]

    def _share(self, step: PagedStep, table_RP: torch.Tensor) -> Any:
        """What a group's layers have in common; the rows' page ids, int32, unless a backend needs more."""
        return table_RP


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Without a wait: through pinned memory, which torch takes back only when the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory. On a CPU the system hands it out untouched, page by page as it is first written, so that starting takes
    no time for it and a server that is hardly used stays small (torch.zeros would write all of it now)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def copy_pages(
    groups: Sequence[KVGroupSpec],
    pages_by_layer: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    copies: Sequence[tuple[int, int, int]],
    device: torch.device,
) -> None:
    """Copy whole pages: (group, source id, target id), in all layers of the group. Sources are read before any target is
    written."""
    for g, group in enumerate(groups):
        pairs = [(source, target) for copied_group, source, target in copies if copied_group == g]
        if not pairs:
            continue
        sources, targets = torch.tensor(pairs, dtype=torch.int64).to(device, non_blocking=True).unbind(1)
        for index in group.layer_indices:
            for pages in pages_by_layer[index]:
                raw = pages.view(torch.uint8)  # FP8 has no index_copy: pages are moved as bytes
                raw.index_copy_(0, targets, raw.index_select(0, sources))


def zero_pages(
    groups: Sequence[KVGroupSpec],
    pages_by_layer: Mapping[int, tuple[torch.Tensor, ...]],
    blocks: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    dim: int = 0,
) -> None:
    """Zero whole pages: (group, id), in all layers of the group. dim: of a layer's tensors, where pages are counted."""
    for g, group in enumerate(groups):
        ids = [block_id for of_group, block_id in blocks if of_group == g]
        if not ids:
            continue
        index = torch.tensor(ids, dtype=torch.int64).to(device, non_blocking=True)
        for layer in group.layer_indices:
            for pages in pages_by_layer[layer]:
                pages.view(torch.uint8).index_fill_(dim, index, 0)  # as bytes: FP8 has no index_fill


def with_sinks(out_THD: torch.Tensor, lse_HT: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Attention outputs as if each head's sink logit had been in the softmax's denominator: the natural logarithm of the
    denominator without it is lse, so the share that stays is sigmoid(lse - sink). [T, H, D]"""
    share_TH = torch.sigmoid(lse_HT - sinks_H.float()[:, None]).T
    return (out_THD * share_TH[:, :, None]).to(out_THD.dtype)


def common_problem(
    needs: AttentionNeeds,
    *,
    head_dims: Iterable[int] = range(8, 257, 8),
    capability: tuple[int, int] = (8, 0),
    softcap: bool = True,
    sinks: bool = True,
) -> str | None:
    """Why kernels that support no more than this cannot serve the layers; None when they can.

    head_dims: those the kernels take. capability: the oldest compute capability. softcap, sinks: whether they know these.
    """
    if needs.device.type != "cuda":
        return f"it needs a CUDA device, and this one is {needs.device.type}"
    if not HAS_TRITON:
        return "its pages are written by a Triton kernel, and Triton is not installed"
    have = torch.cuda.get_device_capability(needs.device)
    dims = sorted({layer.head_dim for layer in needs.layers} - set(head_dims))
    checks = (
        (have < capability, "it needs compute capability {}.{} or newer, and this card has {}.{}".format(*capability, *have)),
        (
            needs.dtype not in (torch.float16, torch.bfloat16),
            f"it computes in float16 and bfloat16, not in {_name(needs.dtype)}",
        ),
        (needs.kv_cache_dtype != needs.dtype, f"it reads pages in the model's dtype, not in {_name(needs.kv_cache_dtype)}"),
        (bool(dims), f"it has no kernel for head size {', '.join(map(str, dims))}"),
        (
            not softcap and any(layer.softcap is not None for layer in needs.layers),
            "it has no soft cap, which this model's layers use",
        ),
        (
            not sinks and any(layer.has_sinks for layer in needs.layers),
            "it has no attention sinks, which this model's layers use",
        ),
    )
    return next((why for failed, why in checks if failed), None)


def import_problem(module: str, package: str, attribute: str) -> str | None:
    """Why a module cannot be had that knows the attribute; None when it can. package: its name for pip. Nothing is imported
    that is not there."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a wheel built for another torch or CUDA fails in ways of its own
        first_line = next(iter(str(error).splitlines()), "")
        return f"{package} does not import here ({type(error).__name__}: {first_line})"
    return None if hasattr(imported, attribute) else f"the installed module {module} has no {attribute}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
