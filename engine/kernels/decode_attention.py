"""Paged decode attention: one new token a row over its pages, with the keys of a row split among programs.

Flash-decoding (Dao et al., 2023) over pages, in one launch a layer:

- `plan_decode`, once a step and KV group, cuts the rows' keys into items of nearly equal size: as many as keep the card
  busy, and no more. It runs on the device, so that a captured graph serves any lengths; the grid depends on B alone.
- `paged_decode_attention` gives an item and a key/value head to a program, which takes all query heads of that head at
  once (grouped-query attention: each key is read once). A row in one item is written out at once; a row in several leaves
  float32 partials, and the program that comes last adds them up.

The kernels themselves: engine/kernels/decode_attention_kernels.py.

Names: B rows (padding rows have length 0), H query heads, K key/value heads, G = H / K, D head size, S slots, P pages a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engine.kernels.compiler import is_compiled, triton
from engine.kernels.decode_attention_kernels import decode_kernel, plan_kernel
from engine.kernels.tiled_attention import tiled_attention

logger = logging.getLogger(__name__)

NO_WINDOW = 2**31 - 1
# int32 a work item: row, slot, first visible key, first key, end key, number of the row's items, its first item, unused
ITEM_FIELDS = 8
MAX_HEADS_PER_PROGRAM = 32
KEYS_PER_WARP = 16  # what the matrix units take at least; one page of the usual size
PLAN_ITEMS_PER_PROGRAM = 32


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a program works: keys_per_warp of num_warps in a tile; num_stages of the load pipeline (num_stages - 1 tiles are
    under way while one is computed); items_per_sm: as many items as keep a multiprocessor busy."""

    keys_per_warp: int
    num_warps: int
    num_stages: int
    items_per_sm: int

    @property
    def block_n(self) -> int:
        """Keys a tile."""
        return self.keys_per_warp * self.num_warps


