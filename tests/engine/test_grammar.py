"""Grammars over tokenizers of every kind, matchers and masks by themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import RequestFailed
from engine.grammar import GrammarTokenizer, MaskMaker, Matcher
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.tokenizer import Tokenizer
from tests import ascii_tokenizer
from tests.ascii_tokenizer import EOS_ID, encode
from tests.tokenizers_in_the_manner_of import BUILDERS

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["é", "b c"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def json_spec(schema: dict[str, Any]) -> StructuredSpec:
    return StructuredSpec("json_schema", json.dumps(schema))


def allowed_ids(matcher: Matcher) -> list[int]:
    made = MaskMaker(1).make({0: matcher})
    assert made.masks is not None and not made.errors
    return np.flatnonzero(np.unpackbits(made.masks.allowed[0].view(np.uint8), bitorder="little")).tolist()


def write(matcher: Matcher, eos_ids: frozenset[int], seed: int = 0, limit: int = 500) -> list[int]:
    """Random allowed tokens until the grammar ends; the EOS token is not part of them."""
    rng, output = random.Random(seed), list[int]()
    for _ in range(limit):
        token_id = rng.choice(allowed_ids(matcher))
        ended = matcher.accept(token_id)
        if token_id not in eos_ids:
            output.append(token_id)
        if ended:
            return output
    raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def ascii_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_tokenizer.write(tmp_path_factory.mktemp("ascii"))


@pytest.fixture(scope="module")
def tokenizer(ascii_folder: Path) -> GrammarTokenizer:
    return GrammarTokenizer.load(ascii_folder, vocab_size=97, eos_token_ids=[EOS_ID])


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "qwen3"])
def test_what_a_grammar_allows_is_what_the_detokenizer_shows(name: str, tmp_path: Path) -> None:
    """Bytes, byte fallback, a dummy prefix; more logits than tokens; several EOS tokens."""
    own = Tokenizer.load(BUILDERS[name](tmp_path))
    eos_ids = own.eos_token_ids
    tokenizer = GrammarTokenizer(own, vocab_size=own.vocab_size + 50, eos_token_ids=eos_ids)
    grammar = tokenizer.compile(json_spec(PERSON))
    for seed in range(10):
        output = write(grammar.start(SamplingParams()), eos_ids, seed)
        detokenizer = own.detokenizer([5])
        text = detokenizer.append(output).text + detokenizer.finish()
        answer = json.loads(text)
        assert answer.keys() == {"name", "tags"} and len(answer["name"]) <= 12
        assert max(output) < own.vocab_size


def test_every_eos_token_is_allowed_where_the_grammar_is_complete_and_nowhere_else(tmp_path: Path) -> None:
    own = Tokenizer.load(BUILDERS["llama3"](tmp_path))
    tokenizer = GrammarTokenizer(own, vocab_size=own.vocab_size, eos_token_ids=own.eos_token_ids)
    assert len(own.eos_token_ids) == 3
    matcher = tokenizer.compile(StructuredSpec("regex", "a{2,3}")).start(SamplingParams())
    [a] = own.encode("a", add_special_tokens=False)
    assert allowed_ids(matcher) == [a] and not matcher.accept(a)
    assert allowed_ids(matcher) == [a] and not matcher.accept(a)
    assert set(allowed_ids(matcher)) == {a, *own.eos_token_ids}
    assert matcher.accept(max(own.eos_token_ids))


def test_special_tokens_are_no_text_unless_a_grammar_names_them(tmp_path: Path) -> None:
    own = Tokenizer.load(BUILDERS["qwen3"](tmp_path))
    tokenizer = GrammarTokenizer(own, vocab_size=own.vocab_size, eos_token_ids=own.eos_token_ids)
    added = own.added_tokens
    free = tokenizer.compile(StructuredSpec("regex", r"(?s:.)*")).start(SamplingParams())
    assert not {added[text] for text in ("<think>", "<tool_call>", "<|im_start|>")} & set(allowed_ids(free))
    named = tokenizer.compile(StructuredSpec("lark", f'start: <think> "a" <[{added["</think>"]}]>')).start(SamplingParams())
    assert allowed_ids(named) == [added["<think>"]] and not named.accept(added["<think>"])
    named.accept(own.encode("a", add_special_tokens=False)[0])
    assert allowed_ids(named) == [added["</think>"]] and named.accept(added["</think>"])


def test_the_same_text_as_a_literal_is_written_without_the_special_token(tmp_path: Path) -> None:
    own = Tokenizer.load(BUILDERS["qwen3"](tmp_path))
    tokenizer = GrammarTokenizer(own, vocab_size=own.vocab_size, eos_token_ids=own.eos_token_ids)
    matcher = tokenizer.compile(StructuredSpec("choice", '["<|im_start|>"]')).start(SamplingParams())
    output = write(matcher, own.eos_token_ids)
    assert len(output) > 1 and b"".join(own.token_bytes(token_id) for token_id in output) == b"<|im_start|>"


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_forced_text_has_the_tokens_that_the_tokenizer_gives_it(name: str, tmp_path: Path) -> None:
    """Also where every text gets a space in front."""
    own = Tokenizer.load(BUILDERS[name](tmp_path))
    tokenizer = GrammarTokenizer(own, vocab_size=own.vocab_size, eos_token_ids=own.eos_token_ids)
    matcher = tokenizer.compile(StructuredSpec("choice", '["a the of"]')).start(SamplingParams())
    output = write(matcher, own.eos_token_ids)
    expected = own.encode("a the of", add_special_tokens=False)
    assert b"".join(own.token_bytes(token_id) for token_id in output) == b"a the of"
    assert output == expected or (name == "mistral" and output[1:] == expected[-len(output) + 1 :])


def test_ids_without_a_token_are_never_allowed(tokenizer: GrammarTokenizer, ascii_folder: Path) -> None:
    wide = GrammarTokenizer.load(ascii_folder, vocab_size=300, eos_token_ids=[EOS_ID, 250])
    assert wide.eos_token_ids == {EOS_ID}
    matcher = wide.compile(StructuredSpec("lark", "start: <[*]>")).start(SamplingParams())
    assert max(allowed_ids(matcher)) == 96
    narrow = GrammarTokenizer.load(ascii_folder, vocab_size=50, eos_token_ids=[EOS_ID])
    assert max(allowed_ids(narrow.compile(StructuredSpec("regex", ".*")).start(SamplingParams()))) == 49


def test_a_model_without_eos_tokens_ends_where_nothing_may_follow(ascii_folder: Path) -> None:
    tokenizer = GrammarTokenizer.load(ascii_folder, vocab_size=97, eos_token_ids=[])
    for spec in (
        StructuredSpec("choice", '["ab","cd"]'),
        StructuredSpec("lark", 'start: "a" b?\nb: "b"'),
        json_spec({"type": "null"}),
    ):
        assert write(tokenizer.compile(spec).start(SamplingParams()), frozenset())


# -- kinds of specification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (StructuredSpec("choice", '["yes","no \\"x\\"","\\\\"]'), ["yes", 'no "x"', "\\"], ["ye", "yess", "n", ""]),
        (StructuredSpec("regex", "^[0-9]{2}/(a|b)$"), ["12/a"], ["1/a", "12/c", "^12/a"]),
        (StructuredSpec("lark", 'start: "f(" ARG ("," ARG)* ")"\nARG: /[a-z]+/'), ["f(x)", "f(a,bc)"], ["f()", "f(a,)"]),
        (json_spec({"const": {"a": [1, None]}}), ['{"a":[1,null]}', '{"a": [1, null]}'], ['{"a":[1]}']),
    ],
)
def test_a_specification_accepts_what_it_says(
    tokenizer: GrammarTokenizer, spec: StructuredSpec, good: list[str], bad: list[str]
) -> None:
    grammar = tokenizer.compile(spec)
    for text in (*good, *bad):
        matcher, ended = grammar.start(SamplingParams()), False
        for token_id in encode(text):
            if token_id not in allowed_ids(matcher):
                assert text in bad
                break
            ended = matcher.accept(token_id)
        else:
            assert (ended or EOS_ID in allowed_ids(matcher)) == (text in good), text


def test_a_token_that_is_not_allowed_is_an_error_of_the_request(tokenizer: GrammarTokenizer) -> None:
    matcher = tokenizer.compile(StructuredSpec("choice", '["a"]')).start(SamplingParams())
    with pytest.raises(RequestFailed, match="cannot be followed further"):
        matcher.accept(encode("b")[0])


def test_rows_are_masked_alike_by_one_thread_and_by_several(tokenizer: GrammarTokenizer) -> None:
    grammar = tokenizer.compile(json_spec(PERSON))
    matchers = {row: grammar.start(SamplingParams()) for row in (2, 3, 5, 8)}
    for row, matcher in matchers.items():
        for token_id in encode('{"name":"x"'[: row + 1]):
            matcher.accept(token_id)
    one, several = MaskMaker(1).make(matchers).masks, MaskMaker(3).make(matchers).masks
    assert one is not None and several is not None and one.allowed.keys() == matchers.keys()
    assert all((one.allowed[row] == several.allowed[row]).all() for row in matchers)
    assert len({one.allowed[row].tobytes() for row in matchers}) > 2


def test_bad_words_are_followed_over_the_output_only() -> None:
    matcher = Matcher.of_bad_words(SamplingParams(bad_words=((5, 6), (4, 5, 7), (9,), (6, 5, 8))))
    banned = [matcher.banned()]
    for token_id in (4, 5, 6, 5, 5):
        assert not matcher.accept(token_id)
        banned.append(matcher.banned())
    assert banned == [[], [], [6, 7], [], [6, 8], [6]]
    assert MaskMaker(1).make({3: matcher}).masks is not None
    matcher.accept(1)
    assert MaskMaker(1).make({3: matcher}).masks is None, "a row without a ban needs no mask"
