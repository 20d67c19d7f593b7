"""Fused forward of decoders that we know, over the module tree that transformers loaded.

A known layer becomes a handful of calls: one product for q, k and v and one for gate and up, norms that add the residual on
the way, and one kernel for head norms, rotary embedding and the write into pages. The original modules stay usable: their
weights become views of the merged ones. Before it is used, one layer of each kind is compared with the original; on a mismatch
the original stays and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn

from engine.attention.base import DeviceRows, FusedAttentionBackend, LayerSpec
from engine.attention.hf import StepAttention
from engine.kernels.activations import gelu_mul, gelu_tanh_mul, silu_mul
from engine.kernels.compiler import compiling_ahead
from engine.kernels.norms import add_rms_norm, norm_add_norm, rms_norm
from engine.kernels.rotary import rotate_and_write
from engine.kernels.skinny_linear import Activation, SkinnyDevice
from engine.linear import Linear

logger = logging.getLogger(__name__)

KNOWN_LAYERS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3MoeDecoderLayer",
        "Phi3DecoderLayer",
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
        "GptOssDecoderLayer",
    }
)
_FLOAT_NORMS = ("Gemma2RMSNorm", "Gemma3RMSNorm", "GptOssRMSNorm")  # these multiply by the weight before they round
_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": silu_mul,
    "gelu_tanh": gelu_tanh_mul,
    "gelu": gelu_mul,
}
_FUSED_ACTIVATIONS = frozenset(get_args(Activation))  # that a product of few rows applies itself
_PROBE_POSITIONS = (0, 1, 2, 7, 11, 40, 63, 100)
_MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TABLE_CHUNK = 8192


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
        x = _leave(self.output, attended, residual, self.post_attention_norm)
        return self.mlp(x, residual, self.mlp_norm, self.post_attention_norm, self.post_mlp_norm)


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
        num_rows = residual.shape[0]
        gated = self.gate_up.fuses(num_rows, gated=True) and self.activation in _FUSED_ACTIVATIONS
        if gated and x is None and self.gate_up.fuses(num_rows, norm=True, gated=True):
            hidden = self.gate_up(residual, norm=norm, activation=self.activation)
        else:
            normed = norm.apply(residual) if x is None else norm.add_and_apply(x, residual, post)
            if gated:
                hidden = self.gate_up(normed, activation=self.activation)
            else:
                hidden = _ACTIVATIONS[self.activation](self.gate_up(normed))
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
        weight = layer.output.weight
        dtype = layer.input_norm.weight.dtype
        sizes = (layer.output.out_features, layer.qkv.out_features, layer.output.in_features, layer.output.out_features)
        return cls(*(torch.zeros(num_tokens, size, dtype=dtype, device=weight.device) for size in sizes))

    def first(self, num_tokens: int) -> Activations:
        """Views of the first tokens' rows."""
        return Activations(*(x[:num_tokens] for x in (self.residual, self.qkv, self.attended, self.hidden)))


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


def fuse(model: nn.Module, layers: Sequence[LayerSpec], max_model_len: int) -> FusedDecoder | None:
    """The fused form of a loaded causal model, or None (and a log line) where a layer is unknown or does not agree.

    max_model_len: positions that the rotary tables cover. Linears are merged layer by layer, so that memory does not pile up.
    """
    decoder: Any = getattr(model, str(model.base_model_prefix))
    unknown = sorted({type(layer).__name__ for layer in decoder.layers} - KNOWN_LAYERS)
    if unknown:
        logger.info("%s runs as transformers has it: no fused form is known", ", ".join(unknown))
        return None
    device = decoder.embed_tokens.weight.device
    skinny = SkinnyDevice.of(device) if device.type == "cuda" else None
    tables = _rotary_tables(decoder, max(max_model_len, max(_PROBE_POSITIONS) + 1))
    checked: set[tuple[object, ...]] = set()
    fused: list[FusedLayer] = []
    for module, spec in zip(decoder.layers, layers, strict=True):
        layer_type = _layer_type(decoder.config, spec.layer_index)
        layer = _fuse_layer(
            module, spec, tables.get(layer_type, tables[None] if None in tables else next(iter(tables.values())))
        )
        for linear in layer.linears():
            linear.use_skinny(skinny)
        kind = (type(module.mlp).__name__, layer_type, spec.window, spec.has_sinks)
        if kind not in checked:
            checked.add(kind)
            if layer.qkv.weight.is_cuda:
                with compiling_ahead():
                    _difference(module, layer, decoder, layer_type)
            error = _difference(module, layer, decoder, layer_type)
            if not error <= _MAX_ERROR[layer.qkv.weight.dtype]:
                logger.warning(
                    "%s runs as transformers has it: the fused layer %d differs by %.2g",
                    type(module).__name__,
                    layer.index,
                    error,
                )
                return None
        fused.append(layer)
    head = getattr(model, "lm_head", None)
    if skinny is not None and isinstance(head, nn.Linear):
        model.lm_head = Linear.from_linear(head, "lm_head")
        model.lm_head.use_skinny(skinny)
    logger.info("fused the %d layers of %s", len(fused), type(model).__name__)
    return FusedDecoder(decoder.embed_tokens, fused, Norm.of(decoder.norm))


