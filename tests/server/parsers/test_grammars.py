"""What a grammar allows, a random model says: it is always calls that the same format's parser reads, with valid arguments."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.grammar import Grammar, GrammarTokenizer, MaskMaker, Matcher
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.tokenizer import Tokenizer
from server.parsers.base import FunctionTool
from server.parsers.lark import MAX_PARALLEL_CALLS, arguments_schema
from server.parsers.registry import TOOL_FORMATS, chain, load_reasoning_format, load_tool_format
from tests.server.parsers.formats import EOS_ID, byte_tokenizer, vocabulary
from tests.server.parsers.samples import BEGIN, CALL, SEP, ParsedCall, ParsedMessage, parse
from tests.tokenizers_in_the_manner_of import BUILDERS

TOOLS = [
    FunctionTool(
        "weather",
        "",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        strict=True,
    ),
    FunctionTool(
        "draw-it_2",
        "",
        {
            "type": "object",
            "properties": {"lines": {"$ref": "#/$defs/lines"}, "note": {"type": ["string", "null"], "maxLength": 3}},
            "$defs": {"lines": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
            "required": ["lines"],
            "x-unknown-keyword": 1,
        },
    ),
    FunctionTool("now"),
]
BY_NAME = {tool.name: tool for tool in TOOLS}

every_format = pytest.mark.parametrize("name", TOOL_FORMATS)
with_and_without_tokens = pytest.mark.parametrize("with_markers", [True, False], ids=["tokens", "strings"])

HARMONY_THOUGHTS = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"

# Text that ends where a call begins, up to its name.
OPENINGS = {
    "hermes": 'Hm <tool_call>\n{"name": "',
    "llama3_json": '{"name": "',
    "mistral": 'Hm [TOOL_CALLS][{"name": "',
    "mistral_args": "Hm [TOOL_CALLS]",
    "deepseek_v3": f"Hm {BEGIN}{CALL}function{SEP}",
    "deepseek_v31": f"Hm {BEGIN}{CALL}",
    "qwen3_coder": "Hm <tool_call>\n<function=",
    "pythonic": "[",
    "harmony": f"{HARMONY_THOUGHTS}<|channel|>commentary to=functions.",
}
NAME_ENDS = {"pythonic": "("}  # without it a name in brackets is text
TEXTS = {"harmony": f"{HARMONY_THOUGHTS}<|channel|>final<|message|>"}


@cache
def tokenizers_of(name: str, with_markers: bool) -> tuple[Tokenizer, GrammarTokenizer]:
    tokenizer = byte_tokenizer(name, with_markers=with_markers)
    return tokenizer, GrammarTokenizer(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


def compiled(tokenizer: GrammarTokenizer, lark: str) -> Grammar:
    return tokenizer.compile(StructuredSpec("lark", lark))


def allowed_ids(matcher: Matcher) -> list[int]:
    made = MaskMaker(1).make({0: matcher})
    assert made.masks is not None and not made.errors
    ids: list[int] = np.flatnonzero(np.unpackbits(made.masks.allowed[0].view(np.uint8), bitorder="little")).tolist()
    return ids


def follow(matcher: Matcher, token_ids: Sequence[int]) -> bool:
    """Whether these tokens are allowed, one after the other."""
    for token_id in token_ids:
        if token_id not in allowed_ids(matcher):
            return False
        matcher.accept(token_id)
    return True


def write(tokenizer: Tokenizer, grammar: Grammar, seed: int, begin: str = "") -> str:
    """`begin`, and random tokens until the grammar ends; a model that likes to end what it has begun."""
    rng, matcher = random.Random(seed), grammar.start(SamplingParams())
    output = tokenizer.encode(begin)
    assert follow(matcher, output)
    for count in range(3000):
        ids = allowed_ids(matcher)
        liked = [token_id for token_id in ids if token_id >= EOS_ID or tokenizer.token_text(token_id) in '"}]']
        eos_ids = [token_id for token_id in ids if token_id in tokenizer.eos_token_ids]
        token_id = rng.choice(eos_ids if eos_ids and count > 300 else liked if liked and rng.random() < 0.2 else ids)
        ended = matcher.accept(token_id)
        if token_id not in tokenizer.eos_token_ids:
            output.append(token_id)
        if ended:
            return tokenizer.decode(output, skip_special_tokens=False)
    raise AssertionError("it does not end")


def check_calls(calls: Sequence[ParsedCall], names: set[str]) -> None:
    for call in calls:
        assert call.name in names
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        jsonschema.validate(arguments, BY_NAME[call.name].parameters or {"maxProperties": 0})


@every_format
@with_and_without_tokens
@pytest.mark.parametrize("tool", TOOLS, ids=BY_NAME)
def test_a_named_function_is_called_once(name: str, with_markers: bool, tool: FunctionTool) -> None:
    tokenizer, library = tokenizers_of(name, with_markers)
    format = load_tool_format(name, vocabulary(tokenizer))
    grammar = compiled(library, format.forced_grammar([tool], parallel=False))
    for seed in range(8):
        message = parse(format.parser(TOOLS), [write(tokenizer, grammar, seed)])
        assert message.content == "" and len(message.calls) == 1
        check_calls(message.calls, {tool.name})


@every_format
@with_and_without_tokens
def test_required_calls(name: str, with_markers: bool) -> None:
    tokenizer, library = tokenizers_of(name, with_markers)
    format = load_tool_format(name, vocabulary(tokenizer))
    for parallel in (False, True):
        grammar = compiled(library, format.forced_grammar(TOOLS, parallel=parallel))
        messages = [parse(format.parser(TOOLS), [write(tokenizer, grammar, seed)]) for seed in range(20)]
        assert {message.content for message in messages} == {""}
        counts = [len(message.calls) for message in messages]
        check_calls([call for message in messages for call in message.calls], set(BY_NAME))
        several = parallel and name != "harmony"  # which has one call a turn
        assert min(counts) == 1 and (1 < max(counts) <= MAX_PARALLEL_CALLS) == several


@every_format
def test_free_text_with_strict_calls(name: str) -> None:
    tokenizer, library = tokenizers_of(name, True)
    format = load_tool_format(name, vocabulary(tokenizer))
    for parallel in (False, True):
        lark = format.lazy_grammar(TOOLS, parallel=parallel)
        assert lark is not None
        grammar = compiled(library, lark)
        text = TEXTS.get(name, "") + 'Some text, "a" < {b}\n [c](d): <e>\n'
        assert write(tokenizer, grammar, 1, text).startswith(text)
        for seed in range(20):
            begin = OPENINGS[name] + random.Random(seed).choice(TOOLS).name + NAME_ENDS.get(name, "")
            message = parse(format.parser(TOOLS), [write(tokenizer, grammar, seed, begin)])
            assert message.calls and (parallel or len(message.calls) == 1)
            check_calls(message.calls, set(BY_NAME))
        assert not follow(
            grammar.start(SamplingParams()), tokenizer.encode(f"{OPENINGS[name]}unknown{NAME_ENDS.get(name, '')}")
        )


@pytest.mark.parametrize("name", [name for name in TOOL_FORMATS if name != "harmony"])
def test_free_text_where_markers_are_no_tokens(name: str) -> None:
    tokenizer, library = tokenizers_of(name, False)
    format = load_tool_format(name, vocabulary(tokenizer))
    lark = format.lazy_grammar(TOOLS, parallel=True)
    assert lark is not None
    grammar = compiled(library, lark)
    for seed in range(5):
        message = parse(
            format.parser(TOOLS), [write(tokenizer, grammar, seed, f"{OPENINGS[name]}now{NAME_ENDS.get(name, '')}")]
        )
        assert message.calls
        check_calls(message.calls, set(BY_NAME))
    assert not follow(grammar.start(SamplingParams()), tokenizer.encode(f"{OPENINGS[name]}unknown{NAME_ENDS.get(name, '')}"))


@pytest.mark.parametrize("name", ["hermes", "mistral_args", "qwen3_coder"])
def test_no_second_call_where_one_is_allowed(name: str) -> None:
    tokenizer, library = tokenizers_of(name, True)
    format = load_tool_format(name, vocabulary(tokenizer))
    call = {
        "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "mistral_args": "[TOOL_CALLS]now[ARGS]{}",
        "qwen3_coder": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    }[name]
    for parallel in (False, True):
        lark = format.lazy_grammar(TOOLS, parallel=parallel)
        assert lark is not None
        ids = tokenizer.encode(f"a{call} b {call}")
        assert follow(compiled(library, lark).start(SamplingParams()), ids) == parallel


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        ({}, True),
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "required": ["a"]}, True),
        ({"properties": {"a": {}}, "required": ["b"]}, None),
        ({"properties": {"a": {}}, "required": [{"a": 1}]}, None),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, False),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, None),
        ({"type": "object"}, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}, None),
    ],
)
def test_schemas_are_closed_where_that_keeps_what_they_ask_for(parameters: dict[str, Any], closed: bool | None) -> None:
    given = json.dumps(parameters)
    schema = arguments_schema(FunctionTool("f", "", parameters))
    additional = schema.get("additionalProperties")
    assert additional is {True: False, None: None}.get(closed, additional)
    assert schema["type"] == "object"
    assert json.dumps(parameters) == given


@pytest.mark.parametrize("strict", [True, False])
def test_keywords_that_are_not_known_are_refused_for_strict_functions_alone(strict: bool) -> None:
    _, library = tokenizers_of("hermes", True)
    parameters = {"properties": {"a": {"type": "array", "uniqueItems": True}}, "dependentRequired": {"a": ["b"]}}
    lark = load_tool_format("hermes").forced_grammar([FunctionTool("f", "", parameters, strict)], parallel=False)
    with pytest.raises(InvalidRequest) if strict else nullcontext():
        compiled(library, lark)


# -- reasoning ---------------------------------------------------------------------------------------------------------

ANSWER = 'start: "{\\"a\\": " ("true" | "false") "}"'


def thinking_tokenizer(tmp_path: Path) -> tuple[Tokenizer, GrammarTokenizer]:
    tokenizer = Tokenizer.load(BUILDERS["qwen3"](tmp_path))
    return tokenizer, GrammarTokenizer(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


@pytest.mark.parametrize("is_token", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_thoughts_before_a_constrained_answer(is_token: bool, is_open: bool, tmp_path: Path) -> None:
    tokenizer, library = thinking_tokenizer(tmp_path) if is_token else tokenizers_of("hermes", True)
    format = load_reasoning_format("think", vocabulary(tokenizer))
    grammar = compiled(library, format.grammar(ANSWER, is_open=is_open))
    thoughts = 'Hm, {"a": 1} <b>\n</think>\n\n'
    for seed in range(5):
        text = write(tokenizer, grammar, seed, thoughts if is_open else f"<think>{thoughts}")
        message = parse(format.parser(is_open=is_open), [text])
        assert message.reasoning == 'Hm, {"a": 1} <b>'
        assert isinstance(json.loads(message.content)["a"], bool)
    if not is_open:
        assert json.loads(write(tokenizer, grammar, 0, '{"a": ')).keys() == {"a"}
    assert EOS_ID not in allowed_ids(grammar.start(SamplingParams()))


@pytest.mark.parametrize("is_open", [True, False])
def test_thoughts_before_forced_calls(is_open: bool, tmp_path: Path) -> None:
    tokenizer, library = thinking_tokenizer(tmp_path)
    thoughts = load_reasoning_format("think", vocabulary(tokenizer))
    tools = load_tool_format("hermes", vocabulary(tokenizer))
    lark = thoughts.grammar(tools.forced_grammar(TOOLS, parallel=True), is_open=is_open, is_call=True)
    grammar = compiled(library, lark)
    for seed in range(5):
        text = write(tokenizer, grammar, seed, "Hm\n</think>\n" if is_open else "<think>Hm\n</think>\n")
        parser = chain(thoughts.parser(is_open=is_open, before_tools=True), tools.parser(TOOLS))
        assert parser is not None
        message = parse(parser, [text])
        assert message.reasoning == "Hm" and message.content == "" and message.calls
        check_calls(message.calls, set(BY_NAME))


@pytest.mark.parametrize("is_open", [True, False])
@with_and_without_tokens
def test_harmony_s_thoughts(is_open: bool, with_markers: bool) -> None:
    tokenizer, library = tokenizers_of("harmony", with_markers)
    thoughts, tools = (
        load_reasoning_format("harmony", vocabulary(tokenizer)),
        load_tool_format("harmony", vocabulary(tokenizer)),
    )
    begin = ("" if is_open else "<|channel|>analysis<|message|>") + "Hm.<|end|>"
    answers = compiled(library, thoughts.grammar(ANSWER, is_open=is_open))
    message = parse(thoughts.parser(is_open=is_open), [write(tokenizer, answers, 0, begin)])
    assert message.reasoning == "Hm." and json.loads(message.content).keys() == {"a"}
    forced = tools.forced_grammar(TOOLS, parallel=False)
    calls = compiled(library, thoughts.grammar(forced, is_open=is_open, is_call=True))
    text = ("<|channel|>analysis<|message|>" if is_open else "") + write(tokenizer, calls, 0, begin)
    message = parse(tools.parser(TOOLS), [text])
    assert message.reasoning == "Hm." and message.content == "" and len(message.calls) == 1
    check_calls(message.calls, set(BY_NAME))
    if not is_open:
        direct = parse(thoughts.parser(is_open=False), [write(tokenizer, answers, 1, "<|channel|>final")])
        assert direct == ParsedMessage(direct.content, "", []) and json.loads(direct.content).keys() == {"a"}
