"""Linears of few rows against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels.fp8 import quantize_weight
from engine.kernels.skinny_linear import (
    Card,
    SkinnyPlan,
    SkinnyWorkspace,
    plan_skinny,
    skinny_linear,
    skinny_linear_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

VECTOR = SkinnyPlan("vector", block_rows=1, block_n=16, block_e=32, splits=1, num_warps=1, num_stages=1)
VECTOR_2 = SkinnyPlan("vector", block_rows=2, block_n=16, block_e=32, splits=1, num_warps=1, num_stages=2)
MATRIX = SkinnyPlan("matrix", block_rows=16, block_n=16, block_e=32, splits=1, num_warps=4, num_stages=2)
MATRIX_SPLIT = SkinnyPlan("matrix", block_rows=16, block_n=32, block_e=32, splits=3, num_warps=4, num_stages=2)
MATRIX_64 = SkinnyPlan("matrix", block_rows=64, block_n=32, block_e=32, splits=1, num_warps=4, num_stages=2)
PLANS = {"vector": VECTOR, "vector of 2": VECTOR_2, "matrix": MATRIX, "matrix, split": MATRIX_SPLIT, "matrix of 64": MATRIX_64}
CASES = [(name, rows) for name, plan in PLANS.items() for rows in sorted({1, max(1, plan.block_rows - 1), plan.block_rows})]


def tolerance(dtype: torch.dtype) -> float:
    # The interpreter cuts where the card rounds to bfloat16.
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 5e-2}[dtype]


def dtypes(plan: SkinnyPlan) -> list[torch.dtype]:
    if DEVICE == "cpu" and plan.kind == "matrix":  # the interpreter multiplies bfloat16 matrices wrongly
        return [torch.float32, torch.float16]
    return [torch.float32, torch.float16, torch.bfloat16]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def check(plan: SkinnyPlan, x: torch.Tensor, weight: torch.Tensor, **options: Any) -> None:
    """skinny_linear against the reference, into poisoned memory."""
    reference = skinny_linear_reference(x, weight, **options)
    out = torch.full_like(reference, float("nan"))
    workspace = SkinnyWorkspace.allocate(DEVICE, parts_bytes=1 << 18, tiles=64)
    workspace.parts.fill_(float("nan"))
    y = skinny_linear(x, weight, plan, workspace, out_MN=out, **options)
    assert relative_error(y, reference) < tolerance(x.dtype)
    if "residual_MN" not in options:
        assert y.data_ptr() == out.data_ptr()
    assert not workspace.arrived.any()  # ready for the next launch


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_plain_products(name: str, rows: int) -> None:
    for dtype in dtypes(PLANS[name]):
        check(PLANS[name], randn(rows, 96, dtype=dtype), randn(80, 96, dtype=dtype))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(72, 40), (20, 104)])
def test_sizes_that_tiles_do_not_divide(name: str, num_outputs: int, num_inputs: int) -> None:
    plan = PLANS[name]
    check(plan, randn(plan.block_rows, num_inputs), randn(num_outputs, num_inputs))
    check(plan, randn(plan.block_rows, num_inputs), randn(2 * num_outputs, num_inputs), activation="silu")


@pytest.mark.parametrize("name", PLANS)
def test_what_goes_around_the_product(name: str) -> None:
    plan, rows = PLANS[name], PLANS[name].block_rows
    for dtype in dtypes(plan):
        x, weight, bias = randn(rows, 64, dtype=dtype), randn(48, 64, dtype=dtype, scale=0.1), randn(48, dtype=dtype)
        check(plan, x, weight, bias_N=bias)
        check(plan, x, weight, activation="silu", bias_N=bias)
        check(plan, x, weight, activation="gelu_tanh")
        check(plan, x, weight, residual_MN=randn(rows, 48, dtype=dtype), bias_N=bias)


@pytest.mark.parametrize("plan", [VECTOR, VECTOR_2])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_of_the_input(plan: SkinnyPlan, offset: float) -> None:
    for dtype in dtypes(plan):
        x, weight = randn(plan.block_rows, 72, dtype=dtype, scale=3.0), randn(48, 72, dtype=dtype, scale=0.1)
        norm = randn(72, dtype=dtype)
        check(plan, x, weight, norm_weight_E=norm, eps=1e-5, norm_offset=offset)
        check(plan, x, weight, norm_weight_E=norm, eps=1e-5, norm_offset=offset, activation="silu")


@pytest.mark.parametrize("name", PLANS)
def test_weights_in_float8(name: str) -> None:
    plan = PLANS[name]
    stored, scales = quantize_weight(randn(48, 64, scale=0.1))
    check(plan, randn(plan.block_rows, 64, dtype=torch.float16), stored, weight_scale_N=scales)


@pytest.mark.parametrize("name", ["vector of 2", "matrix", "matrix, split"])
def test_a_row_has_the_same_bits_in_any_company_and_bad_numbers_stay_in_theirs(name: str) -> None:
    plan = PLANS[name]
    workspace = SkinnyWorkspace.allocate(DEVICE, parts_bytes=1 << 18, tiles=64)
    x, weight = randn(plan.block_rows, 64, dtype=torch.float16), randn(48, 64, dtype=torch.float16)
    together = skinny_linear(x, weight, plan, workspace)
    for row in range(plan.block_rows):
        assert torch.equal(skinny_linear(x[row : row + 1], weight, plan, workspace)[0], together[row])
    x[1] = float("nan")
    beside = skinny_linear(x, weight, plan, workspace)
    assert beside[1].isnan().all()
    assert torch.equal(beside[0], together[0]) and torch.equal(beside[2:], together[2:])


@pytest.mark.parametrize("name", PLANS)
def test_rows_that_lie_apart_and_what_lies_behind_them(name: str) -> None:
    plan = PLANS[name]
    memory = torch.full((plan.block_rows + 1, 128), float("nan"), device=DEVICE)
    rows = max(1, plan.block_rows - 1)
    memory[:rows, :64] = randn(rows, 64)
    check(plan, memory[:rows, :64], randn(48, 64))


def test_the_residual_is_changed_in_place() -> None:
    x, weight, residual = randn(1, 64), randn(48, 64), randn(1, 48)
    want = skinny_linear_reference(x, weight, residual_MN=residual)
    y = skinny_linear(x, weight, VECTOR, residual_MN=residual)
    assert y.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(residual, want)


def test_what_a_plan_cannot_do_is_refused() -> None:
    x, weight = randn(9, 64), randn(48, 64)
    with pytest.raises(ValueError, match="9 rows are more"):
        skinny_linear(x, weight, VECTOR_2)
    with pytest.raises(ValueError, match="bytes of workspace"):
        skinny_linear(x, weight, MATRIX_SPLIT, SkinnyWorkspace.allocate(DEVICE, parts_bytes=64, tiles=64))
    with pytest.raises(ValueError, match="only vector plans"):
        skinny_linear(x, weight, MATRIX, norm_weight_E=randn(64))


LLAMA_WEIGHTS = [(6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False)]
KIB = 1024


@pytest.mark.parametrize("card", [Card((8, 6), 99 * KIB, 84), Card((8, 0), 163 * KIB, 108), Card((9, 0), 227 * KIB, 132)])
@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_plans_fit_the_card_and_the_workspace(card: Card, weight_bytes: int) -> None:
    workspace = SkinnyWorkspace.allocate("cpu")
    for rows in (1, 2, 3, 4, 5, 8, 16, 17, 32, 64):
        for num_outputs, num_inputs, gated in LLAMA_WEIGHTS:
            plan = plan_skinny(rows, num_outputs, num_inputs, weight_bytes, gated, card)
            if plan is None:
                continue
            assert plan.block_rows >= rows
            if plan.kind == "matrix":
                tiles_bytes = plan.block_e * (plan.block_n * weight_bytes + plan.block_rows * 2)
                assert plan.num_stages >= 2 and plan.num_stages * tiles_bytes <= card.shared_bytes
                tiles = -(-num_outputs // plan.block_n)
                assert plan.splits == 1 or tiles <= workspace.arrived.numel()
                assert plan.splits == 1 or tiles * plan.splits * plan.block_n * plan.block_rows <= workspace.parts.numel()


def test_there_are_few_kernels_to_compile_for_a_model() -> None:
    card = Card((9, 0), 227 * KIB, 132)
    plans = {
        (plan_skinny(rows, num_outputs, num_inputs, 2, gated, card), num_inputs, gated)
        for rows in range(1, 65)
        for num_outputs, num_inputs, gated in LLAMA_WEIGHTS
    }
    assert len(plans) <= 24


@pytest.mark.parametrize(
    ("rows", "num_inputs", "weight_bytes"), [(0, 4096, 2), (65, 4096, 2), (1, 4100, 2), (1, 4096, 4)], ids=str
)
def test_products_that_are_left_to_cublas(rows: int, num_inputs: int, weight_bytes: int) -> None:
    assert plan_skinny(rows, 4096, num_inputs, weight_bytes, False, Card((9, 0), 227 * KIB, 132)) is None
