"""Paged causal attention of prefill chunks: many query tokens of each row over its cached context and its own keys.

FlashAttention (arXiv 2205.14135, 2307.08691) over a ragged batch. A chunk's own keys and values lie contiguous in the step's
activations, so only the cached context needs pages. All query heads of one key/value head are packed into a tile's rows: a tile
is a few queries × G heads, which keeps the causal triangle's waste small and serves short chunks with the same kernel.

Two kernels. On Hopper, `prefill_attention_hopper` takes pages of the model's dtype straight into its tiles. The one of
`prefill_attention_kernels`, plain Triton, does the rest: other cards and FP8 pages. Given a workspace, it first gathers the
context of every row with many queries into contiguous scratch in the model's dtype, where a page is no longer looked up, nor
converted, for every tile of queries; rows that don't fit there, and short ones, read their pages.

Shapes: T tokens of the step, R prefill rows, H query heads, K key/value heads, G = H / K, D head size, S slots, P pages
a table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from engine.kernels.compiler import triton
from engine.kernels.prefill_attention_kernels import gather_context_kernel, prefill_kernel
from engine.kernels.tiled_attention import tiled_attention

logger = logging.getLogger(__name__)

LOG2E = 1.4426950408889634
# A row with fewer queries than this reads its pages in place: a gather would cost it more than it saves.
GATHER_MIN_QUERIES = 64
# Programs of the gather, at least: enough to keep every SM reading.
GATHER_PROGRAMS = 1024


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """block_m rows (queries × packed heads) against block_n keys at a time. hopper: take the Hopper kernel where that can be
    used; its tiles have the same block_m."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    hopper: bool = False


@dataclass(slots=True)
class PrefillWorkspace:
    """Scratch for gathered contexts, made once and shared by all layers: k and v, [K, C, D] for C tokens, in the dtype of q."""

    k_scratch_KCD: torch.Tensor
    v_scratch_KCD: torch.Tensor

    @property
    def capacity(self) -> int:
        """Tokens of context it holds."""
        return self.k_scratch_KCD.shape[1]

    @classmethod
    def allocate(cls, num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: Any) -> PrefillWorkspace:
        shape = (num_kv_heads, num_tokens, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def prefill_tiles(head_dim: int, element_bytes: int, shared_memory_bytes: int, capability: tuple[int, int]) -> PrefillTiles:
    """The tile for a card: the first of a descending list whose queries, key and value stages fit its shared memory.

    shared_memory_bytes: what one program may use (99 KiB on sm_86/89, 163 on sm_80, 227 on sm_90 and up).
    """
    block_d = padded_head_dim(head_dim)
    if block_d >= 256:
        candidates = [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 4, 1)]
    else:
        candidates = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1)]
    for block_m, block_n, num_warps, num_stages in candidates:
        if tile_shared_bytes(block_d, element_bytes, block_m, block_n, num_stages) <= shared_memory_bytes:
            hopper = capability[0] == 9 and element_bytes == 2 and block_m == 128 and 64 <= block_d <= 256
            return PrefillTiles(block_m, block_n, num_warps, num_stages, hopper)
    raise ValueError(f"no attention tile for head size {head_dim} fits {shared_memory_bytes} bytes of shared memory")


def tile_shared_bytes(block_d: int, element_bytes: int, block_m: int, block_n: int, num_stages: int) -> int:
    """Shared memory of a tile: its queries, num_stages of keys and values, and 1 KiB for barriers and reductions."""
    return (block_m + 2 * num_stages * block_n) * block_d * element_bytes + 1024


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head is padded to in a tile."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache
def _device_tiles(head_dim: int, element_bytes: int, device_index: int) -> PrefillTiles:
    properties: Any = torch.cuda.get_device_properties(
        device_index
    )  # its stub lacks the shared memory that kernels may opt in to
    capability = (properties.major, properties.minor)
    return prefill_tiles(head_dim, element_bytes, properties.shared_memory_per_block_optin, capability)


