"""W8A8 products on a CPU in plain torch: the reference of the compiled int8 kernels (`cpu/linear.h`), and the way without them.

A weight has a float32 scale for each output row. An activation has one for each `INT8_GROUP` inputs of a token, because a few
large channels would take the others' digits: one scale a token costs the demo model five times as much in perplexity. A scale
is the largest magnitude over 127, values are rounded to nearest with ties to even, and a group's products are summed exactly.

Nothing of a row depends on another row. A NaN or infinity makes its group's scale one, so its whole row comes out as NaN.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

INT8_GROUP = 64
"""Inputs of a token that share a scale."""

_LARGEST = 127.0
_ROWS_AT_ONCE = 2048
"""Rows of a weight that are float32 at a time: few enough to stay in the cache, enough to keep the product a large one."""


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight -> int8 [N, K] and a float32 scale for each output row, [N, 1]."""
    # Some rows at a time: the float32 copy of a large lm_head would take gigabytes.
    parts = [_quantize(rows.float()) for rows in weight_NK.split(4096)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([scales for _, scales in parts])


def quantize_activations(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x -> int8 [T, K] and float32 scales [T, ceil(K / INT8_GROUP)]; the last group may be a short one."""
    num_tokens, size = x_TK.shape
    x_TGC = F.pad(x_TK.float(), (0, -size % INT8_GROUP)).view(num_tokens, -(-size // INT8_GROUP), INT8_GROUP)
    stored, scales = _quantize(x_TGC)
    return stored.flatten(1)[:, :size], scales[..., 0]


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., C] -> int8 and scales [..., 1]. What is too small for a float32 scale becomes zero."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    # One division, as the kernels do it: `number / tensor` would be two roundings, and ties go another way.
    inverse = torch.where(largest > 0, torch.full_like(largest, _LARGEST) / largest, 0.0)
    stored = (x * inverse).round()
    return stored.masked_fill(~stored.isfinite(), 0.0).to(torch.int8), largest / _LARGEST


def int8_linear_reference(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, weight_scale_N1: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b in float32, [T, N], group by group as the compiled kernels do it. weight_NK: int8."""
    stored, scales_TG = quantize_activations(x_TK)
    total_TN = torch.zeros(x_TK.shape[0], weight_NK.shape[0])
    for group, (x, weight) in enumerate(zip(stored.split(INT8_GROUP, 1), weight_NK.split(INT8_GROUP, 1), strict=True)):
        # Exact in any order: 64 * 127 * 127 is below 2^24, up to which float32 holds every integer.
        total_TN += (x.float() @ weight.float().t()) * scales_TG[:, group, None]
    total_TN *= weight_scale_N1.t()
    return total_TN if bias_N is None else total_TN + bias_N.float()


def int8_matmul(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, weight_scale_N1: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The same, equal but for the rounding of float32 sums, in a faster way: some rows of the weight at a time become float32.

    On AVX2 `torch._int_mm` for every group takes 3 to 20 times as long for 1 to 4 rows of x, and 30 to 50 times for 256. Beside
    the dense float32 weight this is as fast for few rows, which wait for memory, and a tenth to a third slower for many.
    """
    stored, scales_TG = quantize_activations(x_TK)
    size = x_TK.shape[1]
    x = stored * scales_TG.repeat_interleave(INT8_GROUP, 1)[:, :size]
    y_TN = x.new_empty(x.shape[0], weight_NK.shape[0])
    for rows, out in zip(weight_NK.split(_ROWS_AT_ONCE), y_TN.split(_ROWS_AT_ONCE, 1), strict=True):
        torch.mm(x, rows.float().t(), out=out)
    y_TN *= weight_scale_N1.t()
    return y_TN if bias_N is None else y_TN.add_(bias_N)
