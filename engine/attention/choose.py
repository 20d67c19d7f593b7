"""Which attention backend serves a model on a device, and why."""

from __future__ import annotations

import importlib

from engine.attention.base import AttentionBackend, AttentionNeeds
from engine.errors import ConfigError

BACKENDS = {
    "sdpa": "engine.attention.sdpa:SdpaBackend",
    "native": "engine.attention.native:NativeBackend",
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
_PREFERRED_ELSEWHERE = {
    "native": "our own kernels, which read pages where they lie",
    "sdpa": "each row's pages through scaled_dot_product_attention, exact in every dtype",
}


def choose_backend(requested: str, needs: AttentionNeeds) -> tuple[type[AttentionBackend], str]:
    """The backend's class, and the reason for the log.

    requested: a name of BACKENDS, or "auto" for the first that can serve these layers. Raises ConfigError where the name is
    unknown or the backend cannot read our pages.
    """
    if requested in BACKENDS:
        backend, why = _look_at(requested, needs)
        if why is None:
            return backend, "as asked"
        usable = [name for name in BACKENDS if name != requested and _look_at(name, needs)[1] is None]
        raise ConfigError(
            f"attention_backend {requested} cannot be used: {why}. Usable here: {', '.join(['auto', *usable])}",
            param="attention_backend",
        )
    if requested != "auto":
        raise ConfigError(
            f"attention_backend must be auto or one of {', '.join(BACKENDS)}, got {requested!r}", param="attention_backend"
        )
    passed_over: list[tuple[str, str]] = []
    for name, merit in (_PREFERRED_ON_CUDA if needs.device.type == "cuda" else _PREFERRED_ELSEWHERE).items():
        backend, why = _look_at(name, needs)
        if why is None:
            return backend, merit + "".join(f"; not {other}: {reason}" for other, reason in passed_over)
        passed_over.append((name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise ConfigError(f"no attention backend can serve this model on {needs.device}: {reasons}", param="attention_backend")


def _look_at(name: str, needs: AttentionNeeds) -> tuple[type[AttentionBackend], str | None]:
    """A backend's class, and why it is unusable. One that says nothing of that is usable everywhere."""
    module, _, class_name = BACKENDS[name].partition(":")
    backend = getattr(importlib.import_module(module), class_name)
    return backend, backend.unusable(needs) if hasattr(backend, "unusable") else None
