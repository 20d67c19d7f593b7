"""int8 products: rounding and scales by hand, and three ways to multiply (reference, fallback, compiled) that agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels import cpu_ops
from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.int8 import INT8_GROUP, int8_linear_reference, int8_matmul, quantize_activations, quantize_weight

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x [T, K] and a float weight [N, K]
SHAPES = [(1, 33, 7), (2, 40, 63), (3, 16, 64), (5, 70, 65), (1, 96, 576), (17, 300, 576), (40, 2100, 200)]


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return int8_linear_reference(x, *quantize_weight(weight))


def fallback(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return int8_matmul(x, *quantize_weight(weight))


@pytest.fixture(params=["fallback", "compiled"])
def product(request: pytest.FixtureRequest) -> Product:
    if request.param == "fallback":
        return fallback
    if reason := unavailable_reason():
        pytest.skip(reason)
    kernels = cpu_kernels()
    return lambda x, weight: kernels.linear(x, kernels.pack(weight, "int8"))


def example(num_tokens: int, rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(num_tokens, size, generator=generator), torch.randn(rows, size, generator=generator) / size**0.5


def test_the_group_is_the_compiled_one() -> None:
    assert INT8_GROUP == cpu_ops.INT8_GROUP


def test_values_are_rounded_to_even_and_scaled_by_group() -> None:
    x = torch.zeros(2, 70)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # a scale of 1
    x[0, 64:67] = torch.tensor([-254.0, 3.0, 5.0])  # the short last group's is 2: 1.5 and 2.5
    stored, scales = quantize_activations(x)
    assert stored.shape == (2, 70) and stored.dtype == torch.int8
    assert stored[0, :4].tolist() == [127, 0, 2, -2] and stored[0, 64:67].tolist() == [-127, 2, 2]
    assert scales.tolist() == [[1.0, 2.0], [0.0, 0.0]] and not stored[1].any()


def test_a_weight_has_one_scale_a_row() -> None:
    weight = torch.randn(5000, 100)
    weight[7] = 0
    stored, scales = quantize_weight(weight.bfloat16())
    assert stored.shape == (5000, 100) and scales.shape == (5000, 1)
    error = (stored * scales - weight.bfloat16().float()).abs()
    assert (error <= scales * 0.5001).all() and not stored[7].any()


@pytest.mark.parametrize(("num_tokens", "rows", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_the_reference(num_tokens: int, rows: int, size: int, dtype: torch.dtype, product: Product) -> None:
    x, weight = (part.to(dtype) for part in example(num_tokens, rows, size))
    expected = reference(x, weight)
    actual = product(x, weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    exact = x.double() @ weight.double().t()
    assert (actual - exact).norm() / exact.norm() < 0.015


def test_tiny_huge_and_zero_inputs(product: Product) -> None:
    x, weight = example(5, 40, 200)
    x[0] = 0
    x[1, 3] = 1e4
    x[2] *= 1e-30
    x[3] *= 1e30
    weight[4] = 0
    actual, expected = product(x, weight), reference(x, weight)
    for row in range(5):
        scale = max(float(expected[row].abs().max()), 1e-38)
        torch.testing.assert_close(actual[row] / scale, expected[row] / scale, rtol=1e-5, atol=1e-5)
    assert not actual[0].any() and not actual[:, 4].any()


def test_a_huge_input_costs_its_own_group_alone(product: Product) -> None:
    x, weight = example(3, 40, 200)
    weight[:, :64] = 0
    good = product(x, weight)
    x[:, 3] = 1e4
    assert torch.equal(product(x, weight), good)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 5, 63, 64, 199])
def test_a_bad_number_shows_in_its_own_row_alone(value: float, position: int, product: Product) -> None:
    x, weight = example(3, 40, 200)
    good = product(x, weight)
    x[1, position] = value
    bad = product(x, weight)
    assert not bad[1].isfinite().any() and not reference(x, weight)[1].isfinite().any()
    assert torch.equal(bad[[0, 2]], good[[0, 2]])


def test_a_bad_weight_shows(product: Product) -> None:
    x, weight = example(3, 40, 200)
    weight[5, 9] = float("nan")
    finite = product(x, weight).isfinite()
    assert not finite[:, 5].any() and finite[:, :5].all() and finite[:, 6:].all()
