"""Norms by head, rotary and page writes in one launch, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.kernels import rotary

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where the device rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 2e-2}
MAX_LEN = 40


@dataclass
class Case:
    """Inputs of a launch, and the page tensors it writes to."""

    qkv: torch.Tensor
    tables: dict[str, torch.Tensor]
    pages: tuple[torch.Tensor, torch.Tensor]
    shape: dict[str, int]

    def run(self, function: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv, k pages and v pages after `function`, which works on copies."""
        qkv = torch.empty_strided(self.qkv.shape, self.qkv.stride(), dtype=self.qkv.dtype, device=DEVICE).copy_(self.qkv)
        k_pages, v_pages = (pages.clone() for pages in self.pages)
        function(qkv, **self.tables, k_pages=k_pages, v_pages=v_pages, **self.shape, **options)
        return qkv, k_pages, v_pages


def make_case(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
    rotary_dim: int | None = None,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    block_size: int = 4,
    table_dtype: torch.dtype = torch.float32,
    num_tokens: int = 7,
) -> Case:
    num_slots, num_blocks = 3, 3 * -(-MAX_LEN // block_size)
    block_tables = (1 + torch.randperm(num_blocks).to(torch.int32)).view(num_slots, -1)
    places = torch.randperm(num_slots * MAX_LEN)[:num_tokens].to(torch.int32)
    positions = places % MAX_LEN
    positions[1::3] = -1
    angles = torch.randn(MAX_LEN, (rotary_dim or head_dim) // 2)
    pages = torch.randn(num_blocks + 1, num_kv_heads, block_size, head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    wide = (torch.randn(num_tokens, width + 16) * 2).to(DEVICE, dtype)
    tables = {
        "cos_LR": angles.cos().to(table_dtype),
        "sin_LR": angles.sin().to(table_dtype),
        "positions_T": positions,
        "token_slots_T": places // MAX_LEN,
        "block_tables_SP": block_tables,
    }
    return Case(
        wide[:, :width],
        {name: table.to(DEVICE) for name, table in tables.items()},
        (pages.to(DEVICE, dtype), pages.neg().to(DEVICE, dtype)),
        {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim},
    )


def check(case: Case, tolerance: float, **options: Any) -> None:
    results = case.run(rotary.rotate_and_write, **options)
    expected = case.run(rotary.rotate_and_write_reference, **options)
    for got, want in zip(results, expected, strict=True):
        assert float((got.double() - want.double()).norm() / want.double().norm()) < tolerance
    if case.qkv.dtype != torch.bfloat16:
        values_from = (case.shape["num_heads"] + case.shape["num_kv_heads"]) * case.shape["head_dim"]
        assert torch.equal(results[0][:, values_from:], case.qkv[:, values_from:])
        assert torch.equal(results[2], expected[2])


def norm_options(case: Case, offset: float, round_before_weight: bool) -> dict[str, Any]:
    weights = torch.randn(2, case.shape["head_dim"]).to(DEVICE, case.qkv.dtype)
    return {
        "q_norm_D": weights[0],
        "k_norm_D": weights[1],
        "norm_eps": 1e-5,
        "norm_offset": offset,
        "norm_round_before_weight": round_before_weight,
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "num_heads", "num_kv_heads"),
    [
        (64, None, 4, 1),
        (80, None, 3, 3),
        (96, None, 6, 2),
        (128, None, 4, 2),
        (256, None, 2, 1),
        (80, 32, 2, 2),
        (128, 64, 3, 1),
    ],
)
def test_rotary_and_pages(dtype: torch.dtype, head_dim: int, rotary_dim: int | None, num_heads: int, num_kv_heads: int) -> None:
    case = make_case(dtype, head_dim, rotary_dim, num_heads, num_kv_heads)
    check(case, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotary_dim", [None, 8], ids=["whole", "partial"])
@pytest.mark.parametrize(("offset", "round_before_weight"), [(0.0, True), (1.0, False)], ids=["qwen", "gemma"])
def test_norms_by_head(dtype: torch.dtype, rotary_dim: int | None, offset: float, round_before_weight: bool) -> None:
    case = make_case(dtype, rotary_dim=rotary_dim)
    check(case, TOLERANCE[dtype], **norm_options(case, offset, round_before_weight))


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_block_sizes(block_size: int) -> None:
    check(make_case(block_size=block_size), 1e-6)


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_tile_choices(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's strides, and the large programs that only many tokens get."""
    case = make_case(num_tokens=min(num_tokens, 100))
    if num_tokens > 1:
        monkeypatch.setattr(rotary, "_tile_rows", lambda tile, num_rows: (256 // tile * 8, 4))
    check(case, 1e-6)


def test_tables_in_the_models_dtype() -> None:
    check(make_case(torch.float16, table_dtype=torch.float16), 1e-3)


def test_infinite_values_reach_the_pages_unchanged() -> None:
    case = make_case()
    case.qkv[:, -1] = float("inf")
    v_pages = case.run(rotary.rotate_and_write)[2]
    assert torch.equal(v_pages, case.run(rotary.rotate_and_write_reference)[2]) and v_pages.isinf().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_fp8_pages(dtype: torch.dtype, fused: bool) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton converts to float8_e4m3fn from compute capability 8.9 on")
    scales = {"k_scale": torch.tensor([0.5], device=DEVICE), "v_scale": torch.tensor([0.125], device=DEVICE)}
    case = make_case(dtype)
    case.pages = tuple(pages.to(torch.float8_e4m3fn) for pages in case.pages)
    # Only numbers that need no rounding (turns are by right angles), because the interpreter rounds otherwise than the device.
    case.tables["cos_LR"] = (case.tables["cos_LR"] > 0).float()
    case.tables["sin_LR"] = 1 - case.tables["cos_LR"]
    case.qkv[:] = (case.qkv * 8).round().clamp(-15, 15) / 8
    case.qkv[0, -3:] = torch.tensor([1000.0, -1000.0, 56.0])
    runs = (rotary.rotate_and_write, rotary.rotate_and_write_reference) if fused else (write_kv, write_kv_reference)
    results, expected = (case.run(run, **scales) for run in runs)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got.float(), want.float())
    assert results[2].float().max() == rotary.FP8_MAX


def write_kv(qkv: torch.Tensor, **arguments: Any) -> None:
    _on_views(rotary.write_kv, qkv, **arguments)


def write_kv_reference(qkv: torch.Tensor, **arguments: Any) -> None:
    _on_views(rotary.write_kv_reference, qkv, **arguments)


def _on_views(
    function: Any, qkv: torch.Tensor, cos_LR: Any, sin_LR: Any, num_heads: int, num_kv_heads: int, head_dim: int, **rest: Any
) -> None:
    heads = qkv.unflatten(1, (-1, head_dim))
    function(heads[:, num_heads : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :], **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_write_kv(dtype: torch.dtype, head_dim: int, num_tokens: int) -> None:
    case = make_case(dtype, head_dim, num_tokens=num_tokens)
    for got, want in zip(case.run(write_kv), case.run(write_kv_reference), strict=True):
        assert torch.equal(got, want)
