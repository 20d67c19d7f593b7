"""RMSNorm (Zhang and Sennrich, NeurIPS 2019), alone and with the residual sums that surround it in a decoder layer.

Two roundings are in use. Llama normalises in float32, rounds to the model's dtype and multiplies by the weight
(round_before_weight=True); Gemma multiplies by 1 + weight in float32 and rounds once (offset=1.0, round_before_weight=False).
"""

from __future__ import annotations

import torch

from engine.kernels.compiler import tl, triton

_MAX_TILE = 16_384
"""Channels that one program holds at once; longer rows are walked several times."""


def rms_norm(
    x_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    out_TE: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """x / sqrt(mean(x ** 2) + eps) * (offset + weight), [..., E] in x's dtype. `out_TE` may be x itself."""
    return _launch(x_TE, None, None, weight_E, eps, out_TE, offset, round_before_weight)


def add_rms_norm(
    x_TE: torch.Tensor,
    residual_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    out_TE: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """residual += x, in place and rounded to its dtype; returns rms_norm(residual). `out_TE` may be x itself."""
    return _launch(x_TE, None, residual_TE, weight_E, eps, out_TE, offset, round_before_weight)


def norm_add_norm(
    x_TE: torch.Tensor,
    post_weight_E: torch.Tensor,
    residual_TE: torch.Tensor,
    next_weight_E: torch.Tensor,
    eps: float,
    out_TE: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """residual += rms_norm(x, post_weight), in place; returns rms_norm(residual, next_weight): Gemma's sandwich norms."""
    return _launch(x_TE, post_weight_E, residual_TE, next_weight_E, eps, out_TE, offset, round_before_weight)


def rms_norm_reference(
    x_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    round_before_weight: bool = True,
) -> torch.Tensor:
    """The definition of rms_norm, in plain torch."""
    x = x_TE.float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if round_before_weight:
        normed = normed.to(x_TE.dtype).float()
    return (normed * (weight_E.float() + offset)).to(x_TE.dtype)


def _launch(
    x: torch.Tensor,
    post_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    offset: float,
    round_before_weight: bool,
) -> torch.Tensor:
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels = x.shape[-1]
    x_2d, out_2d = x.view(-1, channels), out.view(-1, channels)
    residual_2d = x_2d if residual is None else residual.view(-1, channels)
    assert x_2d.stride(1) == out_2d.stride(1) == residual_2d.stride(1) == weight.stride(0) == 1
    if x_2d.shape[0] == 0:
        return out
    tile = min(triton.next_power_of_2(channels), _MAX_TILE)
    _rms_norm_kernel[(x_2d.shape[0],)](
        x_2d,
        residual_2d,
        weight if post_weight is None else post_weight,
        weight,
        out_2d,
        _row_stride(x_2d),
        _row_stride(residual_2d),
        _row_stride(out_2d),
        eps,
        CHANNELS=channels,
        TILE=tile,
        OFFSET=offset,
        ROUND_BEFORE_WEIGHT=round_before_weight,
        HAS_RESIDUAL=residual is not None,
        HAS_POST_NORM=post_weight is not None,
        num_warps=min(max(tile // 512, 1), 16),
    )
    return out


def _row_stride(x_2d: torch.Tensor) -> int:
    # The stride of a single row means nothing, and must not pick another specialisation of the kernel.
    return x_2d.stride(0) if x_2d.shape[0] > 1 else x_2d.shape[1]


@triton.jit
def _scale(x, mean_square, weight, eps, dtype: tl.constexpr, OFFSET: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr):
    normed = x * tl.rsqrt(mean_square + eps)
    if ROUND_BEFORE_WEIGHT:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * (weight + OFFSET)).to(dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    post_weight_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
):
    """One program a row. A row of one tile stays in registers; a longer one is read again for each of its norms."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    out_ptr += row * out_stride
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    channels = tl.arange(0, TILE)
    if CHANNELS <= TILE:
        mask = channels < CHANNELS
        # All loads come before the sums, which wait for them.
        x = tl.load(x_ptr + channels, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + channels, mask=mask, other=0.0).to(tl.float32)
            if HAS_POST_NORM:
                post_weight = tl.load(post_weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
                mean_square = tl.sum(x * x, axis=0) / CHANNELS
                x = _scale(x, mean_square, post_weight, eps, dtype, OFFSET, ROUND_BEFORE_WEIGHT).to(tl.float32)
            total = (residual + x).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + channels, total, mask=mask)
            x = total.to(tl.float32)
        mean_square = tl.sum(x * x, axis=0) / CHANNELS
        tl.store(out_ptr + channels, _scale(x, mean_square, weight, eps, dtype, OFFSET, ROUND_BEFORE_WEIGHT), mask=mask)
    else:
        squares = tl.zeros((TILE,), tl.float32)
        if HAS_POST_NORM:
            for start in range(0, CHANNELS, TILE):
                x = tl.load(x_ptr + start + channels, mask=start + channels < CHANNELS, other=0.0).to(tl.float32)
                squares += x * x
            post_mean_square = tl.sum(squares, axis=0) / CHANNELS
            squares = tl.zeros((TILE,), tl.float32)
        for start in range(0, CHANNELS, TILE):
            mask = start + channels < CHANNELS
            x = tl.load(x_ptr + start + channels, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                if HAS_POST_NORM:
                    post_weight = tl.load(post_weight_ptr + start + channels, mask=mask, other=0.0).to(tl.float32)
                    x = _scale(x, post_mean_square, post_weight, eps, dtype, OFFSET, ROUND_BEFORE_WEIGHT).to(tl.float32)
                residual = tl.load(residual_ptr + start + channels, mask=mask, other=0.0).to(tl.float32)
                total = (residual + x).to(residual_ptr.dtype.element_ty)
                tl.store(residual_ptr + start + channels, total, mask=mask)
                x = total.to(tl.float32)
            squares += x * x
        mean_square = tl.sum(squares, axis=0) / CHANNELS
        source_ptr = x_ptr
        if HAS_RESIDUAL:
            source_ptr = residual_ptr
            tl.debug_barrier()  # the sums stored above are read again
        for start in range(0, CHANNELS, TILE):
            mask = start + channels < CHANNELS
            x = tl.load(source_ptr + start + channels, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + start + channels, mask=mask, other=0.0).to(tl.float32)
            normed = _scale(x, mean_square, weight, eps, dtype, OFFSET, ROUND_BEFORE_WEIGHT)
            tl.store(out_ptr + start + channels, normed, mask=mask)
