"""Formats with the vocabulary of their family, over a tokenizer of bytes."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.tokenizer import Tokenizer
from server.parsers.base import ReasoningFormat, ToolFormat, Vocabulary
from server.parsers.registry import load_reasoning_format, load_tool_format
from tests.server.parsers.samples import ADDED_TOKENS, SPECIAL_TOKENS

EOS_ID = 256


def byte_tokenizer(name: str, *, with_markers: bool = True, chat_template: str = "") -> Tokenizer:
    """A token a byte, <eos>, and the markers of a tool format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    if with_markers:
        backend.add_special_tokens(SPECIAL_TOKENS[name])
        backend.add_tokens([AddedToken(text, normalized=False) for text in ADDED_TOKENS.get(name, [])])
    templates = {"default": chat_template} if chat_template else {}
    return Tokenizer(
        backend, special_tokens={"eos_token": "<eos>"}, eos_token_ids=frozenset({EOS_ID}), chat_templates=templates
    )


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.added_tokens, tokenizer.special_tokens)


def tool_format(name: str) -> ToolFormat:
    return load_tool_format(name, vocabulary(byte_tokenizer(name)))


def reasoning_format(name: str, tokenizer: Tokenizer) -> ReasoningFormat:
    return load_reasoning_format(name, vocabulary(tokenizer))
