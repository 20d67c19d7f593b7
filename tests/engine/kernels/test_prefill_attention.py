"""Prefill attention against its float32 reference: ragged rows over pages and scratch, all features, poison elsewhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels import prefill_attention as kernel
from engine.kernels.prefill_attention import PrefillTiles, PrefillWorkspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
KIB = 1024
SMALL = PrefillTiles(block_m=16, block_n=16, num_warps=4, num_stages=2)
HOPPER = PrefillTiles(block_m=128, block_n=64, num_warps=8, num_stages=2, hopper=True)
HAS_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
TILES = [SMALL, HOPPER] if HAS_HOPPER else [SMALL]
# Small in the interpreter, and exact; on a card what the Hopper kernel takes.
DTYPE, HEAD_DIM, BLOCK_SIZE = (torch.bfloat16, 64, 16) if DEVICE == "cuda" else (torch.float32, 32, 4)


@pytest.fixture(autouse=True)
def few_programs_and_short_rows_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GATHER_PROGRAMS", 4)
    monkeypatch.setattr(kernel, "GATHER_MIN_QUERIES", 8)


def make_step(
    query_lens: list[int],
    context_lens: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = HEAD_DIM,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype = DTYPE,
    fp8: bool = False,
) -> dict[str, Any]:
    """A step's tensors. Tokens before, between and behind the rows do not exist; unread page slots hold NaN."""
    torch.manual_seed(sum(query_lens) + 7 * sum(context_lens) + head_dim)
    rows, tokens_before = len(query_lens), 3
    tokens = tokens_before + sum(query_lens)
    pages_per_row = max(-(-(c + n) // block_size) for c, n in zip(context_lens, query_lens, strict=True)) + 1
    page_dtype = torch.float8_e4m3fn if fp8 else dtype
    num_pages = rows * pages_per_row + 1
    k_pages, v_pages = both = torch.full((2, num_pages, kv_heads, block_size, head_dim), float("nan"))
    tables = torch.zeros(rows + 2, pages_per_row, dtype=torch.int32)
    slots = torch.randperm(rows + 2)[:rows].to(torch.int32)
    free = (torch.randperm(num_pages - 1) + 1).tolist()
    for row, context in enumerate(context_lens):
        for page in range(-(-context // block_size)):
            block = free.pop()
            tables[slots[row], page] = block
            filled = min(block_size, context - page * block_size)
            for pages in (k_pages, v_pages):
                pages[block, :, :filled] = torch.randn(kv_heads, filled, head_dim)
    starts = np.cumsum([tokens_before, *query_lens])
    step = {
        "block_tables_SP": tables,
        "row_slots_R": slots,
        "query_starts_R1": torch.tensor(starts, dtype=torch.int32),
        "context_lens_R": torch.tensor(context_lens, dtype=torch.int32),
    }
    step = {name: tensor.to(DEVICE) for name, tensor in step.items()}
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype).to(DEVICE)
    step["q_THD"], step["k_TKD"], step["v_TKD"] = qkv.split([heads, kv_heads, kv_heads], dim=1)
    step["k_pages"], step["v_pages"] = both.to(page_dtype).to(DEVICE)
    return step


def plan(step: dict[str, Any], tiles: PrefillTiles, window: int | None = None) -> torch.Tensor:
    query_lens = [after - start for start, after in pairwise(step["query_starts_R1"].tolist())]
    queries = tiles.block_m // kernel.packed_heads(step["q_THD"].shape[1] // step["k_TKD"].shape[1])
    return torch.from_numpy(kernel.plan_prefill(query_lens, step["context_lens_R"].tolist(), queries, window)).to(DEVICE)


def check(
    step: dict[str, Any],
    scratch_tokens: int = 0,
    tiles: PrefillTiles = SMALL,
    max_programs: int | None = None,
    **features: Any,
) -> None:
    q, k = step["q_THD"], step["k_TKD"]
    first = step["query_starts_R1"][0].item()
    workspace = None
    if scratch_tokens:
        workspace = PrefillWorkspace.allocate(scratch_tokens, k.shape[1], k.shape[2], q.dtype, DEVICE)
        workspace.k_scratch_KCD.fill_(float("nan"))
        workspace.v_scratch_KCD.fill_(float("nan"))
    features = {"scaling": q.shape[2] ** -0.5, **features}
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    reference = torch.full(q.shape, float("nan"), device=DEVICE)
    kernel.paged_prefill_attention(
        **step,
        tiles_N2=plan(step, tiles, features.get("window")),
        out_THD=out,
        workspace=workspace,
        tiles=tiles,
        max_programs=max_programs,
        **features,
    )
    kernel.prefill_attention_reference(**step, out_THD=reference, **features)
    assert out[:first].isnan().all(), "tokens of no row were written"
    got, want = out[first:].float(), reference[first:]
    assert got.isfinite().all()
    assert (got - want).norm() / want.norm() < TOLERANCE[q.dtype]
    if tiles.hopper and q.dtype == step["k_pages"].dtype:
        from engine.kernels.prefill_attention_hopper import _compiled

        assert all(_compiled.values()), "the Hopper kernel was not taken"


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("scratch_tokens", [0, 256, 64])
def test_ragged_rows_over_pages_and_scratch(scratch_tokens: int, tiles: PrefillTiles) -> None:
    check(make_step([19, 1, 40, 8], [37, 50, 0, 16]), scratch_tokens, tiles)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    "features",
    [
        {"window": 5},
        {"window": 21},
        {"softcap": 3.0},
        {"sinks_H": torch.tensor([0.5, -20.0, 3.0, 1.0], device=DEVICE)},
        {"window": 9, "softcap": 5.0, "sinks_H": torch.tensor([0.5, -1.0, 3.0, 1.0], device=DEVICE), "scaling": 0.4},
    ],
    ids="+".join,
)
def test_features(features: dict[str, Any], tiles: PrefillTiles) -> None:
    check(make_step([23, 3, 9], [30, 41, 0]), 64, tiles, **features)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (19, 1)])
