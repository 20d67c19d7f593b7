"""Loads a Hugging Face model for paged attention, and reads what its files say about stopping and sampling.

transformers loads (its key conversions are better kept than ours would be); the attention of every layer is then known from a
probe, and rotary frequencies that would follow the batch's longest position are fixed for the served context.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from engine.attention import hf
from engine.attention.base import LayerSpec
from engine.config import ModelConfig
from engine.errors import ModelLoadError, ModelNotSupported
from engine.model_files import Report, resolve_model
from engine.model_support import check_supported, read_config
from engine.tokenizer import read_eos_token_ids

__all__ = [
    "LoadedModel",
    "Report",
    "check_supported",
    "fix_rotary",
    "load_model",
    "read_config",
    "resolve_dtype",
    "resolve_model",
]

_DUMMY_SEED = 0
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, and what the rest of the engine must know of it.

    config: the text model's configuration. layers: in order. max_position: tokens of context the model knows.
    eos_token_ids: union over config, generation config and tokenizer, ascending. generation_defaults: sampling values
    that the generation config sets. weight_bytes: of parameters and buffers, tied ones once.
    """

    model: torch.nn.Module
    config: PretrainedConfig
    layers: list[LayerSpec]
    dtype: torch.dtype
    vocab_size: int
    max_position: int
    eos_token_ids: list[int]
    generation_defaults: dict[str, Any]
    architecture: str
    weight_bytes: int


def load_model(
    folder: Path, model_config: ModelConfig, device: torch.device, dtype: torch.dtype, *, served_context: int | None = None
) -> LoadedModel:
    """Load the model in `folder` (from resolve_model) onto `device` in `dtype` (from resolve_dtype).

    served_context: longest sequence in tokens that will be served; without one, max_model_len, else all the model knows.
    Rotary frequencies are fixed for it. Raises ModelNotSupported or ModelLoadError, with what to do instead.
    """
    config = read_config(folder, trust_remote_code=model_config.trust_remote_code)
    text_config = config.get_text_config(decoder=True)
    max_position = max_context(text_config)
    hf.register()
    logging.disable_progress_bar()
    build = _build_dummy if model_config.load_format == "dummy" else _load_weights
    model = build(folder, config, device, dtype, model_config).eval().requires_grad_(False)
    fix_rotary(model, served_context or model_config.max_model_len or max_position)
    return LoadedModel(
        model=model,
        config=text_config,
        layers=hf.probe_layers(model, int(text_config.num_hidden_layers), max_position),
        dtype=dtype,
        vocab_size=int(text_config.vocab_size),
        max_position=max_position,
        eos_token_ids=_eos_token_ids(folder, text_config),
        generation_defaults=_generation_defaults(folder) if model_config.generation_config == "auto" else {},
        architecture=type(model).__name__,
        weight_bytes=_weight_bytes(model),
    )


