"""Paged decode attention against its reference: features, shapes, splits, and what may not be read or left behind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from engine.kernels.decode_attention import (
    DecodeTiles,
    DecodeWorkspace,
    decode_attention_reference,
    decode_tiles,
    paged_decode_attention,
    plan_decode,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = DecodeTiles(keys_per_warp=16, num_warps=2, num_stages=2, items_per_sm=1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Case:
    """Rows over pages in random order; every slot, page and position that no row may read is NaN."""

    def __init__(
        self,
        seq_lens: list[int],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 16,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        tiles: DecodeTiles = TILES,
        multiprocessors: int = 8,
        seed: int = 0,
        max_rows: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = len(seq_lens)
        pages_per_row = [-(-length // block_size) for length in seq_lens]
        page_ids = (torch.randperm(sum(pages_per_row) + 3, generator=generator) + 1).tolist()
        shape = (len(page_ids) + 1, num_kv_heads, block_size, head_dim)
        pages = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        readable = torch.zeros(shape[0], block_size, dtype=torch.bool)
        self.block_tables = torch.zeros(rows + 2, max(pages_per_row, default=0) + 1, dtype=torch.int32)
        self.row_slots = (torch.randperm(rows + 2, generator=generator)[:rows]).to(torch.int32)
        for slot, length, count in zip(self.row_slots.tolist(), seq_lens, pages_per_row, strict=True):
            begin = 0 if window is None else max(0, length - window)
            for index in range(count):
                page = page_ids.pop()
                if (index + 1) * block_size > begin:  # earlier pages have left the window: the table says scratch
                    self.block_tables[slot, index] = page
                first, last = max(begin - index * block_size, 0), min(length - index * block_size, block_size)
                readable[page, first:last] = True
        for tensor in pages:
            tensor[(~readable)[:, None, :, None].expand(shape)] = float("nan")
        kv_dtype = kv_dtype or dtype
        self.k_pages, self.v_pages = (tensor.to(kv_dtype).to(DEVICE) for tensor in pages)
        self.block_tables = self.block_tables.to(DEVICE)
        self.row_slots = self.row_slots.to(DEVICE)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
        # As the layers give it: a strided view of the merged projection.
        merged = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype).to(DEVICE)
        self.q = merged[:, : num_heads * head_dim].view(rows, num_heads, head_dim)
        self.window = window
        self.scaling = head_dim**-0.5
        self.workspace = DecodeWorkspace.make(
            max_rows or rows,
            num_heads,
            head_dim,
            DEVICE,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            tiles=tiles,
            multiprocessors=multiprocessors,
        )
        for scratch in (self.workspace.partials, self.workspace.stats):
            scratch.fill_(float("nan"))

    def plan(self) -> None:
        plan_decode(self.workspace, self.row_slots, self.seq_lens, window=self.window)

    def run(self, **features: Any) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=DEVICE)
        paged_decode_attention(
            self.q,
            self.k_pages,
            self.v_pages,
            self.block_tables,
            self.row_slots,
            self.seq_lens,
            out,
            workspace=self.workspace,
            scaling=self.scaling,
            window=self.window,
            **features,
        )
        return out

    def reference(self, **features: Any) -> torch.Tensor:
        return decode_attention_reference(
            self.q,
            self.k_pages,
            self.v_pages,
            self.block_tables,
            self.row_slots,
            self.seq_lens,
            scaling=self.scaling,
            window=self.window,
            **features,
        )

    def check(self, **features: Any) -> None:
        self.plan()
        out, expected = self.run(**features), self.reference(**features)
        assert relative_error(out, expected) < TOLERANCE[self.q.dtype]
        assert not self.workspace.counters.any(), "counters are left for the next launch"


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("multiprocessors", [1, 8, 64])
def test_ragged_rows_in_any_number_of_splits(multiprocessors: int) -> None:
    Case([1, 0, 17, 200, 64, 33, 16], multiprocessors=multiprocessors).check()


def test_a_row_without_keys_gives_zeros_and_is_written() -> None:
    case = Case([0, 40, 0])
    case.plan()
    out = case.run(sinks_H=torch.randn(4, device=DEVICE))
    assert (out[0] == 0).all() and (out[2] == 0).all()
    assert (out[1] != 0).any()


def test_a_step_of_padding_alone_gives_zeros() -> None:
    case = Case([0, 0])
    case.plan()
    assert (case.run() == 0).all()


@pytest.mark.parametrize(("window", "multiprocessors"), [(1, 16), (20, 1), (32, 16), (70, 16), (500, 16)])
def test_a_window_reads_no_page_before_it(window: int, multiprocessors: int) -> None:
    Case([150, 31, 1, 97], window=window, multiprocessors=multiprocessors).check()


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_soft_cap_and_sinks(multiprocessors: int) -> None:
    case = Case([150, 31, 5], multiprocessors=multiprocessors)
    case.q *= 10  # far into the cap
    case.check(softcap=2.0)
    case.check(sinks_H=torch.tensor([5.0, -5.0, 0.0, 20.0], device=DEVICE))
    case.check(softcap=5.0, sinks_H=torch.randn(4, device=DEVICE))


def test_window_soft_cap_and_sinks_together() -> None:
    Case([150, 31, 5], window=70, multiprocessors=16).check(softcap=5.0, sinks_H=torch.randn(4, device=DEVICE))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 1), (6, 2), (16, 1), (20, 1), (71, 1)])
def test_groups_of_any_size(num_heads: int, num_kv_heads: int) -> None:
    case = Case([40, 9], num_heads=num_heads, num_kv_heads=num_kv_heads, multiprocessors=16)
    case.check(sinks_H=torch.randn(num_heads, device=DEVICE))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    Case([40, 9], head_dim=head_dim, multiprocessors=16).check()


@pytest.mark.parametrize(("block_size", "window"), [(1, None), (4, 50), (32, None), (128, 50)])
def test_block_sizes(block_size: int, window: int | None) -> None:
    Case([90, 9, 128], block_size=block_size, window=window, multiprocessors=16).check()


# Triton's interpreter multiplies no bfloat16 matrices.
LOW_PRECISION = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(dtype: torch.dtype) -> None:
    Case([150, 31], head_dim=64, dtype=dtype, multiprocessors=16).check()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_fp8_pages_with_scales(dtype: torch.dtype) -> None:
    case = Case([150, 31], head_dim=32, dtype=dtype, kv_dtype=torch.float8_e4m3fn, multiprocessors=16)
    scales = {"k_scale": torch.tensor([0.25], device=DEVICE), "v_scale": torch.tensor([3.0], device=DEVICE)}
    case.check(**scales)


def test_one_plan_serves_many_layers_and_the_next_step() -> None:
    case = Case([100, 60], multiprocessors=16, max_rows=5)
    case.plan()
    first = case.run()
    case.workspace.partials.fill_(float("nan"))
    assert torch.equal(first, case.run())
    case.seq_lens.copy_(torch.tensor([99, 1]))
    case.check()


def test_other_rows_change_no_bit_while_the_splits_are_the_same() -> None:
    """One multiprocessor's worth of items: no row is split, whoever is beside it."""
    alone = Case([100], multiprocessors=1, tiles=TILES)
    alone.plan()
    crowd = Case([100, 100, 100], multiprocessors=1, tiles=TILES)
    slot = int(crowd.row_slots[1])
    crowd.k_pages[crowd.block_tables[slot, :7].long()] = alone.k_pages[alone.block_tables[int(alone.row_slots[0]), :7].long()]
    crowd.v_pages[crowd.block_tables[slot, :7].long()] = alone.v_pages[alone.block_tables[int(alone.row_slots[0]), :7].long()]
    crowd.q[1] = alone.q[0]
    crowd.plan()
    assert torch.equal(crowd.run()[1], alone.run()[0])


