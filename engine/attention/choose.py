"""Which attention backend serves a model on a device, and why."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from engine.attention.base import AttentionBackend, LayerSpec
from engine.errors import ConfigError
from engine.step import KVGroupSpec

BACKENDS = {
    "sdpa": "engine.attention.sdpa:SdpaBackend",
    "triton": "engine.attention.triton:TritonBackend",
    "flash_attention": "engine.attention.flash_attention:FlashAttentionBackend",
    "cudnn": "engine.attention.cudnn:CudnnBackend",
    "flashinfer": "engine.attention.flashinfer:FlashInferBackend",
    "torch_varlen": "engine.attention.torch_varlen:TorchVarlenBackend",
}

_PREFERRED_ON_CUDA = {
    "triton": "our own kernels, which need no other package",
    "flash_attention": "one kernel for decodes and chunks, captured in graphs",
    "cudnn": "decodes captured in graphs",
    "flashinfer": "planned anew every step, so without graphs",
    "torch_varlen": "FlashAttention-3 by way of torch",
    "sdpa": "correct everywhere, and slow: it gathers each row's pages",
}
_PREFERRED_ELSEWHERE = {"sdpa": "each row's pages through scaled_dot_product_attention, exact in every dtype"}


def choose_backend(
    requested: str,
    *,
    layers: Sequence[LayerSpec],
    groups: Sequence[KVGroupSpec],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_dtype: torch.dtype,
) -> tuple[type[AttentionBackend], str]:
    """The backend's class, and the reason for the log.

    requested: a name of BACKENDS, or "auto" for the first that can serve these layers. kv_cache_dtype: of the pages. Raises
    ConfigError where the name is unknown or the backend cannot read our pages.
    """
    situation = (layers, groups, block_size, dtype, device, kv_cache_dtype)
    if requested in BACKENDS:
        backend, why = _look_at(requested, situation)
        if why is None:
            return backend, "as asked"
        usable = [name for name in BACKENDS if name != requested and _look_at(name, situation)[1] is None]
        raise ConfigError(
            f"attention_backend {requested} cannot be used: {why}. Usable here: {', '.join(['auto', *usable])}",
            param="attention_backend",
        )
    if requested != "auto":
        raise ConfigError(
            f"attention_backend must be auto or one of {', '.join(BACKENDS)}, got {requested!r}", param="attention_backend"
        )
    passed_over: list[tuple[str, str]] = []
    for name, merit in (_PREFERRED_ON_CUDA if device.type == "cuda" else _PREFERRED_ELSEWHERE).items():
        backend, why = _look_at(name, situation)
        if why is None:
            return backend, merit + "".join(f"; not {other}: {reason}" for other, reason in passed_over)
        passed_over.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise ConfigError(f"no attention backend can serve this model on {device}: {reasons}", param="attention_backend")


def _look_at(name: str, situation: tuple[Any, ...]) -> tuple[type[AttentionBackend], str | None]:
    """A backend's class, and why it is unusable. One that says nothing of that is usable everywhere."""
    module, _, class_name = BACKENDS[name].partition(":")
    backend = getattr(importlib.import_module(module), class_name)
    return backend, backend.unusable(*situation) if hasattr(backend, "unusable") else None
