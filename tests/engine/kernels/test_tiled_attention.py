"""The references that the kernels are tested against: by tiles, by the definition, and torch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.kernels.tiled_attention import standard_attention, tiled_attention

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def qkv(
    queries: int = 37, keys: int = 50, heads: int = 6, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + 31 * keys)
    q, k, v = (
        torch.randn(n, h, dim, generator=generator, dtype=torch.float64)
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"is_causal": False},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks_H": torch.tensor([0.5, -20.0, 3.0, 1.0, 40.0, 0.0])},
    "all": {"window": 21, "softcap": 2.0, "sinks_H": torch.tensor([0.5, -20.0, 3.0, 1.0, 0.0, 2.0])},
}


@pytest.mark.parametrize("tile", [1, 8, 16, 64])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_tiles_change_nothing(features: dict[str, Any], tile: int) -> None:
    for queries, keys in ((37, 37), (37, 50), (1, 50), (16, 16)):
        q, k, v = qkv(queries, keys)
        expected = standard_attention(q, k, v, scaling=0.3, **features)
        torch.testing.assert_close(tiled_attention(q, k, v, scaling=0.3, tile=tile, **features), expected, **EXACT)


@pytest.mark.parametrize("attention", [standard_attention, tiled_attention])
@pytest.mark.parametrize("is_causal", [True, False])
def test_torch_agrees(attention: Any, is_causal: bool) -> None:
    q, k, v = qkv(40, 40)
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*by_head, is_causal=is_causal, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(attention(q, k, v, scaling=0.3, is_causal=is_causal), expected, **EXACT)


@pytest.mark.parametrize("attention", [standard_attention, tiled_attention])
def test_what_nobody_sees_may_be_anything(attention: Any) -> None:
    q, k, v = qkv(5, 30)
    expected = attention(q, k, v, scaling=0.3, window=4)
    k[:22], v[:22] = float("nan"), float("inf")
    torch.testing.assert_close(attention(q, k, v, scaling=0.3, window=4), expected, **EXACT)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = qkv(40, 40, dtype=torch.float32)
    out = tiled_attention(1e3 * q, 1e3 * k, v, scaling=1.0, tile=8)
    assert out.isfinite().all()
    torch.testing.assert_close(out, standard_attention(1e3 * q, 1e3 * k, v, scaling=1.0))


def test_low_precision_sums_in_float32() -> None:
    q, k, v = qkv(64, 64, dtype=torch.bfloat16)
    out = tiled_attention(q, k, v, scaling=0.3, tile=16)
    exact = standard_attention(q.double(), k.double(), v.double(), scaling=0.3)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() / exact.norm() < 3e-3, "no more than the result's own rounding"