def test_any_group_size(heads: int, kv_heads: int) -> None:
    check(make_step([18, 2], [5, 17], heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIM // 2), tiles=SMALL)
    if HAS_HOPPER:
        check(make_step([318, 2], [5, 170], heads=heads, kv_heads=kv_heads), tiles=HOPPER)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    check(make_step([18, 33], [21, 5], heads=2, kv_heads=2, head_dim=head_dim), 32, TILES[-1])


@pytest.mark.parametrize(
    "dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
)  # no bf16 products in the interpreter
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("scratch_tokens", [0, 64])
def test_low_precision(dtype: torch.dtype, fp8: bool, scratch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GATHER_MIN_QUERIES", 8)
    scales = {}
    if fp8:
        scales = {"k_scale": torch.tensor([0.5], device=DEVICE), "v_scale": torch.tensor([1.5], device=DEVICE)}
    check(make_step([20, 9], [18, 33], dtype=dtype, fp8=fp8), scratch_tokens, TILES[-1], **scales)


@pytest.mark.parametrize("tiles", TILES)
def test_a_row_of_bad_numbers_spoils_no_other(tiles: PrefillTiles) -> None:
    step = make_step([5, 9, 6], [0, 4, 0])
    step["v_TKD"][3 + 5 : 3 + 14] = float("nan")
    step["k_TKD"][3 + 5 : 3 + 14] = float("nan")
    out = torch.zeros(step["q_THD"].shape, dtype=DTYPE, device=DEVICE)
    kernel.paged_prefill_attention(**step, tiles_N2=plan(step, tiles), out_THD=out, scaling=0.2, tiles=tiles)
    assert out[:8].isfinite().all()
    assert out[17:].isfinite().all()
    assert out[8:17].isnan().all()


def test_no_more_gathering_programs_than_a_table_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gather:
        grids: list[tuple[int, int]] = []
        original = kernel.gather_context_kernel

        def __getitem__(self, grid: tuple[int, int]) -> Any:
            self.grids.append(grid)
            return self.original[grid]

    monkeypatch.setattr(kernel, "GATHER_PROGRAMS", 1024)
    monkeypatch.setattr(kernel, "gather_context_kernel", Gather())
    step = make_step([20, 9], [18, 33], block_size=4)
    check(step, 64, SMALL)
    tiles = -(-step["block_tables_SP"].shape[1] * 4 // SMALL.block_n)
    assert Gather.grids and set(Gather.grids) == {(tiles, 2 * 2)}


@pytest.mark.skipif(not HAS_HOPPER, reason="the Hopper kernel needs a Hopper card")
@pytest.mark.parametrize("programs", [None, 3])
@pytest.mark.parametrize("features", [{}, {"window": 130}, {"softcap": 3.0}], ids="+".join)
def test_hopper_programs_take_many_items(features: dict[str, Any], programs: int | None) -> None:
    step = make_step([190, 1, 400, 80] * 3, [370, 501, 0, 160] * 3, heads=8, kv_heads=2, head_dim=128)
    check(step, tiles=HOPPER, max_programs=programs, **features)


@pytest.mark.skipif(not HAS_HOPPER, reason="the Hopper kernel needs a Hopper card")
def test_hopper_takes_tensors_of_their_own() -> None:
    step = make_step([190, 1, 80], [370, 501, 0], heads=8, kv_heads=2, head_dim=128)
    check({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in step.items()}, tiles=HOPPER)


def test_pages_that_left_the_window_are_never_read() -> None:
    step = make_step([6], [40], block_size=4)
    step["block_tables_SP"][step["row_slots_R"][0].item(), :7] = 0  # positions below 28; the window starts at 40 - 11 = 29
    check(step, 0, SMALL, window=12)


def test_plan_covers_every_query_longest_first() -> None:
    query_lens, context_lens = [70, 1, 0, 33], [0, 500, 9, 100]
    plan = kernel.plan_prefill(query_lens, context_lens, 32)
    assert plan.dtype == np.int32
    assert sorted(map(tuple, plan.tolist())) == [(0, 0), (0, 32), (0, 64), (1, 0), (3, 0), (3, 32)]
    work = [context_lens[row] + min(first + 32, query_lens[row]) for row, first in plan.tolist()]
    assert work == sorted(work, reverse=True)
    assert kernel.plan_prefill([], [], 32).shape == (0, 2)
    # Under a window a long context is no more work than a short one.
    assert kernel.plan_prefill([8, 8], [64, 5000], 32, window=16).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_tiles_fit_the_shared_memory(head_dim: int, element_bytes: int, kib: int) -> None:
    capability = {99: (8, 9), 163: (8, 0), 227: (9, 0)}[kib]
    tiles = kernel.prefill_tiles(head_dim, element_bytes, kib * KIB, capability)
    block_d = kernel.padded_head_dim(head_dim)
    held = (tiles.block_m + 2 * tiles.num_stages * tiles.block_n) * block_d * element_bytes
    assert held < kib * KIB
    assert tiles.hopper == (kib == 227 and element_bytes == 2)
    assert tiles.block_m >= 32
    assert tiles.block_m == 128 or not tiles.hopper, "both kernels share one plan"


def test_no_tile_for_too_little_shared_memory() -> None:
    with pytest.raises(ValueError, match="head size 256"):
        kernel.prefill_tiles(256, 4, 16 * KIB, (8, 0))
