"""The interface every attention backend fills.

A backend owns the layout of its pages (shape, strides, dtype); everyone else knows bytes per block. Once a step it turns
the ragged batch into metadata; then each layer calls `forward`, which writes the new keys and values and attends.

Names of tensors carry shapes: T tokens of the step, H query heads, K key/value heads, D head size, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from engine.step import KVGroupSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer as the loader found it. window as in KVGroupSpec; softcap: tanh cap on scores; has_sinks: a learned
    logit per head that takes probability and gives no value (gpt-oss)."""

    layer_index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a backend is asked to serve. dtype: of queries and outputs; kv_cache_dtype: of the pages."""

    layers: Sequence[LayerSpec]
    groups: Sequence[KVGroupSpec]
    block_size: int
    dtype: torch.dtype
    device: torch.device
    kv_cache_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """One step's rows as the device sees them: int32 views of persistent buffers, so that a captured graph can hold them.

    block_tables: by KV group, [S, P], indexed by slot. R rows: row_slots [R]; seq_lens [R], tokens after this step;
    context_lens [R], tokens before it; query_starts [R + 1], first token of each row among the step's T. T tokens:
    positions [T]; token_slots [T], the slot of each token's sequence.
    The first num_decodes rows have one token each; the others are chunks. A padding row (only in a step of decodes alone)
    has seq_len 0, slot 0 and position -1: its keys and values go nowhere.
    """

    block_tables: tuple[torch.Tensor, ...]
    row_slots: torch.Tensor
    seq_lens: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    num_decodes: int


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """One step's rows, host side, tokens concatenated in row order without padding.

    Row r has query_lens[r] new tokens at positions context_lens[r] ..; block_tables[group][r] are its page ids (the first
    ceil((context_len + query_len) / block_size) are valid; SCRATCH_BLOCK_ID where a page has left the window).
    device: the same on the device, for backends that take it from there; None where there is no such thing (a CPU).
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: tuple[list[Sequence[int]], ...]
    device: DeviceRows | None = None


class AttentionBackend(Protocol):
    """Paged attention of all layers. Construct with (layers, groups, block_size, dtype, device).

    graphs: whether `forward` may be captured in a CUDA graph for a step of decodes alone, given `batch.device`.
    """

    name: ClassVar[str]
    graphs: ClassVar[bool]

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        groups: Sequence[KVGroupSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        **own: Any,
    ) -> None: ...

    def allocate(self, num_blocks: Sequence[int]) -> None:
        """Allocate zeroed pages: num_blocks[g] usable ids 1 .. num_blocks[g] for group g, and scratch page 0."""

    def prepare(self, batch: RaggedBatch) -> Any:
        """The step's metadata, made once and shared by all layers."""

    def forward(
        self,
        layer_index: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        metadata: Any,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v of the step's tokens into their pages, then attend; returns [T, H, D] in q's dtype."""

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy whole pages: (group, source id, target id), all layers of the group."""

    def zero_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Zero whole pages: (group, id), all layers of the group."""


class FusedRotation(Protocol):
    """A fused layer as the backend sees it: how its merged q, k and v become rotated, with k and v in their pages."""

    @property
    def index(self) -> int: ...

    def rotate(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        token_slots: torch.Tensor,
        table: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None: ...


class FusedAttentionBackend(AttentionBackend, Protocol):
    """A backend that the fused decoder can use: writing and attending are two calls."""

    def rotate_and_write(self, rotation: FusedRotation, qkv: torch.Tensor, rows: DeviceRows) -> None:
        """Merged q, k, v [T, (H + 2K) * D] of one layer, rotated in place; k and v also go to their pages, by the rows'
        positions, token_slots and block_tables."""

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
        """As `forward`, with the step's keys and values in their pages already; into out_THD where given."""


def group_layers(layers: Sequence[LayerSpec], block_size: int, bytes_per_element: int) -> tuple[KVGroupSpec, ...]:
    """Layers with equal window, heads and head size form a KV group, in order of first appearance."""
    members: dict[tuple[int | None, int, int], list[int]] = {}
    for layer in layers:
        members.setdefault((layer.window, layer.num_kv_heads, layer.head_dim), []).append(layer.layer_index)
    return tuple(
        KVGroupSpec(
            layer_indices=tuple(indices),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
            bytes_per_block=2 * len(indices) * block_size * num_kv_heads * head_dim * bytes_per_element,
        )
        for (window, num_kv_heads, head_dim), indices in members.items()
    )
