"""Small tokenizers and chat templates with the traits of well-known model families. Each builder fills a folder.

The vocabularies hold every byte and the words of WORDS, so any text encodes and some words are one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("the", "capital", "of", "France", "is", "Paris", "Hello", "world", "user", "assistant", "system", "stop")
METASPACE = "\u2581"

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA_TEMPLATE = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

MISTRAL_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

QWEN3_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""


def write_llama3(folder: Path) -> Path:
    """Byte-level BPE; the post-processor adds BOS and the template writes it too; stop tokens differ from file to file."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
    tokenizer = byte_level_bpe(special)
    bos_id = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos_id)]),
        ]
    )
    eos_ids = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    return save(
        folder,
        tokenizer,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_TEMPLATE},
        config={"eos_token_id": eos_ids[0]},
        generation_config={"eos_token_id": eos_ids[:2], "temperature": 0.6, "top_p": 0.9},
    )


def write_gemma(folder: Path) -> Path:
    """Sentencepiece-like BPE with byte fallback and no dummy prefix; the template knows no system role."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = byte_fallback_bpe(special)
    tokenizer.normalizer = normalizers.Replace(" ", METASPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    config = {"bos_token": {"content": "<bos>", "__type": "AddedToken"}, "eos_token": "<eos>", "pad_token": "<pad>"}
    folder = save(
        folder,
        tokenizer,
        config,
        config={"text_config": {"eos_token_id": 1}},
        generation_config={"eos_token_id": [1, tokenizer.token_to_id("<end_of_turn>")]},
    )
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE, encoding="utf-8")
    return folder


def write_mistral(folder: Path) -> Path:
    """Sentencepiece-like BPE with a dummy prefix that decoding strips; templates in a list; an `add_bos_token` to ignore."""
    tokenizer = byte_fallback_bpe(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    templates = [
        {"name": "default", "template": MISTRAL_TEMPLATE},
        {"name": "tool_use", "template": "{{ bos_token }}[TOOLS]{{ tools | tojson }}"},
    ]
    return save(
        folder,
        tokenizer,
        {"add_bos_token": False, "add_eos_token": True, "chat_template": templates},
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
    )


def write_qwen3(folder: Path) -> Path:
    """Byte-level BPE without BOS, ChatML with tools and `enable_thinking`, added tokens that are not special."""
    tokenizer = byte_level_bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return save(
        folder,
        tokenizer,
        {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        chat_template={"chat_template": QWEN3_TEMPLATE},
        generation_config={"eos_token_id": [2, 0]},
    )


def write_bert(folder: Path) -> Path:
    """WordPiece: a decoder that looks at neighbouring tokens, and no chat template."""
    pieces = [*WORDS, "##s", "##ing", "walk", ",", ".", "é", "世"]
    vocab = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return save(folder, tokenizer, {"eos_token": "[SEP]"})


def write_unigram(folder: Path) -> Path:
    """Unigram with a metaspace decoder, as T5 has."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), (METASPACE, -4.0)]
    pieces += [(METASPACE + word, -3.0) for word in WORDS] + [(char, -6.0) for char in "abcdefghijklmnopqrstuvwxyz,.世"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return save(folder, tokenizer, {"eos_token": "</s>"})


def byte_level_bpe(special: Sequence[str]) -> Tokenizer:
    """Special tokens first, then the 256 bytes, then WORDS with a space before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = _vocab_and_merges([*special, *alphabet], [f"\u0120{word}" for word in WORDS])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def byte_fallback_bpe(special: Sequence[str]) -> Tokenizer:
    """Special tokens first, then <0x00> ... <0xFF>, some characters, then WORDS with a metaspace before them."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?[]/\n"
    singles = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), METASPACE, *letters, "\u00e9", "\u4e16"]
    vocab, merges = _vocab_and_merges(singles, [METASPACE + word for word in WORDS])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _vocab_and_merges(singles: Sequence[str], words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every word is reached by merging its characters from the left."""
    vocab = {single: index for index, single in enumerate(singles)}
    merges: list[tuple[str, str]] = []
    for word in words:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocab:
                vocab[word[:length]] = len(vocab)
                merges.append((word[: length - 1], word[length - 1]))
    return vocab, merges


def save(folder: Path, tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], **others: Mapping[str, Any]) -> Path:
    """`others`: further JSON files by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for stem, content in {"tokenizer_config": tokenizer_config, **others}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


BUILDERS = {
    "llama3": write_llama3,
    "gemma": write_gemma,
    "mistral": write_mistral,
    "qwen3": write_qwen3,
    "bert": write_bert,
    "unigram": write_unigram,
}
