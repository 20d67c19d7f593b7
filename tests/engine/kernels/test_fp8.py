"""Rows in float8 with a scale each."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import fp8
from engine.kernels.fp8 import FP8, FP8_MAX, fp8_matmul, quantize_rows, quantize_rows_reference, quantize_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# A float8 value has four significant bits. The card rounds to them. Triton's interpreter rounds too, but loses the carry: what
# should become the next power of two becomes half of it, and how many such values a test has drawn decides its error.
TOLERANCE = 0.03 if DEVICE == "cuda" else 0.09


pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="FP8 needs compute capability 8.9"
)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 200, 512])
def test_quantized_rows_are_those_of_the_reference(dtype: torch.dtype, channels: int) -> None:
    x = torch.randn(5, channels, device=DEVICE, dtype=dtype) * torch.logspace(-3, 3, 5, device=DEVICE).unsqueeze(1).to(dtype)
    stored, scales = quantize_rows(x)
    want, want_scales = quantize_rows_reference(x)
    assert stored.dtype == FP8 and scales.shape == (5, 1)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
    if DEVICE == "cuda":  # a quotient on the border of two float8 values may fall to either side
        assert (stored.float() != want.float()).float().mean() < 0.02
    assert relative_error(stored.float() * scales, x) < TOLERANCE


def test_long_rows_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_MAX_TILE", 64)
    x = torch.randn(3, 200, device=DEVICE)
    stored, scales = quantize_rows(x)
    torch.testing.assert_close(scales, quantize_rows_reference(x)[1], rtol=1e-6, atol=0)
    assert relative_error(stored.float() * scales, x) < TOLERANCE


def test_rows_that_lie_apart() -> None:
    x = torch.randn(4, 96, device=DEVICE)[:, :32]
    stored, scales = quantize_rows(x)
    assert relative_error(stored.float() * scales, x) < TOLERANCE


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scales = quantize_rows(torch.zeros(2, 32, device=DEVICE))
    assert torch.equal(stored.float() * scales, torch.zeros(2, 32, device=DEVICE))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_stay_in_their_row(bad: float) -> None:
    x = torch.randn(3, 64, device=DEVICE)
    clean, clean_scales = quantize_rows(x)
    x[1, 7] = bad
    stored, scales = quantize_rows(x)
    for row in (0, 2):
        assert torch.equal(stored[row].float(), clean[row].float()) and scales[row] == clean_scales[row]


def test_the_largest_value_of_a_row_is_the_largest_of_the_format() -> None:
    x = torch.tensor([[1.0, -3.0, 0.5, 0.25] * 4], device=DEVICE)
    stored, scales = quantize_rows(x)
    assert stored.float().abs().max() == FP8_MAX
    torch.testing.assert_close(scales, torch.tensor([[3.0 / FP8_MAX]], device=DEVICE))


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_near_the_one_in_full_precision(bias: bool) -> None:
    x = torch.randn(7, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(48, 64, device=DEVICE, dtype=torch.bfloat16)
    bias_N = torch.randn(48, device=DEVICE, dtype=torch.bfloat16) if bias else None
    y = fp8_matmul(x, *quantize_weight(weight), bias_N)
    assert y.dtype == torch.bfloat16
    want = torch.nn.functional.linear(x.float(), weight.float(), None if bias_N is None else bias_N.float())
    assert relative_error(y, want) < 0.06


def test_a_weight_whose_sizes_do_not_fit_is_refused_with_the_reason() -> None:
    reason = fp8.fp8_obstacle(torch.device("cpu"), torch.empty(30, 64))
    assert reason is not None and "divisible by 16" in reason
    assert fp8.fp8_obstacle(torch.device("cpu"), torch.empty(32, 64)) is None


def test_a_card_before_ada_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    reason = fp8.fp8_obstacle(torch.device("cuda"), torch.empty(32, 64))
    assert reason is not None and "8.9" in reason and "8.0" in reason
