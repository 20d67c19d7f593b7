"""The one class of every linear: source names, output rows of each source, weight format.

Several linears that read the same input (q, k, v; gate, up) become one with their rows on top of each other, so that the
input is read once and the product is large. The sources stay known by name and by rows: whatever is loaded, sharded or
adapted by name finds its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

WeightFormat = Literal["dense", "fp8"]


class Linear(nn.Module):
    """y = x W^T + b, callable in place of an nn.Linear.

    weight: [N, E], a frozen parameter. bias: [N] or None. sources: names of the linears whose rows it holds, top to
    bottom; slices: the rows of each. weight_format: "dense", in the dtype of the activations; "fp8", in float8_e4m3fn with one
    float32 scale a row in `weight_scale` [N, 1].
    """

    def __init__(
        self, weight_NE: torch.Tensor, bias_N: torch.Tensor | None, sources: Sequence[str], rows: Sequence[int] | None = None
    ) -> None:
        """rows: output rows of each source, needed where there are several; they must add up to N."""
        super().__init__()
        num_rows = tuple(rows) if rows is not None else (weight_NE.shape[0],)
        if len(num_rows) != len(sources) or sum(num_rows) != weight_NE.shape[0]:
            raise ValueError(f"rows {num_rows} of sources {tuple(sources)} do not make the weight's {weight_NE.shape[0]} rows")
        starts = [sum(num_rows[:index]) for index in range(len(num_rows))]
        self.sources: tuple[str, ...] = tuple(sources)
        self.slices: tuple[slice, ...] = tuple(
            slice(start, start + count) for start, count in zip(starts, num_rows, strict=True)
        )
        self.out_features, self.in_features = weight_NE.shape
        self.weight_format: WeightFormat = "dense"
        self.weight = _frozen(weight_NE)
        self.bias = None if bias_N is None else _frozen(bias_N)
        self.register_buffer("weight_scale", None)

    @classmethod
    def from_linear(cls, linear: Any, name: str) -> Linear:
        """The product of `linear`, an nn.Linear or like one, on the same memory: tied weights stay tied."""
        return cls(linear.weight.detach(), _bias(linear), (name,))

    @classmethod
    def merge(cls, linears: Sequence[Any], names: Sequence[str] | None = None) -> Linear:
        """One linear with the rows of all, in order. names: of the linears, where they are not of this class and so have none.

        The sources' parameters become views of the merged ones: they go on working, and their own memory is free again, so
        that merging layer by layer needs no more than one layer's room. Raises ValueError where inputs or dtypes differ.
        """
        weights = [linear.weight.detach() for linear in linears]
        first = weights[0]
        if any(weight.shape[1] != first.shape[1] or weight.dtype != first.dtype for weight in weights):
            raise ValueError(f"linears of different inputs or dtypes: {[(tuple(w.shape), w.dtype) for w in weights]}")
        rows = [weight.shape[0] for weight in weights]
        if names is None:
            names = [name for linear in linears for name in linear.sources]
        merged = cls(
            first.new_empty((sum(rows), first.shape[1])),
            first.new_zeros(sum(rows)) if any(_bias(linear) is not None for linear in linears) else None,
            names,
            [
                part.stop - part.start
                for linear in linears
                for part in getattr(linear, "slices", (slice(0, len(linear.weight)),))
            ],
        )
        del weights, first  # or the loop below could free nothing
        start = 0
        for linear, count in zip(linears, rows, strict=True):
            merged.weight[start : start + count].copy_(linear.weight)
            linear.weight.data = merged.weight.data[start : start + count]
            bias = _bias(linear)
            if bias is not None and merged.bias is not None:
                merged.bias[start : start + count].copy_(bias)
                linear.bias.data = merged.bias.data[start : start + count]
            start += count
        return merged

    def forward(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., E] -> [..., N]. out: [T, N] memory for the result, T the product of the leading sizes."""
        x_TE = x.reshape(-1, self.in_features)
        y_TN = F.linear(x_TE, self.weight, self.bias)
        if out is not None:
            y_TN = out.copy_(y_TN)
        return y_TN.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{'+'.join(self.sources)}: {self.in_features} -> {self.out_features}, bias={bias}, {self.weight_format}"


def _bias(linear: Any) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