def choose_tiles(head_dim: int, dtype: torch.dtype, device: torch.device) -> PrefillTiles:
    """The tile that `paged_prefill_attention` uses by itself on this device; small ones where there is only the interpreter."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _device_tiles(head_dim, dtype.itemsize, index)
    return PrefillTiles(block_m=16, block_n=16, num_warps=4, num_stages=1)


def packed_heads(group_size: int) -> int:
    """Query heads of one key/value head that share a tile: the largest power of two, up to 16, that divides the group."""
    return min(16, group_size & -group_size)


def queries_per_tile(head_dim: int, group_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """What to give `plan_prefill` as block_m for this device and model."""
    block_m = choose_tiles(head_dim, dtype, device).block_m
    return block_m // packed_heads(group_size)


def plan_prefill(query_lens: list[int], context_lens: list[int], block_m: int, window: int | None = None) -> np.ndarray:
    """Tiles of block_m queries, [N, 2] int32 of (row, first query of the tile in its row), the ones with most keys first.

    Longest first (LPT): programs start in this order, so the long tiles do not end alone. window: of the layers to be run.
    """
    queries = np.asarray(query_lens, dtype=np.int64)
    counts = (queries + block_m - 1) // block_m
    rows = np.repeat(np.arange(len(queries)), counts)
    first = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * block_m
    ends = np.minimum(first + block_m, queries[rows])
    work = np.asarray(context_lens, dtype=np.int64)[rows] + ends
    if window is not None:
        work = np.minimum(work, window + block_m)
    order = np.argsort(-work, kind="stable")
    return np.stack([rows[order], first[order]], axis=1).astype(np.int32)


def paged_prefill_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    tiles_N2: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: PrefillWorkspace | None = None,
    tiles: PrefillTiles | None = None,
    max_programs: int | None = None,
) -> torch.Tensor:
    """Attention of R chunks; writes their tokens' rows of out_THD and returns it.

    q, k, v: the step's activations, heads contiguous in a token (strided views of a merged projection are fine); the chunk's
    own keys are read from them, the context_lens_R earlier ones from pages [blocks + 1, K, block_size, D] (dtype of q, or
    float8_e4m3fn with k_scale, v_scale [1]). query_starts_R1: first token of each row in q, k, v and out. tiles_N2: from
    `plan_prefill` with `queries_per_tile` queries, on the device. window: a query sees itself and window - 1 before it.
    sinks_H: a logit per head that joins the denominator. workspace: scratch for contexts, where `wants_workspace` says so and
    a row has a context (it costs a launch even when none has). max_programs: how many multiprocessors the Hopper kernel may
    take; what it leaves, another stream's kernel gets.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_TKD.shape[1]
    if tiles_N2.shape[0] == 0:
        return out_THD
    if tiles is None:
        tiles = choose_tiles(head_dim, q_THD.dtype, q_THD.device)
    packed = packed_heads(num_heads // num_kv_heads)
    scale, cap = scaling * LOG2E, 0.0
    if softcap is not None:
        scale, cap = 2.0 * LOG2E * scaling / softcap, softcap * LOG2E
    if tiles.hopper and k_scale is None and reads_pages_in_place(head_dim, q_THD.dtype, k_pages.dtype, k_pages.shape[2]):
        from engine.kernels.prefill_attention_hopper import prefill_attention_hopper

        if prefill_attention_hopper(
            q_THD, k_TKD, v_TKD, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1, context_lens_R, tiles_N2,
            out_THD, sinks_H, packed, scale, cap, window, max_programs,
        ):  # fmt: skip
            return out_THD

    for name, tensor in (("q", q_THD), ("k", k_TKD), ("v", v_TKD), ("out", out_THD)):
        if tensor.stride(2) != 1 or (tensor.shape[1] > 1 and tensor.stride(1) != head_dim):
            raise ValueError(f"{name}'s heads must lie contiguous in a token: strides {tensor.stride()}")
    k_scratch, v_scratch, capacity = None, None, 0
    if workspace is not None:
        _gather_context(
            workspace, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1, context_lens_R,
            window=window, k_scale=k_scale, v_scale=v_scale, block_n=tiles.block_n,
        )  # fmt: skip
        k_scratch, v_scratch, capacity = workspace.k_scratch_KCD, workspace.v_scratch_KCD, workspace.capacity
    prefill_kernel[(tiles_N2.shape[0] * (num_heads // packed),)](
        q_THD, k_TKD, v_TKD, k_scratch, v_scratch, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1,
        context_lens_R, tiles_N2, out_THD, sinks_H, k_scale, v_scale, q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0),
        out_THD.stride(0), scale, cap, window or 0, block_tables_SP.stride(0), capacity,
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, PACKED=packed, BLOCK_SIZE=k_pages.shape[2],
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        SCRATCH=workspace is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        MIN_QUERIES=GATHER_MIN_QUERIES,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out_THD


def reads_pages_in_place(head_dim: int, dtype: torch.dtype, page_dtype: torch.dtype, block_size: int) -> bool:
    """Whether the Hopper kernel can take such pages: TMA copies them as they are, in boxes of at least 8 rows of 16 bytes."""
    return page_dtype == dtype and block_size >= 8 and head_dim % 8 == 0


def wants_workspace(head_dim: int, dtype: torch.dtype, page_dtype: torch.dtype, block_size: int, device: torch.device) -> bool:
    """Whether a workspace makes contexts faster here: where the pages must be read by pointers."""
    return not (choose_tiles(head_dim, dtype, device).hopper and reads_pages_in_place(head_dim, dtype, page_dtype, block_size))


def _gather_context(
    workspace: PrefillWorkspace,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    *,
    window: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    block_n: int,
) -> None:
    """Copies the contexts that fit into the workspace, zeros behind each up to a whole tile of block_n keys."""
    num_rows, num_kv_heads, block_size, head_dim = context_lens_R.shape[0], *k_pages.shape[1:]
    longest = block_tables_SP.shape[1] * block_size  # more parts than that has tiles would start with nothing to copy
    parts = max(1, min(GATHER_PROGRAMS // (num_rows * num_kv_heads), triton.cdiv(longest, block_n)))
    gather_context_kernel[(parts, num_rows * num_kv_heads)](
        workspace.k_scratch_KCD, workspace.v_scratch_KCD, k_pages, v_pages, block_tables_SP, row_slots_R, query_starts_R1,
        context_lens_R, k_scale, v_scale, window or 0, block_tables_SP.stride(0), workspace.capacity,
        NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_N=block_n,
        HAS_WINDOW=window is not None, MIN_QUERIES=GATHER_MIN_QUERIES, num_warps=4,
    )  # fmt: skip


def prefill_attention_reference(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_R: torch.Tensor,
    query_starts_R1: torch.Tensor,
    context_lens_R: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_prefill_attention` in plain torch, row by row: each row's pages gathered, then `tiled_attention` in float32."""
    block_size = k_pages.shape[2]
    starts = query_starts_R1.tolist()
    for row, context in enumerate(context_lens_R.tolist()):
        own = slice(starts[row], starts[row + 1])
        positions = torch.arange(context, device=q_THD.device)
        pages = block_tables_SP[row_slots_R[row].long(), positions // block_size].long()
        keys, values = k_pages[pages, :, positions % block_size].float(), v_pages[pages, :, positions % block_size].float()
        if k_scale is not None and v_scale is not None:
            keys, values = (keys * k_scale).to(q_THD.dtype).float(), (values * v_scale).to(q_THD.dtype).float()
        out_THD[own] = tiled_attention(
            q_THD[own].float(),
            torch.cat([keys, k_TKD[own].float()]),
            torch.cat([values, v_TKD[own].float()]),
            scaling=scaling,
            window=window,
            softcap=softcap,
            sinks_H=sinks_H,
        ).to(out_THD.dtype)
    return out_THD
