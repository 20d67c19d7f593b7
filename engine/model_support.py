"""Which models Octavo can run exactly, told from their configuration, before any weight is read or downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from engine.errors import ModelLoadError, ModelNotSupported

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
SUPPORTED_QUANTIZATION = frozenset({"mxfp4"})
"""MXFP4 (gpt-oss) is unpacked to bfloat16 at load, which holds its values exactly."""

_SOFTMAX_DECODER = (
    "use a decoder whose every layer is softmax attention, such as Llama, Qwen3, Gemma, Mistral, Phi-3 or gpt-oss"
)
_OTHER_MODALITIES = ("vision_config", "audio_config", "speech_config", "video_config", "thinker_config")
_RECURRENT_FIELDS = (
    "ssm_cfg",
    "mamba_d_state",
    "mamba_state_dim",
    "ssm_state_size",
    "state_size",
    "time_step_rank",
    "linear_num_key_heads",
    "linear_attn_config",
    "conv_L_cache",
    "lru_width",
    "rescale_every",
)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration in `folder`, checked, and read without running any code from there unless that is trusted.

    Raises ModelLoadError for a file that is missing or broken, ModelNotSupported for a model Octavo cannot run.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{folder} has no config.json: give a Hugging Face model folder, a GGUF file or a Hub id"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    has_code = isinstance(fields, dict) and "auto_map" in fields
    if model_type not in CONFIG_MAPPING and not (has_code and trust_remote_code):
        if has_code:
            raise ModelNotSupported(
                f"model type {model_type!r} comes with code of its own, which is run only with --trust-remote-code: "
                "read it first, or use a model that transformers knows"
            )
        raise ModelNotSupported(
            f"transformers {transformers.__version__} knows no model type {model_type!r}: use another model or a later Octavo"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} is no valid {model_type} configuration: {error}") from error
    check_supported(config, folder if trust_remote_code else None)
    return config


def check_supported(config: PretrainedConfig, trusted: Path | None = None) -> None:
    """trusted: the model's folder, where code in it may be run.

    Raise ModelNotSupported, saying why and what to use instead, unless pages can serve this model exactly.

    What only the loaded model can show (a layer that bypasses the attention interface) `attention.hf.probe_layers` finds.
    """
    fields = config.to_dict()  # a config whose attributes vary by layer refuses getattr
    model_class = _model_class(config, trusted)
    reason = (
        _modality_reason(config, fields)
        or _architecture_reason(config, model_class)
        or _attention_reason(model_class, fields)
        or _quantization_reason(fields)
    )
    if reason is not None:
        raise ModelNotSupported(f"{_name(config)} is not supported: {reason}")


def _name(config: PretrainedConfig) -> str:
    architectures = config.architectures or []
    return str(architectures[0] if architectures else config.model_type)


def _modality_reason(config: PretrainedConfig, fields: dict[str, Any]) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and Octavo serves decoders; use a decoder-only model such as Llama or Qwen3"
    if any(fields.get(name) is not None for name in _OTHER_MODALITIES):
        return (
            "it takes images or audio, and Octavo serves text; use the family's text-only model, such as gemma-3-1b-it or Qwen3"
        )
    return None


def _model_class(config: PretrainedConfig, trusted: Path | None) -> Any:
    """The class that will be loaded, the model's own where its code is trusted; None where there is none."""
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trusted is None or own is None:
        return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    try:
        return get_class_from_dynamic_module(own, trusted)
    except Exception as error:  # it is somebody's program
        raise ModelLoadError(f"the model's own code in {trusted} cannot be used: {type(error).__name__}: {error}") from error


def _architecture_reason(config: PretrainedConfig, model_class: Any) -> str | None:
    if model_class is None:
        return "transformers has no causal language model of this type; use a model for text generation"
    architectures = config.architectures or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "its checkpoint has no language-model head; use the family's model for text generation"
    return None


def _attention_reason(model_class: Any, fields: dict[str, Any]) -> str | None:
    if _uses_alibi(fields):
        return f"ALiBi position biases are not served by paged attention here; {_SOFTMAX_DECODER}"
    if fields.get("kv_lora_rank"):
        return f"multi-head latent attention (MLA) needs pages of another shape; {_SOFTMAX_DECODER}"
    if fields.get("attention_chunk_size"):
        return f"its layers attend within fixed chunks; {_SOFTMAX_DECODER}"
    foreign = sorted({str(t) for t in fields.get("layer_types") or []} - SUPPORTED_LAYER_TYPES)
    if foreign:
        return f"it has layers of type {', '.join(foreign)}; {_SOFTMAX_DECODER}"
    recurrent = [name for name in _RECURRENT_FIELDS if fields.get(name) is not None]
    if recurrent:
        return f"it keeps a recurrent or convolutional state ({recurrent[0]}); {_SOFTMAX_DECODER}"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"transformers' {model_class.__name__} does not let attention be replaced; {_SOFTMAX_DECODER}"
    return None


def _uses_alibi(fields: dict[str, Any]) -> bool:
    inner = fields.get("attn_config")
    inner_alibi = isinstance(inner, dict) and inner.get("alibi")
    by_name = fields.get("model_type") == "bloom" or fields.get("position_embedding_type") == "alibi"
    return bool(by_name or fields.get("alibi") or inner_alibi)


def _quantization_reason(fields: dict[str, Any]) -> str | None:
    quantization = fields.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    method = str(getattr(method, "value", method))
    if method in SUPPORTED_QUANTIZATION:
        return None
    return (
        f"its weights are quantized with {method!r}, which is not supported yet; use the unquantized checkpoint or a GGUF file"
    )