def decode_tiles(head_dim: int, element_bytes: int, shared_memory_bytes: int) -> DecodeTiles:
    """Tiles for keys of head_dim elements on a card with that much shared memory a program.

    Two programs share a multiprocessor, and each wants two tiles of keys and values on their way while it computes a third.
    """
    budget = shared_memory_bytes // 2 - 4096
    for num_warps in (4, 2, 1):
        tile_bytes = 2 * KEYS_PER_WARP * num_warps * _power_of_two(head_dim) * element_bytes
        num_stages = min(budget // tile_bytes + 1, 4)
        if num_stages >= 3:
            break
    return DecodeTiles(KEYS_PER_WARP, num_warps, num_stages, 1)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n and, as the matrix units want it, 16."""
    return max(16, 1 << (n - 1).bit_length())


@dataclass(slots=True)
class DecodeWorkspace:
    """Everything the kernels need beside their arguments, for one KV group on one stream; launches that may overlap need one
    each. `make` allocates it once. I items at most.

    items [I, ITEM_FIELDS] int32, the plan; partials [I, H, D] float32, sums of values not yet divided; stats [I, H, 2]
    float32, each sum's maximal score (base 2) and weight; counters [B, programs a row] int32, zero between launches.
    """

    tiles: DecodeTiles
    max_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    head_blocks: int
    extra_items: int
    items: torch.Tensor
    partials: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @staticmethod
    def make(
        max_rows: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        num_kv_heads: int,
        block_size: int = 16,
        element_bytes: int = 2,
        tiles: DecodeTiles | None = None,
        multiprocessors: int | None = None,
    ) -> DecodeWorkspace:
        """element_bytes: of a stored key. tiles and multiprocessors: the card's own unless given (as a CPU must)."""
        device = torch.device(device)
        if tiles is None or multiprocessors is None:
            card: Any = torch.cuda.get_device_properties(device)
            tiles = tiles or decode_tiles(head_dim, element_bytes, card.shared_memory_per_block_optin)
            multiprocessors = multiprocessors or card.multi_processor_count
        group = num_heads // num_kv_heads
        head_blocks = -(-group // MAX_HEADS_PER_PROGRAM)
        extra_items = max(1, multiprocessors * tiles.items_per_sm // (num_kv_heads * head_blocks))
        num_items = max_rows + extra_items
        return DecodeWorkspace(
            tiles=tiles,
            max_rows=max_rows,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            head_blocks=head_blocks,
            extra_items=extra_items,
            items=torch.zeros(num_items, ITEM_FIELDS, dtype=torch.int32, device=device),
            partials=torch.empty(num_items, num_heads, head_dim, dtype=torch.float32, device=device),
            stats=torch.empty(num_items, num_heads, 2, dtype=torch.float32, device=device),
            counters=torch.zeros(max_rows, num_kv_heads * head_blocks, dtype=torch.int32, device=device),
        )


def plan_decode(
    workspace: DecodeWorkspace, row_slots_B: torch.Tensor, seq_lens_B: torch.Tensor, *, window: int | None = None
) -> None:
    """Cut the step's rows into items; all layers of the KV group then share the plan. Lengths count the current token."""
    num_rows = seq_lens_B.shape[0]
    assert num_rows <= workspace.max_rows
    num_items = num_rows + workspace.extra_items
    plan_kernel[(triton.cdiv(num_items, PLAN_ITEMS_PER_PROGRAM),)](
        seq_lens_B,
        row_slots_B,
        workspace.items,
        num_rows,
        num_items,
        workspace.extra_items,
        NO_WINDOW if window is None else window,
        ROWS=_power_of_two(workspace.max_rows),
        ITEMS=PLAN_ITEMS_PER_PROGRAM,
        FIELDS=ITEM_FIELDS,
        BLOCK_N=workspace.tiles.block_n,
        ALIGN=min(workspace.tiles.block_n, workspace.block_size),
        num_warps=4,
    )


def paged_decode_attention(
    q_BHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
    out_BHD: torch.Tensor,
    *,
    workspace: DecodeWorkspace,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token a row over the row's pages, as `plan_decode` cut them for the same slots, lengths and window
    (the kernel takes these from the plan; the arguments are checked for their shape).

    q [B, H, D] and out [B, H, D], last dimension contiguous; pages [N, K, block_size, D], contiguous, in q's dtype or
    float8_e4m3fn with scales [1] float32 (value = stored * scale); tables [S, P] int32, indexed by slot; sinks [H] float32,
    logits that take probability and give no value. A row of length 0 gives zeros.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads, block_size = k_pages.shape[1:3]
    assert (num_heads, num_kv_heads, head_dim, block_size) == (
        workspace.num_heads,
        workspace.num_kv_heads,
        workspace.head_dim,
        workspace.block_size,
    ), "the workspace was made for other pages"
    assert seq_lens_B.shape == row_slots_B.shape == (num_rows,)
    assert q_BHD.stride(2) == out_BHD.stride(2) == 1 and k_pages.is_contiguous() and v_pages.is_contiguous()
    group = num_heads // num_kv_heads
    split_heads = min(MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(group))
    decode_fp8 = k_pages.dtype == torch.float8_e4m3fn and not _has_native_fp8(k_pages.device)
    if decode_fp8:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    while True:
        tiles = workspace.tiles
        grid = (num_kv_heads * workspace.head_blocks, num_rows + workspace.extra_items, 1)
        arguments = (
            q_BHD, k_pages, v_pages, block_tables_SP, workspace.items, out_BHD, workspace.partials, workspace.stats,
            workspace.counters, sinks_H, k_scale, v_scale, *q_BHD.stride()[:2], *out_BHD.stride()[:2],
            block_tables_SP.stride(0), scaling, 0.0 if softcap is None else softcap,
            num_heads, group, workspace.head_blocks, head_dim, _power_of_two(head_dim), max(16, split_heads),
            tiles.num_warps.bit_length() - 1, tiles.keys_per_warp, block_size, ITEM_FIELDS, tiles.num_stages,
            max(1, min(16, 2048 * tiles.num_warps // (split_heads * _power_of_two(head_dim)))), split_heads,
            softcap is not None, decode_fp8,
        )  # fmt: skip
        # All that the compiled form depends on and that may differ between calls with one workspace.
        key = (
            q_BHD.dtype, out_BHD.dtype, k_pages.dtype, tiles, *arguments[12:17], scaling, softcap is None, k_scale is None,
            None if sinks_H is None else sinks_H.dtype, q_BHD.data_ptr() % 16, out_BHD.data_ptr() % 16,
        )  # fmt: skip
        compiled = workspace.compiled.get(key)
        if compiled is not None:  # launching through the compiler's own front door takes the host four times as long
            compiled[grid](*arguments)
            return out_BHD
        try:
            launched = decode_kernel[grid](*arguments, num_warps=tiles.num_warps)
            if is_compiled(launched):
                workspace.compiled[key] = launched
            return out_BHD
        except triton.runtime.errors.OutOfResources as error:
            if tiles.num_stages == 1:
                raise
            workspace.tiles = replace(tiles, num_stages=tiles.num_stages - 1)
            logger.warning("decode attention: %s; now %d pipeline stages", error, tiles.num_stages - 1)


def decode_attention_reference(
    q_BHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables_SP: torch.Tensor,
    row_slots_B: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, row by row: each row's pages gathered, then `tiled_attention`; returns float32 [B, H, D]."""
    block_size = k_pages.shape[2]
    out_BHD = torch.zeros(q_BHD.shape, dtype=torch.float32, device=q_BHD.device)
    for row, (slot, end) in enumerate(zip(row_slots_B.tolist(), seq_lens_B.tolist(), strict=True)):
        if end == 0:
            continue
        begin = 0 if window is None else max(0, end - window)
        positions_N = torch.arange(begin, end, device=q_BHD.device)
        pages_N = block_tables_SP[slot, positions_N // block_size].long()
        k_NKD, v_NKD = (pages[pages_N, :, positions_N % block_size].float() for pages in (k_pages, v_pages))
        if k_scale is not None:
            k_NKD = k_NKD * k_scale
        if v_scale is not None:
            v_NKD = v_NKD * v_scale
        q_1HD = q_BHD[row : row + 1].float()
        out_BHD[row] = tiled_attention(q_1HD, k_NKD, v_NKD, scaling=scaling, softcap=softcap, sinks_H=sinks_H, tile=1024)[0]
    return out_BHD


def _has_native_fp8(device: torch.device) -> bool:
    """Whether the card converts e4m3 itself (Ada and Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
