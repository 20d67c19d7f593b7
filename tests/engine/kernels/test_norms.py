"""RMSNorm and its fused forms against plain torch."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import norms

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = {"offset": 0.0, "round_before_weight": True}
GEMMA = {"offset": 1.0, "round_before_weight": False}
# The interpreter cuts bfloat16 off where the device rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 2e-2}
SHAPES = [(1, 64), (3, 2048), (2, 100), (5, 1), (2, 577)]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("style", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, style: dict[str, float | bool]) -> None:
    x, weight = random(*shape, dtype=dtype, scale=3.0), random(shape[1], dtype=dtype)
    out = torch.full_like(x, float("nan"))
    assert norms.rms_norm(x, weight, 1e-5, out, **style) is out
    assert error(out, norms.rms_norm_reference(x, weight, 1e-5, **style)) < TOLERANCE[dtype]


@pytest.mark.parametrize("style", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, style: dict[str, float | bool]) -> None:
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    total = x + residual
    out = norms.add_rms_norm(x, residual, weight, 1e-5, **style)
    assert error(residual, total) <= (TOLERANCE[dtype] if DEVICE == "cpu" and dtype == torch.bfloat16 else 0)
    assert error(out, norms.rms_norm_reference(total, weight, 1e-5, **style)) < TOLERANCE[dtype]


@pytest.mark.parametrize("style", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_add_norm(shape: tuple[int, int], dtype: torch.dtype, style: dict[str, float | bool]) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    post_weight, next_weight = random(shape[1], dtype=dtype), random(shape[1], dtype=dtype)
    total = residual + norms.rms_norm_reference(x, post_weight, 1e-5, **style)
    out = norms.norm_add_norm(x, post_weight, residual, next_weight, 1e-5, **style)
    assert error(residual, total) < TOLERANCE[dtype]
    # Of the sum as it was stored: one that cancels to almost nothing is only as exact as what it is the sum of.
    assert error(out, norms.rms_norm_reference(residual, next_weight, 1e-5, **style)) < TOLERANCE[dtype]


@pytest.mark.parametrize("channels", [16_385, 40_000])
def test_rows_longer_than_a_tile(channels: int) -> None:
    x, residual = random(2, channels), random(2, channels)
    weight, next_weight = random(channels), random(channels)
    assert error(norms.rms_norm(x, weight, 1e-6), norms.rms_norm_reference(x, weight, 1e-6)) < 1e-6
    total, other = residual + x, residual.clone()
    out = norms.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert error(out, norms.rms_norm_reference(total, weight, 1e-6)) < 1e-6
    total = other + norms.rms_norm_reference(x, weight, 1e-6)
    out = norms.norm_add_norm(x, weight, other, next_weight, 1e-6)
    assert error(other, total) < 1e-6
    assert error(out, norms.rms_norm_reference(total, next_weight, 1e-6)) < 1e-6


def test_strided_rows_leading_dimensions_and_output_in_place() -> None:
    wide = random(4, 3 * 48)
    before = wide.clone()
    x, weight = wide[:, 48:96], random(48)
    expected = norms.rms_norm_reference(x, weight, 1e-6)
    assert error(norms.rms_norm(x, weight, 1e-6), expected) < 1e-6
    norms.rms_norm(x, weight, 1e-6, x)
    assert error(x, expected) < 1e-6
    assert torch.equal(wide[:, :48], before[:, :48]) and torch.equal(wide[:, 96:], before[:, 96:])

    x, residual = random(1, 5, 48), random(1, 5, 48)
    total = x + residual
    out = norms.add_rms_norm(x, residual, weight, 1e-6, x)
    assert out is x and out.shape == (1, 5, 48) and torch.equal(residual, total)
    assert error(x, norms.rms_norm_reference(total, weight, 1e-6)) < 1e-6


def test_no_rows() -> None:
    assert norms.rms_norm(random(0, 48), random(48), 1e-6).shape == (0, 48)
