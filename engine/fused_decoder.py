"""The fused forward of a decoder: a layer as a handful of calls, and attention between its pieces.

One product for q, k and v and one for gate and up; norms that add the residual on the way; one kernel for head norms, rotary
embedding and the write into pages. For a few rows a product also norms its input and adds its result to the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn

from engine.attention.base import DeviceRows, FusedAttentionBackend, LayerSpec
from engine.attention.hf import StepAttention
from engine.kernels.activations import gelu_mul, gelu_tanh_mul, silu_mul
from engine.kernels.norms import add_rms_norm, norm_add_norm, rms_norm
from engine.kernels.rotary import rotate_and_write
from engine.kernels.skinny_linear import Activation
from engine.linear import Linear

ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": silu_mul,
    "gelu_tanh": gelu_tanh_mul,
    "gelu": gelu_mul,
}
_FUSED_ACTIVATIONS = frozenset(get_args(Activation))  # that a product of few rows applies itself
_FLOAT_NORMS = ("Gemma2RMSNorm", "Gemma3RMSNorm", "GptOssRMSNorm")  # these multiply by the weight before they round


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm's weight and how its class multiplies: by offset + weight, before or after rounding to the dtype."""

    weight: torch.Tensor
    eps: float
    offset: float
    round_before_weight: bool

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        name = type(module).__name__
        eps = getattr(module, "variance_epsilon", None)
        return cls(
            weight=module.weight,  # type: ignore[arg-type]
            eps=float(module.eps if eps is None else eps),  # type: ignore[arg-type]
            offset=1.0 if name.startswith("Gemma") else 0.0,
            round_before_weight=name not in _FLOAT_NORMS,
        )

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset, round_before_weight=self.round_before_weight)

    def add_and_apply(self, x: torch.Tensor, residual: torch.Tensor, post: Norm | None) -> torch.Tensor:
        """residual += x (or post(x), Gemma's sandwich) in place; returns the norm of it."""
        how: dict[str, Any] = {"offset": self.offset, "round_before_weight": self.round_before_weight}
        if post is None:
            return add_rms_norm(x, residual, self.weight, self.eps, **how)
        return norm_add_norm(x, post.weight, residual, self.weight, self.eps, **how)


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos, sin: float32 [max_len, rotary_dim / 2], one value a pair of channels."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One decoder layer. post_attention_norm, post_mlp_norm: Gemma's norms of what is added to the residual; None elsewhere."""

    index: int
    qkv: Linear
    output: Linear
    mlp: DenseMlp | SparseMlp
    input_norm: Norm
    mlp_norm: Norm
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: torch.Tensor | None
    rotary: RotaryTable
    spec: LayerSpec

    def rotate(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        token_slots: torch.Tensor,
        table: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        """Head norms and rotary embedding, in place in qkv; keys and values also go to their pages."""
        query_norm, key_norm = self.query_norm, self.key_norm
        norms: dict[str, Any] = {}
        if query_norm is not None and key_norm is not None:
            norms = {
                "q_norm_D": query_norm.weight,
                "k_norm_D": key_norm.weight,
                "norm_eps": query_norm.eps,
                "norm_offset": query_norm.offset,
                "norm_round_before_weight": query_norm.round_before_weight,
            }
        rotate_and_write(
            qkv,
            self.rotary.cos,
            self.rotary.sin,
            positions,
            token_slots,
            table,
            *pages,
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            k_scale=scales[0],
            v_scale=scales[1],
            **norms,
        )

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views [T, heads, D] of q, k and v."""
        heads, kv_heads, dim = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        by_head = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
        return by_head[:, :heads], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :]

    def linears(self) -> list[Linear]:
        dense = [self.mlp.gate_up, self.mlp.down] if isinstance(self.mlp, DenseMlp) else []
        return [self.qkv, self.output, *dense]

    def project(self, x: torch.Tensor | None, residual: torch.Tensor, post: Norm | None, out: torch.Tensor) -> None:
        """residual += post(x), where there still is an x to add; q, k and v of the normed residual into `out`."""
        inputs, norm = _enter(self.qkv, self.input_norm, x, residual, post)
        self.qkv(inputs, norm=norm, out=out)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """From attention's output [T, H * D] to what is yet to be added to the residual; None where it has been added."""
        x = self.leave_attention(attended, residual)
        return self.mlp(x, residual, self.mlp_norm, self.post_attention_norm, self.post_mlp_norm)

    def leave_attention(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """The first half of `finish`: the output projection."""
        return _leave(self.output, attended, residual, self.post_attention_norm)


def _enter(
    linear: Linear, norm: Norm, x: torch.Tensor | None, residual: torch.Tensor, post: Norm | None
) -> tuple[torch.Tensor, Norm | None]:
    """What to multiply, and the norm that the product itself applies to it: for a few rows a linear norms on the way."""
    if x is not None:
        return norm.add_and_apply(x, residual, post), None
    if linear.fuses(residual.shape[0], norm=True):
        return residual, norm
    return norm.apply(residual), None


def _leave(linear: Linear, x: torch.Tensor, residual: torch.Tensor, post: Norm | None) -> torch.Tensor | None:
    """A linear whose result goes to the residual: added by the product itself (None), or returned to be added later."""
    if post is None and linear.fuses(x.shape[0]):
        linear(x, residual=residual)
        return None
    return linear(x)  # type: ignore[no-any-return]


class DenseMlp:
    """Gate and up as one product, then the activation, then down."""

    def __init__(self, gate_up: Linear, down: Linear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, post: Norm | None, post_mlp: Norm | None
    ) -> torch.Tensor | None:
        """See FusedLayer.finish: residual += post(x) first, then the MLP of its norm."""
        return self.contract(self.expand(x, residual, norm, post), residual, post_mlp)

    def expand(self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, post: Norm | None) -> torch.Tensor:
        """All but the down projection: [T, intermediate size]."""
        num_rows = residual.shape[0]
        gated = self.gate_up.fuses(num_rows, gated=True) and self.activation in _FUSED_ACTIVATIONS
        if gated and x is None and self.gate_up.fuses(num_rows, norm=True, gated=True):
            return self.gate_up(residual, norm=norm, activation=self.activation)  # type: ignore[no-any-return]
        normed = norm.apply(residual) if x is None else norm.add_and_apply(x, residual, post)
        if gated:
            return self.gate_up(normed, activation=self.activation)  # type: ignore[no-any-return]
        return ACTIVATIONS[self.activation](self.gate_up(normed))

    def contract(self, hidden: torch.Tensor, residual: torch.Tensor, post_mlp: Norm | None) -> torch.Tensor | None:
        """The down projection: what is yet to be added to the residual, None where it has been added."""
        return _leave(self.down, hidden, residual, post_mlp)


class SparseMlp:
    """A mixture of experts as transformers has it: routed by its own module, experts as grouped products."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: Norm, post: Norm | None, post_mlp: Norm | None
    ) -> torch.Tensor | None:
        """See DenseMlp."""
        normed = norm.apply(residual) if x is None else norm.add_and_apply(x, residual, post)
        out = self.module(normed[None])
        return (out[0] if isinstance(out, tuple) else out)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Activations:
    """What crosses attention: residual [T, E], qkv [T, (H + 2K) * D], attended [T, H * D], and the final hidden [T, E]."""

    residual: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, layer: FusedLayer) -> Activations:
        """For a step that writes every row."""
        return cls(
            *(layer.output.weight.new_empty(num_tokens, size, dtype=layer.input_norm.weight.dtype) for size in _sizes(layer))
        )

    @classmethod
    def zeros(cls, num_tokens: int, layer: FusedLayer) -> Activations:
        """For steps that leave padding rows as they find them: what lies there must be numbers."""
        return cls(
            *(layer.output.weight.new_zeros(num_tokens, size, dtype=layer.input_norm.weight.dtype) for size in _sizes(layer))
        )

    def first(self, num_tokens: int) -> Activations:
        """Views of the first tokens' rows."""
        return Activations(*(x[:num_tokens] for x in (self.residual, self.qkv, self.attended, self.hidden)))


def _sizes(layer: FusedLayer) -> tuple[int, int, int, int]:
    """Channels of residual, qkv, attended and hidden."""
    return layer.output.out_features, layer.qkv.out_features, layer.output.in_features, layer.output.out_features


RunPiece = Callable[[int, Callable[[], None]], None]
"""Runs one of the decoder's pieces, by number: as it is, or as a recorded graph of it."""


class FusedDecoder:
    """A decoder whose every layer is known: token ids to final hidden states, over pages.

    Attention cuts it into len(layers) + 1 pieces whose shapes depend on the number of tokens alone.
    """

    def __init__(self, embed: nn.Module, layers: Sequence[FusedLayer], norm: Norm) -> None:
        self.layers = tuple(layers)
        self._embed = embed
        self._norm = norm

    def __call__(self, input_ids_T: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Final hidden states [T, E] of int64 ids [T]."""
        num_tokens = input_ids_T.shape[0]
        activations = Activations.empty(num_tokens, self.layers[0])
        self.run(lambda: input_ids_T, attention, attention.rows, activations, num_tokens, lambda _, work: work())
        return activations.hidden

    def run(
        self,
        input_ids: Callable[[], torch.Tensor],
        attention: StepAttention,
        writing: DeviceRows,
        activations: Activations,
        num_tokens: int,
        run_piece: RunPiece,
    ) -> None:
        """All pieces in turn, with attention over the first num_tokens rows between them. writing: where all rows of the
        activations, padding too, put their keys and values; input_ids: called within the first piece."""
        backend = cast(FusedAttentionBackend, attention.backend)
        attended = activations.attended[:num_tokens]
        qkv = activations.qkv[:num_tokens]
        run_piece(0, lambda: self._begin(input_ids(), backend, writing, activations))
        for i, layer in enumerate(self.layers):
            q, k, v = layer.split(qkv)
            backend.attend(layer.index, q, k, v, attention.metadata, layer.sinks, out_THD=attended.view(q.shape))
            run_piece(i + 1, partial(self._after, i, backend, writing, activations))

    def _begin(self, input_ids_T: torch.Tensor, backend: FusedAttentionBackend, writing: DeviceRows, to: Activations) -> None:
        to.residual.copy_(self._embed(input_ids_T))
        self._enter_layer(0, None, None, backend, writing, to)

    def _after(self, i: int, backend: FusedAttentionBackend, writing: DeviceRows, to: Activations) -> None:
        """From the i-th layer's attention to the next one's, or to the end."""
        x, post = self.layers[i].finish(to.attended, to.residual), self.layers[i].post_mlp_norm
        if i + 1 < len(self.layers):
            self._enter_layer(i + 1, x, post, backend, writing, to)
        else:
            to.hidden.copy_(self._norm.apply(to.residual) if x is None else self._norm.add_and_apply(x, to.residual, post))

    def _enter_layer(
        self,
        i: int,
        x: torch.Tensor | None,
        post: Norm | None,
        backend: FusedAttentionBackend,
        writing: DeviceRows,
        to: Activations,
    ) -> None:
        self.layers[i].project(x, to.residual, post, to.qkv)
        backend.rotate_and_write(self.layers[i], to.qkv, writing)

    def linears(self) -> list[Linear]:
        """Every linear of the fused layers."""
        return [linear for layer in self.layers for linear in layer.linears()]
