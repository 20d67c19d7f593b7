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
from engine.kernels.cpu_ops import CpuKernels, Format, PackedLinear
from engine.kernels.fp8 import fp8_matmul, fp8_obstacle, quantize_weight
from engine.kernels.int8 import int8_matmul
from engine.kernels.int8 import quantize_weight as quantize_weight_int8
from engine.kernels.skinny_linear import MAX_ROWS, Activation, SkinnyDevice, SkinnyPlan, skinny_linear

WeightFormat = Literal["dense", "fp8", "packed", "int8"]
_TYPICAL_ROWS = 16  # of x: oneDNN's layout for these also suits one row and hundreds


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
    float32 scale a row in `weight_scale` [N, 1]; on a CPU "packed", in the order in which its products read it, and "int8"
    (`engine.kernels.int8`). What is packed is no longer in `weight`, which is then empty.
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
        self._packed: tuple[CpuKernels, PackedLinear] | None = None
        self._reordered: torch.Tensor | None = None  # oneDNN's form of the weight
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
        if any(getattr(linear, "weight_format", "dense") != "dense" for linear in linears):
            raise ValueError("linears are merged before they are quantized or packed")
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
        stored, self.weight_scale = quantize_weight(self.weight)
        self._replace_weight(stored, "fp8")
        self._plans = {}

    def pack(self, kernels: CpuKernels | None, format: Format) -> None:
        """On a CPU, bring the weight into the form that is multiplied fastest. What shares the old weight's memory as a source
        loses it and works no more; an embedding that is tied to it keeps it.

        kernels: the compiled ones, or None for what torch has: int8 by `int8_matmul`; else oneDNN's order of the weight in its
        own dtype, or where oneDNN has none for it on this CPU, the weight as it is. Raises ValueError, with the reason, where
        the kernels cannot hold the weight.
        """
        if self.weight_format != "dense":
            raise ValueError(f"a weight is packed once, and this one is {self.weight_format} already")
        if kernels is not None:
            weight = self.weight.float() if self.weight.dtype == torch.float16 else self.weight
            self._packed = kernels, kernels.pack(weight.detach().contiguous(), format, bias_N=self.bias)
            self._replace_weight(self.weight.new_empty(0), "int8" if format == "int8" else "packed")
        elif format == "int8":
            stored, self.weight_scale = quantize_weight_int8(self.weight)
            self._replace_weight(stored, "int8")
        else:
            self._reordered = _reordered(self.weight)
            if self._reordered is not None:
                self._replace_weight(self.weight.new_empty(0), "packed")

    def release(self) -> None:
        """Free the weight's memory, and its sources', for one who holds it in another form. None of them works on."""
        self._replace_weight(self.weight.new_empty(0), "packed")

    def _replace_weight(self, weight: torch.Tensor, weight_format: WeightFormat) -> None:
        # The sources get new parameters: a tied embedding holds the old one too, and keeps it.
        for sharer in self._sharers:
            sharer.weight = _frozen(sharer.weight.new_empty(0))
        self._sharers = ()
        self.weight = _frozen(weight)
        self.weight_format = weight_format

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
        if self.weight_format != "dense":
            y = self._product_of_other_format(x_TE)
            return y if out is None else out.copy_(y)
        if out is None:
            return F.linear(x_TE, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x_TE, self.weight.t(), out=out)
        return torch.addmm(self.bias, x_TE, self.weight.t(), out=out)

    def _product_of_other_format(self, x_TE: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            kernels, weight = self._packed
            return kernels.linear(x_TE, weight).to(x_TE.dtype)
        if self._reordered is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TE, self._reordered, self.bias, "none", [], "")
            return y
        assert self.weight_scale is not None
        if self.weight_format == "int8":
            return int8_matmul(x_TE, self.weight, self.weight_scale, self.bias).to(x_TE.dtype)
        return fp8_matmul(x_TE, self.weight, self.weight_scale, self.bias)

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


def _reordered(weight_NE: torch.Tensor) -> torch.Tensor | None:
    """The weight as oneDNN likes to read it; None where it has no such form of this dtype on this CPU.

    With few rows a product reads its weight once, and this takes half of the time; with hundreds it makes no difference.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NE.detach(), _TYPICAL_ROWS)
    except RuntimeError:  # bfloat16 without AVX-512 or AVX-NE-CONVERT, float16 without its instructions
        return None
    return reordered


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
