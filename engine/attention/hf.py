"""Plugs paged attention into Hugging Face models, and finds out at load what each attention layer asks for.

`AttentionInterface` routes every attention call of a model to one function by name; no mask function is registered under
that name, so the models build no masks. What a step needs travels through the model's own forward as one keyword argument:
    model(input_ids, position_ids=..., use_cache=False, logits_to_keep=..., paged_attention=StepAttention.of(backend, batch))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from engine.attention.base import AttentionBackend, DeviceRows, LayerSpec, RaggedBatch
from engine.errors import ModelNotSupported

ATTENTION_NAME = "octavo_paged"
_PASSIVE_TENSORS = frozenset({"position_ids", "cache_position", "position_embeddings", "input_ids", "inputs_embeds"})


class LayerAttention(Protocol):
    """What the model's attention calls are answered by: a step's pages, or the recorder of the probe."""

    def attend(
        self, module: torch.nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class StepAttention:
    """One step's attention: the backend and the metadata that its `prepare` made for this batch."""

    backend: AttentionBackend
    metadata: Any
    batch: RaggedBatch

    @classmethod
    def of(cls, backend: AttentionBackend, batch: RaggedBatch) -> StepAttention:
        return cls(backend, backend.prepare(batch), batch)

    @property
    def rows(self) -> DeviceRows:
        """The step's rows on the device, where the batch has them."""
        assert self.batch.device is not None
        return self.batch.device

    def attend(
        self, module: torch.nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        """q [1, H, T, D], k and v [1, K, T, D] -> [1, T, H, D]."""
        out_THD = self.backend.forward(
            module.layer_idx,  # type: ignore[arg-type]
            q_1HTD[0].transpose(0, 1),
            k_1KTD[0].transpose(0, 1),
            v_1KTD[0].transpose(0, 1),
            self.metadata,
            call["s_aux"],
        )
        return out_THD.unsqueeze(0)


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    paged_attention: LayerAttention | None = None,
    s_aux: torch.Tensor | None = None,
    **call: Any,
) -> tuple[torch.Tensor, None]:
    """The function that models call. `call` keeps what only the probe looks at: scaling, sliding_window, softcap, ..."""
    if paged_attention is None:
        raise ModelNotSupported(
            f"{type(module).__name__} does not pass keyword arguments on to its attention calls, which paged attention needs"
        )
    call["s_aux"] = s_aux
    call["attention_mask"] = attention_mask
    return paged_attention.attend(module, query, key, value, call), None


def register() -> None:
    """Make "octavo_paged" known to transformers; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, _paged_attention)


@dataclass(slots=True)
class _Recorder:
    """Answers every attention call with zeros, and keeps what was asked. Without attention nothing may cross positions."""

    layers: dict[int, LayerSpec] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def attend(
        self, module: torch.nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        index = getattr(module, "layer_idx", None)
        out = torch.zeros_like(q_1HTD).transpose(1, 2)
        if not isinstance(index, int):
            self.problems.append(f"{type(module).__name__} has no layer index")
            return out
        if index in self.layers:
            self.problems.append(f"layer {index} attends more than once a forward")
        self.problems += [f"layer {index} {why}" for why in _unusual(module, q_1HTD, k_1KTD, v_1KTD, call)]
        scaling, window, softcap = call.get("scaling"), call.get("sliding_window"), call.get("softcap")
        head_dim = q_1HTD.shape[-1]
        self.layers[index] = LayerSpec(
            layer_index=index,
            num_heads=q_1HTD.shape[1],
            num_kv_heads=k_1KTD.shape[1],
            head_dim=head_dim,
            scaling=head_dim**-0.5 if scaling is None else float(scaling),
            window=int(window) if window else None,
            softcap=float(softcap) if softcap else None,
            has_sinks=call["s_aux"] is not None,
        )
        return out


def _unusual(
    module: torch.nn.Module, q_1HTD: torch.Tensor, k_1KTD: torch.Tensor, v_1KTD: torch.Tensor, call: Mapping[str, Any]
) -> list[str]:
    """Why one attention call cannot be answered from pages; empty when it can."""
    heads, kv_heads, head_dim = q_1HTD.shape[1], k_1KTD.shape[1], q_1HTD.shape[3]
    is_causal = call.get("is_causal")
    bidirectional = is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False)
    extra = [
        name
        for name, value in call.items()
        if isinstance(value, torch.Tensor) and name not in _PASSIVE_TENSORS | {"s_aux", "attention_mask"}
    ]
    checks = (
        (k_1KTD.shape != v_1KTD.shape or k_1KTD.shape[3] != head_dim, "has values of another head size than its keys"),
        (q_1HTD.shape[2] != k_1KTD.shape[2], "attends to keys that are not the step's own tokens"),
        (heads % kv_heads != 0, f"has {heads} query heads over {kv_heads} key/value heads"),
        (call["attention_mask"] is not None, "brings an attention mask of its own"),
        (bidirectional, "is not causal"),
        (
            any(_rows_differ(x[0, :, -2], x[0, :, -1]) for x in (q_1HTD, k_1KTD, v_1KTD)),
            "gives equal tokens at equal positions different queries, keys or values",
        ),
        (bool(extra), f"needs more than queries, keys and values: {', '.join(extra)}"),
        (float(call.get("dropout") or 0.0) != 0.0, "drops attention at random"),
    )
    return [why for failed, why in checks if failed]


def _rows_differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors that must be equal are not, by more than low precision's rounding explains."""
    first, second = first.float(), second.float()
    return bool((first - second).norm() > 0.05 * first.norm())


@torch.inference_mode()
def probe_layers(model: torch.nn.Module, num_layers: int, max_position: int) -> list[LayerSpec]:
    """What each attention layer asks for, found by a forward of three tokens in which attention returns zeros.

    The last two tokens are the same token at the same position behind different neighbours: the model must treat them
    alike, else it mixes positions outside attention (convolution, recurrence) or ignores position_ids.
    Raises ModelNotSupported, naming the first reasons, when pages cannot serve the model exactly.
    """
    recorder = _Recorder()
    device = next(model.parameters()).device
    token_ids = torch.tensor([[3, 5, 5]], device=device)
    positions = torch.tensor([[min(3, max_position - 1)] + [min(6, max_position - 1)] * 2], device=device)
    logits = model(input_ids=token_ids, position_ids=positions, use_cache=False, paged_attention=recorder).logits
    problems = recorder.problems
    missing = [i for i in range(num_layers) if i not in recorder.layers]
    surplus = [i for i in recorder.layers if i >= num_layers]
    if missing or surplus:
        problems.insert(0, f"layers {(missing or surplus)[:4]} do not reach attention through transformers' AttentionInterface")
    if not problems and _rows_differ(logits[0, 1], logits[0, 2]):
        problems.append("equal tokens at equal positions get different logits")
    if problems:
        raise ModelNotSupported(
            f"{type(model).__name__} cannot run on paged attention: {'; '.join(problems[:3])}. "
            "Use a decoder whose every layer is softmax attention, such as Llama, Qwen, Gemma, Mistral or gpt-oss"
        )
    layers = [recorder.layers[index] for index in range(num_layers)]
    return [_without_idle_window(layer, max_position) for layer in layers]


def _without_idle_window(layer: LayerSpec, max_position: int) -> LayerSpec:
    """A window that no position outgrows is no window, and such layers share pages with the full ones."""
    if layer.window is None or layer.window < max_position:
        return layer
    return replace(layer, window=None)
