"""1,000 random JSON schemas, answered without a model: by random choice among the tokens that the masks allow."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.grammar import GrammarTokenizer, MaskMaker
from engine.sampling_params import SamplingParams
from server.api.structured import json_schema_spec
from tests.random_schemas import SchemaMaker
from tests.tokenizers_in_the_manner_of import save

NUM_SCHEMAS = 1000
IN_SHORT = 5  # every fifth
EOS_ID = 0
PIECES = (
    '{"', '":', '",', '"}', '"]', '": "', '":{"', '", "', "}}", "]}", "[[", "[]", "{}", "},", '"},{"', '["', ":[", " true",
    "true", "null", "false", "\n  ", "\n    ", "  ", "      ", '\\"', "\\u00", "\\n", "00", "123", "1.", "-1", "e+", "the",
    " of", "name", "kind", "cat", "value", "node", "next", "extra", "-0", ", ", ": ", "é", "世界", "abc", "foo-",
    "2024-", ":00", "k_",
)  # fmt: skip
# A bounded answer has a budget above its longest form; an unbounded one is brought to an end after this many tokens.
NUM_FREE_TOKENS = 150
NUM_LAST_TOKENS = 2000

formats = jsonschema.FormatChecker(formats=())


@formats.checks("date")
def is_date(value: object) -> bool:
    """As the grammar has it: every year may have a 29 February."""
    return not isinstance(value, str) or re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])", value) is not None


for name in ("ipv4", "ipv6", "uuid", "email"):
    formats.checkers[name] = jsonschema.FormatChecker.checkers[name]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    """Bytes, and pieces that reach over the tokens of JSON."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [byte_level.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    vocab = {token: index for index, token in enumerate(["<eos>", *alphabet, *dict.fromkeys(pieces)])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    folder = save(tmp_path_factory.mktemp("tokenizer"), backend, {"eos_token": "<eos>"})
    return GrammarTokenizer.load(folder, vocab_size=len(vocab) + 7, eos_token_ids=[EOS_ID])


class Author:
    """Writes an answer, one random token after the other."""

    def __init__(self, tokenizer: GrammarTokenizer, schema: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._matcher = tokenizer.compile(json_schema_spec(schema, "schema")).start(SamplingParams())
        self._masks = MaskMaker(1)
        self._rng = random.Random(seed)
        self._output: list[int] = []

    @property
    def text(self) -> str:
        return self._tokenizer.library.decode_bytes(self._output).decode()

    def write(self, num_tokens: int, *, hurry: bool = False) -> bool:
        """Whether the answer ends within so many tokens. hurry: what closes something goes first."""
        for _ in range(num_tokens):
            made = self._masks.make({0: self._matcher})
            assert made.masks is not None and not made.errors, (made.errors, self.text)
            words = made.masks.allowed[0]
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            assert allowed and max(allowed) < self._tokenizer.library.vocab_size
            token_id = min(allowed, key=self._rank) if hurry else self._rng.choice(allowed)
            if token_id == EOS_ID:
                return True
            self._output.append(token_id)
            if self._matcher.accept(token_id):
                return True
        return False

    def _rank(self, token_id: int) -> tuple[int, float]:
        """What ends a string or, outside of one, an object or array comes first."""
        text = self._tokenizer.library.decode_bytes([token_id]).decode(errors="replace")
        so_far = self._tokenizer.library.decode_bytes(self._output)
        in_string = re.sub(rb"\\.", b"", so_far).count(b'"') % 2
        text = "0" if text.isdecimal() else text  # which digit is left to chance
        order = ['"', *"@.-0:abDSWZ"] if in_string else ["}", "]", '"', ",", ":", "0", "null"]
        rank = -1 if token_id == EOS_ID else order.index(text) if text in order else len(order)
        return (min(rank, 1) if in_string and rank < len(order) else rank), self._rng.random()


def check(schema: Any, text: str) -> None:
    assert not re.search(r"\s\s", re.sub(r"\n {0,20}", " ", re.sub(r'"(\\.|[^"\\])*"', '""', text))), "unbounded whitespace"
    # Digits may go on for long; only a number without bounds may have an exponent.
    answer = json.loads(text, parse_float=lambda number: float(number) if "e" in number.lower() else Decimal(number))
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(answer)


@pytest.mark.parametrize("bounded", [True, False])
def test_answers_finish_parse_and_validate(tokenizer: GrammarTokenizer, bounded: bool, run_all: bool) -> None:
    for seed in range(0, NUM_SCHEMAS // 2, 1 if run_all else IN_SHORT):
        schema, longest = SchemaMaker(seed, bounded=bounded).make()
        author = Author(tokenizer, schema, seed)
        try:
            if bounded:
                assert longest is not None
                assert author.write(longest + 1), "a bounded answer did not finish"
            else:
                assert author.write(NUM_FREE_TOKENS) or author.write(NUM_LAST_TOKENS, hurry=True), "it could not be ended"
            check(schema, author.text)
        except Exception as error:
            raise AssertionError(
                f"seed {seed}: {type(error).__name__}: {error}\n{json.dumps(schema)}\n{author.text[:500]!r}"
            ) from error
