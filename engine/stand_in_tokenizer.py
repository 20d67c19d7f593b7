"""A made-up tokenizer for random weights that come without one: any text can be encoded, every id shows as text.

Byte-level: 256 ids are the bytes, the rest are whole words, the given ones first (each with and without a space before it) and
then words of made-up syllables. There are no special tokens, so that whatever a random model samples is seen by its client; a
byte of an unfinished character shows with the token after it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import ModelLoadError

_SPACE = "\u0120"  # how byte-level vocabularies write it
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_stand_in_tokenizer(folder: Path, vocab_size: int, words: Sequence[str] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json with exactly `vocab_size` ids. Raises ModelLoadError where the
    vocabulary has no room for the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ModelLoadError(
            f"a vocabulary of {vocab_size} ids has no room for a byte-level stand-in tokenizer: add a tokenizer.json, or "
            f"raise vocab_size to {len(alphabet)} or more"
        )
    # A word that the text splitter isolates is looked up whole (ignore_merges), so no merges are needed.
    tokens = dict.fromkeys(itertools.chain(alphabet, _spaced(words)))
    vocab = {token: index for index, token in enumerate(itertools.islice(tokens, vocab_size))}
    for word in _made_up_words():
        if len(vocab) == vocab_size:
            break
        vocab.setdefault(_SPACE + word, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _spaced(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        yield word
        yield _SPACE + word


def _made_up_words() -> Iterator[str]:
    """Words of two syllables, then of three, and so on without end."""
    for length in itertools.count(2):
        for syllables in itertools.product(_SYLLABLES, repeat=length):
            yield "".join(syllables)
