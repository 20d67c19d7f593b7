"""Gated activations: act(gate) * up over a merged gate/up projection, as SwiGLU and GEGLU (Shazeer, 2020) want it.

Computed in float32; act(gate) is rounded to the model's dtype before the product, as two separate modules would.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.kernels.compiler import tl, triton

_TILE = 2048


def silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, [..., F] of [..., 2F], whose first half is the gate."""
    return _launch(gate_up_T2F, out_TF, "silu")


def gelu_tanh_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(gate) * up, gelu in its tanh approximation, [..., F] of [..., 2F], whose first half is the gate."""
    return _launch(gate_up_T2F, out_TF, "gelu_tanh")


def gelu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(gate) * up, [..., F] of [..., 2F], whose first half is the gate."""
    return _launch(gate_up_T2F, out_TF, "gelu")


def silu_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate.float()).to(gate.dtype) * up


def gelu_tanh_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.gelu(gate.float(), approximate="tanh").to(gate.dtype) * up


def gelu_mul_reference(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return F.gelu(gate.float()).to(gate.dtype) * up


def _launch(gate_up: torch.Tensor, out: torch.Tensor | None, activation: str) -> torch.Tensor:
    features = gate_up.shape[-1] // 2
    if out is None:
        out = gate_up.new_empty(*gate_up.shape[:-1], features)
    gate_up_2d, out_2d = gate_up.view(-1, 2 * features), out.view(-1, features)
    assert gate_up_2d.stride(1) == out_2d.stride(1) == 1
    rows = gate_up_2d.shape[0]
    if rows == 0:
        return out
    tile = min(triton.next_power_of_2(features), _TILE)
    tiles = triton.cdiv(features, tile)
    _gated_kernel[(rows * tiles,)](
        gate_up_2d,
        out_2d,
        # The stride of a single row means nothing, and must not pick another specialisation of the kernel.
        gate_up_2d.stride(0) if rows > 1 else 2 * features,
        out_2d.stride(0) if rows > 1 else features,
        FEATURES=features,
        TILES=tiles,
        TILE=tile,
        ACTIVATION=activation,
        num_warps=min(max(tile // 256, 1), 8),
    )
    return out


@triton.jit
def _gated_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    out_stride,
    FEATURES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One program a tile of a row; a row's tiles are neighbours."""
    SQRT_2_OVER_PI: tl.constexpr = 0.7978845608028654
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    row = (tl.program_id(0) // TILES).to(tl.int64)
    features = tl.program_id(0) % TILES * TILE + tl.arange(0, TILE)
    mask = features < FEATURES
    gate_ptr = gate_up_ptr + row * gate_up_stride + features
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + FEATURES, mask=mask, other=0.0)
    if ACTIVATION == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), which keeps the small values of the left tail.
        inner = SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        activated = gate / (1.0 + tl.exp(-2.0 * inner))
    else:
        activated = 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    activated = activated.to(up.dtype).to(tl.float32)
    out = (activated * up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + features, out, mask=mask)
