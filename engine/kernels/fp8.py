"""Rows in float8_e4m3fn with one float32 scale each: weights once at load, activations in every step.

A row's scale is its largest magnitude over 448, the format's largest finite value (Micikevicius et al., "FP8 Formats for Deep
Learning", 2022), so that value = stored * scale. Nothing of a row depends on another row: neither batching nor bad numbers
beside it change what a request gets.
"""

from __future__ import annotations

import torch

from engine.kernels.compiler import tl, triton

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_SMALLEST_SCALE = 1e-12
"""The scale of a row of zeros; any other row of a 16-bit format has a larger one, but for float16's smallest subnormals."""
_MAX_TILE = 16_384


@triton.jit
def _bounded(x, LARGEST: tl.constexpr):
    """NaN stays NaN: the device's minimum and maximum would make a number of it, and nobody would know."""
    return tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    stride_x,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, TILE)
    x_row = x_ptr + row * stride_x
    if CHANNELS <= TILE:  # the row stays in registers
        x = tl.load(x_row + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, SMALLEST)
        stored = _bounded(x * (1.0 / scale), LARGEST).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * CHANNELS + channel, stored, mask=channel < CHANNELS)
    else:
        largest = tl.zeros([TILE], tl.float32)
        for start in range(0, CHANNELS, TILE):
            x = tl.load(x_row + start + channel, mask=start + channel < CHANNELS, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        scale = tl.maximum(tl.max(largest, axis=0) / LARGEST, SMALLEST)
        for start in range(0, CHANNELS, TILE):
            inside = start + channel < CHANNELS
            x = tl.load(x_row + start + channel, mask=inside, other=0.0).to(tl.float32)
            stored = _bounded(x * (1.0 / scale), LARGEST).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * CHANNELS + start + channel, stored, mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x -> float8_e4m3fn [T, E] and float32 scales [T, 1], in one pass. Needs compute capability 8.9."""
    rows, channels = x_TE.shape
    out = torch.empty((rows, channels), dtype=FP8, device=x_TE.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x_TE.device)
    tile = min(triton.next_power_of_2(channels), _MAX_TILE)
    if rows > 0:
        _quantize_rows_kernel[(rows,)](
            x_TE,
            out,
            scales,
            # The stride of a single row means nothing, and must not pick another specialisation of the kernel.
            x_TE.stride(0) if rows > 1 else channels,
            CHANNELS=channels,
            TILE=tile,
            LARGEST=FP8_MAX,
            SMALLEST=_SMALLEST_SCALE,
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return out, scales


def quantize_rows_reference(x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    x = x_TE.float()
    scales = (x.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp_min(_SMALLEST_SCALE)
    return (x * (1.0 / scales)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def quantize_weight(weight_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight -> float8_e4m3fn [N, E] and a float32 scale for each output row [N, 1]."""
    if weight_NE.is_cuda:
        return quantize_rows(weight_NE)
    # Some rows at a time: the float32 copy of a large lm_head would take gigabytes.
    parts = [quantize_rows_reference(rows) for rows in weight_NE.split(4096)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([scales for _, scales in parts])


def fp8_matmul(
    x_TE: torch.Tensor, weight_NE: torch.Tensor, weight_scale_N1: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b in x's dtype, [T, N], with x quantised here and both operands multiplied in float8."""
    x_fp8, x_scale = quantize_rows(x_TE) if x_TE.is_cuda else quantize_rows_reference(x_TE)
    # Row-wise scales are known to every version with a bfloat16 result alone.
    y = torch._scaled_mm(x_fp8, weight_NE.t(), x_scale, weight_scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    y = y.to(x_TE.dtype)
    return y if bias_N is None else y.add_(bias_N)


def fp8_obstacle(device: torch.device, weight_NE: torch.Tensor) -> str | None:
    """Why a product with this weight cannot run in float8 on this device, as a sentence; None if it can."""
    reason = None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"need a GPU of compute capability 8.9 (Ada) or later, and this one has {major}.{minor}"
    elif weight_NE.shape[0] % 16 or weight_NE.shape[1] % 16:
        reason = f"need sizes divisible by 16, and a weight here is {tuple(weight_NE.shape)}"
    return None if reason is None else f"FP8 products {reason}: leave out --quantization fp8"