def _layer_type(config: Any, index: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return str(types[index]) if types else None


def _rotary_tables(decoder: Any, length: int) -> dict[str | None, RotaryTable]:
    """By layer type where the model's rotary embedding takes one, else under None."""
    rotary = decoder.rotary_emb
    by_type = isinstance(getattr(rotary, "rope_type", None), dict)
    types: list[str | None] = sorted(set(decoder.config.layer_types)) if by_type else [None]
    device = decoder.embed_tokens.weight.device
    like = torch.empty(0, dtype=torch.float32, device=device)
    tables = {}
    for layer_type in types:
        extra = () if layer_type is None else (layer_type,)
        parts = []
        for start in range(0, length, _TABLE_CHUNK):
            positions = torch.arange(start, min(start + _TABLE_CHUNK, length), device=device)[None]
            parts.append(rotary(like, positions, *extra))
        cos, sin = (torch.cat([part[i][0] for part in parts]) for i in (0, 1))
        tables[layer_type] = RotaryTable(_one_per_pair(cos, rotary, decoder), _one_per_pair(sin, rotary, decoder))
    return tables


def _one_per_pair(values: torch.Tensor, rotary: nn.Module, decoder: Any) -> torch.Tensor:
    """Most models repeat the values for both halves of a head; gpt-oss gives them once."""
    once = type(rotary).__name__.startswith("GptOss")
    return (values if once else values[:, : values.shape[1] // 2]).float().contiguous()


def _fuse_layer(module: Any, spec: LayerSpec, rotary: RotaryTable) -> FusedLayer:
    attention = module.self_attn
    if hasattr(attention, "qkv_proj"):
        qkv = Linear.from_linear(attention.qkv_proj, "qkv_proj")
    else:
        qkv = _merge(attention, ("q_proj", "k_proj", "v_proj"))
    sandwich = hasattr(module, "pre_feedforward_layernorm")
    return FusedLayer(
        index=spec.layer_index,
        qkv=qkv,
        output=Linear.from_linear(attention.o_proj, "o_proj"),
        mlp=_fuse_mlp(module.mlp),
        input_norm=Norm.of(module.input_layernorm),
        mlp_norm=Norm.of(module.pre_feedforward_layernorm if sandwich else module.post_attention_layernorm),
        post_attention_norm=Norm.of(module.post_attention_layernorm) if sandwich else None,
        post_mlp_norm=Norm.of(module.post_feedforward_layernorm) if sandwich else None,
        query_norm=Norm.of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=Norm.of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        sinks=attention.sinks if spec.has_sinks else None,
        rotary=rotary,
        spec=spec,
    )


def _merge(parent: nn.Module, names: tuple[str, ...]) -> Linear:
    return Linear.merge([getattr(parent, name) for name in names], names)


def _fuse_mlp(module: Any) -> DenseMlp | SparseMlp:
    activation = _activation_name(module)
    if activation not in _ACTIVATIONS or not hasattr(module, "down_proj") or isinstance(module.down_proj, nn.Parameter):
        return SparseMlp(module)
    if hasattr(module, "gate_up_proj"):
        gate_up = Linear.from_linear(module.gate_up_proj, "gate_up_proj")
    else:
        gate_up = _merge(module, ("gate_proj", "up_proj"))
    return DenseMlp(gate_up, Linear.from_linear(module.down_proj, "down_proj"), activation)


def _activation_name(module: Any) -> str:
    config = getattr(module, "config", None)
    name = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
    return {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(name, name)


@dataclass(frozen=True, slots=True)
class _MixingStub:
    """Stands where attention is while a layer is compared: an output that depends on q, k and v of its own token alone."""

    def attend(
        self, module: nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        return _mix(*(x[0].transpose(0, 1) for x in (q_1HTD, k_1KTD, v_1KTD)))[None]


def _mix(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    groups = q_THD.shape[1] // k_TKD.shape[1]
    return q_THD + (0.5 * k_TKD + v_TKD).repeat_interleave(groups, dim=1)


def _difference(module: Any, layer: FusedLayer, decoder: Any, layer_type: str | None) -> float:
    """Relative error of the fused layer's output, on random input, with `_mix` in the place of attention."""
    weight, spec = layer.qkv.weight, layer.spec
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (len(_PROBE_POSITIONS), weight.shape[1])
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(weight.dtype)
    positions = torch.tensor(_PROBE_POSITIONS, device=device)
    extra = (layer_type,) if isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict) else ()
    expected: Any = module(
        hidden[None].clone(),
        position_ids=positions[None],
        position_embeddings=decoder.rotary_emb(hidden[None], positions[None], *extra),
        attention_mask=None,
        use_cache=False,
        paged_attention=_MixingStub(),
    )
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0].float()
    block_size = 16
    pages = torch.zeros(2, 1, spec.num_kv_heads, block_size, spec.head_dim, dtype=weight.dtype, device=device)
    table = torch.zeros(1, max(_PROBE_POSITIONS) // block_size + 1, dtype=torch.int32, device=device)
    residual = hidden.clone()
    qkv = hidden.new_empty(len(_PROBE_POSITIONS), layer.qkv.out_features)
    layer.project(None, residual, None, qkv)
    slots = torch.zeros(len(_PROBE_POSITIONS), dtype=torch.int32, device=device)
    layer.rotate(qkv, positions.to(torch.int32), slots, table, (pages[0], pages[1]))
    x = layer.finish(_mix(*layer.split(qkv)).flatten(1), residual)
    if x is not None:
        residual += x if layer.post_mlp_norm is None else layer.post_mlp_norm.apply(x)
    actual = residual.float()
    return float((actual - expected).norm() / expected.norm())


def quantize(model: nn.Module, fused: FusedDecoder | None) -> None:
    """Turn the weights of the decoder's linears into FP8, one after another. Embeddings, head, norms and experts that are no
    linears stay as they are."""
    decoder: Any = getattr(model, str(model.base_model_prefix))
    if fused is None:
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Linear.from_linear(child, name))
    linears = [module for module in decoder.modules() if isinstance(module, Linear)] if fused is None else fused.linears()
    for linear in linears:
        linear.quantize()
