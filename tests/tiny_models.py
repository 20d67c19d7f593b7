"""Tiny random models of many architectures, each with a small tokenizer, saved as ordinary Hugging Face folders.

hidden 64, grouped-query heads of 16, float32, weights wide enough that greedy choices are no near ties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 320
MAX_POSITION = 512
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SAMPLE_TEXT = (
    "the quick brown fox jumps over the lazy dog while pages of sixteen tokens are counted, shared and freed again",
    "a book printed in octavo has sixteen pages to the sheet, and the printer folds the sheet three times",
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITION,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}

# name -> (model_type, what differs from _BASE)
_SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_dynamic_ntk": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, "max_position_embeddings": 64},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "layer_types": _ALTERNATING,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": _ALTERNATING,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": MAX_POSITION}),
    "phi3_longrope": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "layer_types": _ALTERNATING,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _YARN,
        },
    ),
}
ROPE_BY_LENGTH: tuple[str, ...] = ("phi3_longrope", "llama_dynamic_ntk")
"""Their frequencies depend on the longest position of a batch in transformers; Octavo fixes them at load."""

ARCHITECTURES: tuple[str, ...] = tuple(name for name in _SPECS if name not in ROPE_BY_LENGTH)


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Make the model `name` in `folder` (which may exist) and return it. The same name and seed give the same weights."""
    model_type, changes = _SPECS[name]
    config = AutoConfig.for_model(model_type, **{**_BASE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mistake in their use
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with a ChatML template; every string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SAMPLE_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=MAX_POSITION
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
