"""Fuses the decoders that we know, over the module tree that transformers loaded (`fused_decoder.py` runs them).

The original modules stay usable: their weights become views of the merged ones. Before a fused form is used, one layer of each
kind is compared with the original; on a mismatch the original stays and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.attention.base import LayerSpec, RaggedBatch, group_layers
from engine.attention.hf import StepAttention
from engine.attention.native import NativeBackend
from engine.attention.sdpa import SdpaBackend
from engine.fused_decoder import ACTIVATIONS, DenseMlp, FusedDecoder, FusedLayer, Norm, RotaryTable, SparseMlp
from engine.kernels.compiler import compiling_ahead
from engine.kernels.cpu_ops import CpuKernels, Format
from engine.kernels.skinny_linear import SkinnyDevice
from engine.linear import Linear
from engine.native_decoder import NativeDecoder, NativeLayer, layer_obstacle

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
_PROBE_POSITIONS = (0, 1, 2, 7, 11, 40, 63, 100)
_PROBE_TOKENS, _PROBE_PAGE = 24, 16  # of the comparison on a CPU: more than a page
_MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TABLE_CHUNK = 8192


def fuse(model: nn.Module, layers: Sequence[LayerSpec], max_model_len: int) -> FusedDecoder | None:
    """The fused form of a loaded causal model, or None (and a log line) where a layer is unknown or does not agree.

    max_model_len: positions that the rotary tables cover. Linears are merged layer by layer, so that memory does not pile up.
    """
    decoder = _known_decoder(model)
    if decoder is None:
        return None
    device = decoder.embed_tokens.weight.device
    skinny = SkinnyDevice.of(device) if device.type == "cuda" else None
    tables = _rotary_tables(decoder, max(max_model_len, max(_PROBE_POSITIONS) + 1))
    checked: set[tuple[object, ...]] = set()
    fused: list[FusedLayer] = []
    for module, spec in zip(decoder.layers, layers, strict=True):
        layer_type = _layer_type(decoder.config, spec.layer_index)
        layer = _fuse_layer(module, spec, _table_of(tables, layer_type))
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


def fuse_native(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    max_model_len: int,
    kernels: CpuKernels,
    backend: NativeBackend,
    format: Format,
) -> NativeDecoder | None:
    """`fuse` for a CPU: weights packed in `format`, and the originals' memory freed layer by layer: they work no more. Where it
    gives None they still do."""
    decoder = _known_decoder(model)
    if decoder is None:
        return None
    tables = _rotary_tables(decoder, max(max_model_len, _PROBE_TOKENS))
    merged: list[FusedLayer] = []
    checked: set[tuple[object, ...]] = set()
    for module, spec in zip(decoder.layers, layers, strict=True):
        layer_type = _layer_type(decoder.config, spec.layer_index)
        layer = _fuse_layer(module, spec, _table_of(tables, layer_type))
        why = layer_obstacle(layer, format)
        kind = (type(module.mlp).__name__, layer_type, spec.window, spec.has_sinks)
        if why is None and kind not in checked:
            checked.add(kind)
            error = _native_difference(module, layer, decoder, layer_type, kernels)
            if not error <= _MAX_ERROR[layer.qkv.weight.dtype]:
                why = f"the fused layer {layer.index} differs by {error:.2g}"
        if why is not None:
            logger.warning("%s runs as transformers has it: %s", type(module).__name__, why)
            return None
        merged.append(layer)
    packed = []
    for layer in merged:
        packed.append(NativeLayer(layer, kernels, backend, format))
        for linear in layer.linears():
            linear.release()
    logger.info("packed the %d layers of %s in %s", len(packed), type(model).__name__, format)
    return NativeDecoder(decoder.embed_tokens, packed, Norm.of(decoder.norm), kernels)


def _known_decoder(model: nn.Module) -> Any | None:
    """The model's decoder; None (and a log line) where a layer of it is unknown."""
    decoder: Any = getattr(model, str(model.base_model_prefix))
    unknown = sorted({type(layer).__name__ for layer in decoder.layers} - KNOWN_LAYERS)
    if unknown:
        logger.info("%s runs as transformers has it: no fused form is known", ", ".join(unknown))
        return None
    return decoder


def _table_of(tables: Mapping[str | None, RotaryTable], layer_type: str | None) -> RotaryTable:
    return tables.get(layer_type, tables[None] if None in tables else next(iter(tables.values())))


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
    if activation not in ACTIVATIONS or not hasattr(module, "down_proj") or isinstance(module.down_proj, nn.Parameter):
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


def _original_output(
    module: Any,
    decoder: Any,
    layer_type: str | None,
    hidden_TE: torch.Tensor,
    positions_T: torch.Tensor,
    attention: StepAttention | _MixingStub,
) -> torch.Tensor:
    """float32 [T, E]: what the layer makes of it as transformers has it."""
    extra = (layer_type,) if isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict) else ()
    output: Any = module(
        hidden_TE[None].clone(),
        position_ids=positions_T[None],
        position_embeddings=decoder.rotary_emb(hidden_TE[None], positions_T[None], *extra),
        attention_mask=None,
        use_cache=False,
        paged_attention=attention,
    )
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first[0].float()


def _difference(module: Any, layer: FusedLayer, decoder: Any, layer_type: str | None) -> float:
    """Relative error of the fused layer's output, on random input, with `_mix` in the place of attention."""
    weight, spec = layer.qkv.weight, layer.spec
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (len(_PROBE_POSITIONS), weight.shape[1])
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(weight.dtype)
    positions = torch.tensor(_PROBE_POSITIONS, device=device)
    expected = _original_output(module, decoder, layer_type, hidden, positions, _MixingStub())
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


def _native_difference(module: Any, layer: FusedLayer, decoder: Any, layer_type: str | None, kernels: CpuKernels) -> float:
    """Relative error of the packed layer's output on random input, attention included, to the original over exact attention."""
    weight, spec = layer.qkv.weight, layer.spec
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((_PROBE_TOKENS, weight.shape[1]), generator=generator).to(weight.dtype)
    positions = torch.arange(_PROBE_TOKENS)
    groups = group_layers([spec], _PROBE_PAGE, weight.dtype.itemsize)
    batch = RaggedBatch([_PROBE_TOKENS], [0], ([[1, 2]],))
    exact = SdpaBackend([spec], groups, _PROBE_PAGE, weight.dtype, torch.device("cpu"))
    native = NativeBackend([spec], groups, _PROBE_PAGE, weight.dtype, torch.device("cpu"), kernels=kernels)
    exact.allocate([2])
    native.allocate([2])
    expected = _original_output(module, decoder, layer_type, hidden, positions, StepAttention.of(exact, batch))
    packed = NativeLayer(layer, kernels, native, "float32" if weight.dtype == torch.float32 else "bfloat16")
    residual = hidden.float()
    actual = NativeDecoder(decoder.embed_tokens, [packed], None, kernels).run(residual.clone(), native.prepare(batch))
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


def pack_linears(model: nn.Module, kernels: CpuKernels | None, format: Format, *, head_only: bool) -> None:
    """Pack the linears of a model on a CPU as they are, unmerged, and its head; or the head alone. Embeddings stay."""
    for parent in [model] if head_only else list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                linear = Linear.from_linear(child, name)
                linear.pack(kernels, format)
                setattr(parent, name, linear)
