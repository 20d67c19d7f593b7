"""A tokenizer for the fake runner's vocabulary: 3 .. 96 are the printable ASCII characters without the backquote."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.errors import InvalidRequest
from engine.grammar import Grammar, GrammarTokenizer
from engine.grammar_compiler import GrammarCompiler
from engine.sampling_params import StructuredSpec
from tests.fake_runner import VOCAB_SIZE
from tests.tokenizers_in_the_manner_of import save

CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "`")
EOS_ID = 2


def write(folder: Path) -> Path:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = ["<pad>", "<stop>", "<eos>", *(byte_level.pre_tokenize_str(char)[0][0] for char in CHARACTERS)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<stop>", "<eos>"])
    return save(folder, tokenizer, {"eos_token": "<eos>"})


def load(folder: Path) -> GrammarTokenizer:
    return GrammarTokenizer.load(write(folder), vocab_size=VOCAB_SIZE, eos_token_ids=[EOS_ID])


def encode(text: str) -> list[int]:
    return [3 + CHARACTERS.index(char) for char in text]


def decode(token_ids: Sequence[int]) -> str:
    """Without special tokens."""
    return "".join(CHARACTERS[token_id - 3] for token_id in token_ids if token_id >= 3)


class GrammarsAtOnce(GrammarCompiler):
    """Compiles in the caller's thread. late: what it is asked for is done only by `finish`."""

    def __init__(self, tokenizer: GrammarTokenizer, *, late: bool = False) -> None:
        self._ready_tokenizer = tokenizer
        self._late = late
        self._waiting: list[tuple[StructuredSpec, Future[Grammar]]] = []

    def compile(self, spec: StructuredSpec) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        self._waiting.append((spec, future))
        if not self._late:
            self.finish()
        return future

    def finish(self) -> None:
        for spec, future in self._waiting:
            try:
                future.set_result(self._ready_tokenizer.compile(spec))
            except InvalidRequest as error:
                future.set_exception(error)
        self._waiting.clear()

    def close(self) -> None:
        pass
