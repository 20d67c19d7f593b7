"""Gated activations against plain torch."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import activations

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where the device rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 2e-2}
NAMES = ["silu_mul", "gelu_tanh_mul", "gelu_mul"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2 * 32), (3, 2 * 2500), (2, 2 * 37)])
def test_against_torch(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 4).to(DEVICE, dtype)
    out = torch.full((shape[0], shape[1] // 2), float("nan"), dtype=dtype, device=DEVICE)
    assert getattr(activations, name)(x, out) is out
    expected = getattr(activations, f"{name}_reference")(x).double()
    assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_far_gates_are_finite(name: str) -> None:
    gate = torch.tensor([-3e38, -200.0, -12.0, -0.0, 0.0, 12.0, 200.0, 3e38], device=DEVICE)
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    out = getattr(activations, name)(x)
    torch.testing.assert_close(out, getattr(activations, f"{name}_reference")(x), rtol=2e-4, atol=1e-6)


def test_strided_rows_and_leading_dimensions() -> None:
    wide = torch.randn(1, 3, 100, device=DEVICE)
    x = wide[..., 20:84]
    out = activations.silu_mul(x)
    assert out.shape == (1, 3, 32)
    torch.testing.assert_close(out, activations.silu_mul_reference(x))
    assert activations.silu_mul(wide[:, :0]).shape == (1, 0, 50)