@pytest.mark.parametrize("window", [None, 100])
def test_the_plan_covers_every_key_once_in_even_items(window: int | None) -> None:
    seq_lens = [1, 0, 640, 64, 1000, 33, 0, 257]
    case = Case(seq_lens, window=window, multiprocessors=24, max_rows=11)
    case.plan()
    workspace = case.workspace
    seen: dict[int, list[tuple[int, int]]] = {}
    num_items = 0
    for row, slot, visible, begin, end, splits, first in workspace.items[: len(seq_lens) + workspace.extra_items, :7].tolist():
        if splits == 0:
            continue
        assert slot == int(case.row_slots[row]) and visible == (0 if window is None else max(0, seq_lens[row] - window))
        assert first == num_items - len(seen.get(row, []))
        seen.setdefault(row, []).append((begin, end))
        num_items += 1
        assert len(seen[row]) <= splits
    assert num_items <= len(seq_lens) + workspace.extra_items
    largest = max(end - begin for parts in seen.values() for begin, end in parts)
    visible_keys = sum(length if window is None else min(length, window) for length in seq_lens)
    assert largest <= visible_keys / workspace.extra_items + 3 * workspace.tiles.block_n
    for row, length in enumerate(seq_lens):
        parts = seen[row]
        start = 0 if window is None else max(0, length - window)
        assert parts[0][0] <= start < parts[0][0] + 32 and parts[-1][1] == length
        assert all(earlier[1] == later[0] for earlier, later in pairwise(parts))


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
def test_two_programs_fit_the_shared_memory_and_load_ahead(shared_kib: int, head_dim: int, element_bytes: int) -> None:
    tiles = decode_tiles(head_dim, element_bytes, shared_kib * 1024)
    padded = 1 << (head_dim - 1).bit_length()
    buffers = (tiles.num_stages - 1) * 2 * tiles.block_n * padded * element_bytes
    assert tiles.num_stages >= 2
    assert 2 * (buffers + 4096) <= shared_kib * 1024


@pytest.mark.parametrize(("shared_kib", "num_warps", "num_stages"), [(99, 2, 3), (163, 4, 3), (227, 4, 4)])
def test_tiles_of_heads_of_128_in_bf16(shared_kib: int, num_warps: int, num_stages: int) -> None:
    tiles = decode_tiles(128, 2, shared_kib * 1024)
    assert (tiles.num_warps, tiles.num_stages) == (num_warps, num_stages)
