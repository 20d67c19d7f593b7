"""The one class of every linear: source names, output rows of each source, weight format.

Several linears that read the same input (q, k, v; gate, up) become one with their rows on top of each other, so that the
input is read once and the product is large. The sources stay known by name and by rows: whatever is loaded, sharded or
adapted by name finds its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from engine.kernels import activations, norms
from engine.kernels.fp8 import fp8_matmul, fp8_obstacle, quantize_weight
from engine.kernels.skinny_linear import MAX_ROWS, Activation, SkinnyDevice, SkinnyPlan, skinny_linear

WeightFormat = Literal["dense", "fp8"]


class RowNorm(Protocol):
    """An RMSNorm as engine.kernels.norms takes it."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def eps(self) -> float: ...
    @property
    def offset(self) -> float: ...
    @property
    def round_before_weight(self) -> bool: ...


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
        self.weight_scale: torch.Tensor | None
        self.register_buffer("weight_scale", None)
        self._skinny: SkinnyDevice | None = None
        self._plans: dict[tuple[int, bool], SkinnyPlan | None] = {}
        # Whose weights are views of this one. A tuple: they are not part of this module.
        self._sharers: tuple[Any, ...] = ()

    @classmethod
    def from_linear(cls, linear: Any, name: str) -> Linear:
        """The product of `linear`, an nn.Linear or like one, on the same memory: tied weights stay tied."""
        made = cls(linear.weight.detach(), _bias(linear), (name,))
        made._sharers = (linear,)
        return made

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
        if any(getattr(linear, "weight_scale", None) is not None for linear in linears):
            raise ValueError("linears are merged before they are quantized")
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
        merged._sharers = tuple(linears)
        return merged

    def quantize(self) -> None:
        """Turn the weight into FP8, a scale for each row. What shares the old weight's memory loses it and works no more.

        Raises ValueError, with the reason, where card or sizes do not allow FP8 products.
        """
        if self.weight_format == "fp8":
            return
        obstacle = fp8_obstacle(self.weight.device, self.weight)
        if obstacle is not None:
            raise ValueError(obstacle)
        stored, scale = quantize_weight(self.weight)
        for sharer in self._sharers:
            sharer.weight.data = sharer.weight.data.new_empty(0)
        self._sharers = ()
        self.weight = _frozen(stored)
        self.weight_scale = scale
        self.weight_format = "fp8"
        self._plans = {}

    def use_skinny(self, device: SkinnyDevice | None) -> None:
        """From now on multiply few rows by the kernels of engine.kernels.skinny_linear, where they are the faster way."""
        self._skinny = device
        self._plans = {}

    def fuses(self, rows: int, *, norm: bool = False, gated: bool = False) -> bool:
        """Whether `forward` takes so many rows, with what goes around the product, as one kernel."""
        plan = self._plan(rows, gated)
        return plan is not None and (plan.kind == "vector" or not norm)

    def forward(
        self,
        x: torch.Tensor,
        *,
        norm: RowNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """activation(norm(x) W^T + b): x [..., E] -> [..., N]; with an activation, whose gate rows come first, [..., N / 2].

        residual: [..., N], to which the result is added in place; it is returned. out: memory [T, N] (or [T, N / 2]) for the
        result, T the product of x's leading sizes.
        """
        x_TE = x.reshape(-1, self.in_features)
        plan = self._plan(x_TE.shape[0], activation is not None)
        if plan is not None and norm is not None and plan.kind != "vector":
            x_TE, norm = _normed(x_TE, norm), None
        if plan is not None and self._skinny is not None:
            y = skinny_linear(
                x_TE,
                self.weight,
                plan,
                self._skinny.workspace,
                weight_scale_N=self.weight_scale,
                bias_N=self.bias,
                norm_weight_E=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                norm_offset=0.0 if norm is None else norm.offset,
                activation=activation,
                residual_MN=None if residual is None else residual.view(-1, self.out_features),
                out_MN=out,
                pdl=self._skinny.card.has_dependent_launch,
            )
        else:
            last = activation is None and residual is None
            y = self._product(x_TE if norm is None else _normed(x_TE, norm), out if last else None)
            if activation is not None:
                y = _gated(y, activation, None if residual is not None else out)
            if residual is not None:
                y = residual.view(y.shape).add_(y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, x_TE: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self.weight_scale is not None:
            y = fp8_matmul(x_TE, self.weight, self.weight_scale, self.bias)
            return y if out is None else out.copy_(y)
        if out is None:
            return F.linear(x_TE, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x_TE, self.weight.t(), out=out)
        return torch.addmm(self.bias, x_TE, self.weight.t(), out=out)

    def _plan(self, rows: int, gated: bool) -> SkinnyPlan | None:
        if self._skinny is None or rows > MAX_ROWS:
            return None
        if (rows, gated) not in self._plans:
            self._plans[rows, gated] = self._skinny.plan(
                rows, self.out_features, self.in_features, self.weight.dtype.itemsize, gated
            )
        return self._plans[rows, gated]

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{'+'.join(self.sources)}: {self.in_features} -> {self.out_features}, bias={bias}, {self.weight_format}"


def _normed(x_TE: torch.Tensor, norm: RowNorm) -> torch.Tensor:
    apply = norms.rms_norm if x_TE.is_cuda else norms.rms_norm_reference
    return apply(x_TE, norm.weight, norm.eps, offset=norm.offset, round_before_weight=norm.round_before_weight)


def _gated(y_T2F: torch.Tensor, activation: Activation, out: torch.Tensor | None) -> torch.Tensor:
    if y_T2F.is_cuda:
        kernel = activations.silu_mul if activation == "silu" else activations.gelu_tanh_mul
        return kernel(y_T2F, out)
    reference = activations.silu_mul_reference if activation == "silu" else activations.gelu_tanh_mul_reference
    y = reference(y_T2F)
    return y if out is None else out.copy_(y)


def _bias(linear: Any) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