def resolve_dtype(name: str, device: torch.device, config: PretrainedConfig, *, has_kernels: bool = False) -> torch.dtype:
    """The dtype that `name` means here. "auto" on a CPU: bfloat16 where the CPU multiplies it, or where there are our kernels
    (has_kernels), which compute in float32 then; else float32. On a GPU: the checkpoint's, and bfloat16 for one in float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        return torch.bfloat16 if has_kernels or _cpu_has_bfloat16() else torch.float32
    stored = getattr(config.get_text_config(decoder=True), "dtype", None)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX; torch names the checks with an underscore, and says nothing of other CPUs."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def max_context(config: PretrainedConfig) -> int:
    """Tokens of context that the model knows. Dynamic NTK and YaRN stretch their pretrained length by a factor; elsewhere the
    configuration states the stretched length itself."""
    stated = getattr(config, "max_position_embeddings", None)
    if not stated:
        raise ModelLoadError("config.json states no max_position_embeddings, so the model's context is unknown: add it there")
    context = int(stated)
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind == "dynamic" and factor:
        context = int(context * factor)
    if kind == "yarn" and factor and rope.get("original_max_position_embeddings"):
        context = max(context, int(rope["original_max_position_embeddings"] * factor))
    return context


def _load_weights(
    folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, model_config: ModelConfig
) -> torch.nn.Module:
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": hf.ATTENTION_NAME}
    # Only where pickles are allowed, and there is nothing else, are they looked at; torch then reads tensors out of them alone.
    options["use_safetensors"] = not model_config.allow_pickled_weights or any(folder.glob("*.safetensors"))
    if getattr(config, "quantization_config", None) is not None:  # MXFP4, the only one that check_supported lets through
        from transformers.utils.quantization_config import Mxfp4Config

        options["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, **options, trust_remote_code=model_config.trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"the weights in {folder} cannot be loaded: {error}") from error
    except Exception as error:  # safetensors and pickle have error classes of their own, outside the usual ones
        if type(error).__name__ == "SafetensorError":
            raise ModelLoadError(f"a weights file in {folder} is damaged ({error}): fetch it again") from error
        if type(error).__name__ == "UnpicklingError":
            raise ModelLoadError(f"a pickle in {folder} is damaged or holds more than tensors, so it is not read") from error
        raise
    model: torch.nn.Module = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: fetch the model again, "
            "or give one that was saved whole"
        )
    return model.to(device)


def _build_dummy(
    folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, model_config: ModelConfig
) -> torch.nn.Module:
    """Random weights by the model's own rule (norms ones, the rest normal), the same on every start of one device and torch.

    Built without memory and drawn on the device itself: a GPU writes them at the speed of its memory, and nothing is drawn
    twice. The rule also makes what meta tensors lose: rotary frequencies and other buffers that checkpoints do not hold.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=hf.ATTENTION_NAME, trust_remote_code=model_config.trust_remote_code
        )
    model.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_DUMMY_SEED)
        model.initialize_weights()
    model.tie_weights()
    built: torch.nn.Module = model
    return built


def fix_rotary(model: torch.nn.Module, served_context: int) -> bool:
    """Fix frequencies that depend on the batch's longest position (LongRoPE, dynamic NTK) for sequences of up to
    `served_context` tokens, so that a request's text does not depend on what runs beside it. Repeatable; returns whether
    the model has any. Sources: https://arxiv.org/abs/2402.13753 (LongRoPE), transformers' modeling_rope_utils.
    """
    found = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "rope_type") or config is None:
            continue
        for layer_type, kind in _rope_kinds(config):
            if "dynamic" not in kind and kind != "longrope":
                continue
            if not hasattr(type(module).forward, "__wrapped__"):  # not transformers' common update, so not ours to switch off
                raise ModelNotSupported(
                    f"{type(module).__name__} chooses rotary frequencies by the batch's longest position in a way of its own; "
                    "use a model with Phi-3's or Llama's rotary embedding"
                )
            _fix_frequencies(module, config, layer_type, kind, served_context)
            found = True
    return found


def _rope_kinds(config: PretrainedConfig) -> Iterator[tuple[str | None, str]]:
    """(layer type, rope type); the layer type is None where all layers share one rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        yield None, str(rope["rope_type"])
        return
    for layer_type, parameters in rope.items():
        if isinstance(parameters, dict) and "rope_type" in parameters:
            yield layer_type, str(parameters["rope_type"])


def _fix_frequencies(
    module: torch.nn.Module, config: PretrainedConfig, layer_type: str | None, kind: str, served_context: int
) -> None:
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    frequencies = module.get_buffer(name)
    init: Callable[..., tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    fixed, _ = init(config, frequencies.device, seq_len=served_context, layer_type=layer_type)
    frequencies.copy_(fixed)
    # The common update looks at this name alone, and has nothing to do for "default".
    rotary: Any = module
    if layer_type is None:
        rotary.rope_type = "default"
    else:
        rotary.rope_type[layer_type] = "default"


def _eos_token_ids(folder: Path, config: PretrainedConfig) -> list[int]:
    ids = set(read_eos_token_ids(folder)) if (folder / "tokenizer.json").is_file() else set()
    value = getattr(config, "eos_token_id", None)
    ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ids)


def _generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling values that generation_config.json sets itself. As in transformers, all but the repetition penalty count
    only where it says do_sample."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read ({error}): mend it, or pass --generation-config none") from error
    names = (*(_SAMPLING_DEFAULTS if fields.get("do_sample") else ()), "repetition_penalty")
    return {name: fields[name] for name in names if fields.get(name) is not None}


def _weight_bytes(model: torch.nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())
