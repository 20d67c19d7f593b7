"""Prefill attention for Hopper: what the kernel of `prefill_attention_hopper_kernel` needs around it.

Descriptors of activations and pages, the choice of tiles, and the launch; False where the kernel cannot do it.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.compiler import is_compiled
from engine.kernels.prefill_attention_hopper_kernel import prefill_kernel

logger = logging.getLogger(__name__)

# Compiled kernels by everything that a compilation depends on; None where one failed.
_compiled: dict[tuple[Any, ...], Any] = {}
# TMA descriptors by what they say; a step's activations often return at the same address, pages always.
_descriptors: dict[tuple[Any, ...], TensorDescriptor] = {}


class _Address:
    """What a descriptor needs of a tensor, without keeping its memory alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def _descriptor(
    address: int, dtype: torch.dtype, rows: int, columns: int, stride: int, box: tuple[int, int]
) -> TensorDescriptor:
    """Of a matrix [rows, columns]."""
    key = (address, dtype, rows, columns, stride, box)
    descriptor = _descriptors.get(key)
    if descriptor is None:
        if len(_descriptors) > 4096:
            _descriptors.clear()
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        descriptor = TensorDescriptor(_Address(address, dtype), [rows, columns], [stride, 1], list(box), layout)
        _descriptors[key] = descriptor
    return descriptor


@lru_cache
def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def prefill_attention_hopper(
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
    sinks_H: torch.Tensor | None,
    packed: int,
    scale: float,
    softcap: float,
    window: int | None,
    max_programs: int | None,
) -> bool:
    """Launches the kernel over tiles of 128 // packed queries; False where this configuration does not compile (logged once)
    or the values' pages lie where one descriptor cannot reach them from the keys' (make both one tensor).

    scale turns q · k into log2 units (with a softcap, into twice those of its quotient), softcap is in log2 units, 0 for none.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_blocks, num_kv_heads, block_size, _ = k_pages.shape
    head_bytes = 2 * head_dim
    strides = q_THD.stride()
    q_address = q_THD.data_ptr()
    k_first_head, odd = divmod(k_TKD.data_ptr() - q_address, head_bytes)
    v_first_head = (v_TKD.data_ptr() - q_address) // head_bytes
    heads_a_token = max(k_first_head, v_first_head) + num_kv_heads
    merged = strides == k_TKD.stride() == v_TKD.stride() and strides[1:] == (head_dim, 1)
    if not merged or odd or min(k_first_head, v_first_head) < num_heads or heads_a_token * head_dim > strides[0]:
        # Not views of one projection, as the kernel wants them.
        q_THD = torch.cat([q_THD, k_TKD, v_TKD], dim=1)
        strides, q_address = q_THD.stride(), q_THD.data_ptr()
        k_first_head, v_first_head, heads_a_token = num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads
    k_address, v_address = k_pages.data_ptr(), v_pages.data_ptr()
    first_address = min(k_address, v_address)
    k_first_page_row, v_first_page_row = (k_address - first_address) // head_bytes, (v_address - first_address) // head_bytes
    page_rows = max(k_first_page_row, v_first_page_row) + num_blocks * num_kv_heads * block_size
    out_stride = out_THD.stride(0)
    key = (
        q_THD.device, q_THD.dtype, num_heads, num_kv_heads, head_dim, block_size, out_stride, window is None, softcap == 0.0,
        None if sinks_H is None else sinks_H.dtype,
    )  # fmt: skip
    compiled = _compiled.get(key, key)
    if compiled is None:
        return False
    if (k_address - v_address) % head_bytes or page_rows >= 2**31:
        logger.warning("no descriptor reaches both keys and values (make them one tensor): prefill by the plain kernel")
        _compiled[key] = None
        return False
    block_d = max(64, 1 << (head_dim - 1).bit_length())
    block_n = 64 if block_d == 256 else 128
    tokens_box, pages_box = (min(128 // packed, block_n), block_d), (min(block_size, block_n), block_d)
    num_items = tiles_N2.shape[0] * (num_heads // packed)
    grid = (min(num_items, max_programs or _num_programs(q_THD.device)), 1, 1)
    arguments = (
        _descriptor(q_address, q_THD.dtype, num_tokens, heads_a_token * head_dim, strides[0], tokens_box),
        _descriptor(first_address, q_THD.dtype, page_rows, head_dim, head_dim, pages_box),
        block_tables_SP, row_slots_R, query_starts_R1, context_lens_R, tiles_N2, out_THD, sinks_H,
        k_first_head, v_first_head, k_first_page_row, v_first_page_row, out_stride, scale, softcap, window or 0,
        block_tables_SP.stride(0), num_items,
        num_kv_heads, num_heads // num_kv_heads, packed, block_size, head_dim, block_d, block_n, 2, window is not None,
        softcap != 0.0,
    )  # fmt: skip
    if compiled is not key:
        compiled[grid](*arguments)
        return True
    try:
        launched = prefill_kernel[grid](*arguments, num_warps=4)
        if is_compiled(launched):
            _compiled[key] = launched
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        logger.warning("the Hopper prefill kernel does not compile here, taking the plain one: %s", reason)
        _compiled[key] = None
        return False
    return True
