"""A known decoder's forward on a CPU, one call of the compiled kernels for all layers of a step; FusedDecoder's counterpart.

Weights are packed for the kernels, layer by layer, and their source memory freed. The residual stays in float32 from the
embedding to the last norm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engine.attention.hf import StepAttention
from engine.attention.native import NativeBackend
from engine.fused_decoder import DenseMlp, FusedLayer, Norm
from engine.kernels.cpu_ops import (
    ACTIVATIONS,
    CpuKernels,
    Format,
    LayerStruct,
    LinearStruct,
    NormStruct,
    PackedLinear,
    StepRows,
    linear_obstacle,
)
from engine.linear import Linear


def layer_obstacle(layer: FusedLayer, format: Format) -> str | None:
    """Why the kernels cannot run a layer; None where they can."""
    if not isinstance(layer.mlp, DenseMlp):
        return "mixtures of experts are not among them"
    if layer.mlp.activation not in ACTIVATIONS:
        return f"the activation {layer.mlp.activation} is not among them"
    return next((why for linear in layer.linears() if (why := linear_obstacle(linear.weight, format)) is not None), None)


class NativeLayer:
    """One layer's weights, packed, and the structure that names them. The backend's struct says where its pages are."""

    def __init__(self, layer: FusedLayer, kernels: CpuKernels, backend: NativeBackend, format: Format) -> None:
        mlp = layer.mlp
        assert isinstance(mlp, DenseMlp)
        self._held: list[object] = [backend]
        attention = backend.struct(layer.index)
        if layer.sinks is not None:
            attention.sinks = self._address(layer.sinks)
        self.struct = LayerStruct(
            qkv=self._pack(kernels, layer.qkv, format),
            output=self._pack(kernels, layer.output, format),
            gate_up=self._pack(kernels, mlp.gate_up, format, gated=True),
            down=self._pack(kernels, mlp.down, format),
            input_norm=self._norm(layer.input_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            post_attention_norm=self._norm(layer.post_attention_norm),
            post_mlp_norm=self._norm(layer.post_mlp_norm),
            query_norm=self._norm(layer.query_norm),
            key_norm=self._norm(layer.key_norm),
            cos=self._address(layer.rotary.cos),
            sin=self._address(layer.rotary.sin),
            rotary_half=layer.rotary.cos.shape[1],
            activation=ACTIVATIONS[mlp.activation],
            attention=ctypes.addressof(attention),
        )
        self.kind = (attention.group, attention.num_heads, attention.window)

    def _pack(self, kernels: CpuKernels, linear: Linear, format: Format, gated: bool = False) -> LinearStruct:
        packed: PackedLinear = kernels.pack(linear.weight, format, bias_N=linear.bias, gated=gated)
        self._held.append(packed)
        return packed.struct

    def _norm(self, norm: Norm | None) -> NormStruct:
        return NormStruct() if norm is None else NormStruct(self._address(norm.weight), norm.eps, norm.offset)

    def _address(self, tensor: torch.Tensor) -> int:
        held = tensor.detach().float().contiguous()
        self._held.append(held)
        return held.data_ptr()


class NativeDecoder:
    """Token ids to final hidden states, over the pages of a NativeBackend."""

    def __init__(self, embed: nn.Module, layers: Sequence[NativeLayer], norm: Norm | None, kernels: CpuKernels) -> None:
        """norm: None leaves the residual as the last layer left it."""
        self.part_seconds: npt.NDArray[np.float64] | None = None  # set by a profile; see CpuKernels.decode
        self._embed = embed
        self._kernels = kernels
        self._held = tuple(layers)
        self._layers = (LayerStruct * len(layers))(*(layer.struct for layer in layers))
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        self._kinds = np.array([kinds.index(layer.kind) for layer in layers], dtype=np.int64)
        self._norm_weight = None if norm is None else norm.weight.detach().float().contiguous()
        self._norm = None
        if norm is not None and self._norm_weight is not None:
            self._norm = NormStruct(self._norm_weight.data_ptr(), norm.eps, norm.offset)

    def __call__(self, input_ids_T: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Final hidden states, float32 [T, E], of int64 ids [T]."""
        return self.run(self._embed(input_ids_T).float(), attention.metadata)

    def run(self, residual_TE: torch.Tensor, rows: StepRows) -> torch.Tensor:
        """The same from a residual in float32, which is overwritten."""
        residual_TE = residual_TE.contiguous()
        return self._kernels.decode(self._layers, self._kinds, self._norm, rows, residual_TE, seconds=self.part_seconds)
