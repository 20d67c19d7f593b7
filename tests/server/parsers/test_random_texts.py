"""Random texts over a format's markers: the parts never depend on how the text is split, and nothing raises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.registry import REASONING_FORMATS, TOOL_FORMATS, chain, load_reasoning_format, load_tool_format
from tests.server.parsers.samples import BEGIN, CALL, CALL_END, END, SEP, ParsedMessage, parse

STRAY = "<|stray|>"
VOCABULARY = Vocabulary({}, frozenset({STRAY}))
TOOLS = [FunctionTool("f", "", {"properties": {"n": {"type": "integer"}, "x": {"type": ["string", "null"]}}})]

_DEEPSEEK = [BEGIN, CALL, SEP, CALL_END, END, "function", "```json", "```"]
_MISTRAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", ",", "[THINK]", "[/THINK]"]
_HARMONY = ["<|channel|>", "<|start|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "analysis", "final"]
BITS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "llama3_json": ["<|python_tag|>", ";", ",", '{"name": "f", "parameters": '],
    "mistral": _MISTRAL,
    "mistral_args": _MISTRAL,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "qwen3_coder": [
        "<tool_call>",
        "<function=f>",
        "</function>",
        "<parameter=n>",
        "<parameter=x>",
        "</parameter>",
        "12",
        "None",
    ],
    "harmony": [*_HARMONY, "commentary to=functions.f", " to=", "assistant", "json"],
    "pythonic": ["[", "[f(", "f(", "n=1", "x='a'", ")", ", ", "<|python_start|>", "True", "\\u00e9", "'", "(", "]"],
    "think": ["<think>", "</think>"],
    "deepseek_r1": ["<think>", "</think>"],
}
COMMON = ['{"name": "f", "arguments": {"a": 1}}', '{"name": "f"', '"arguments": ', '{"a": "x\\n"}', '{"a":', "{", "}", '"', "f"]
COMMON += ["\n", " ", "\t", "text ", "é", "<", "[", "1.5e", "\\", STRAY, "<think>", "</think>"]


def check(parsers: list[OutputParser], pieces: list[str], seed: int) -> ParsedMessage:
    text = "".join(pieces)
    whole, characters, cut = parsers
    message = parse(whole, [text])
    assert parse(characters, text) == message
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=3))
    assert parse(cut, [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == message
    return message


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("thinks", [False, True])
def test_tool_formats(name: str, thinks: bool) -> None:
    tools, thoughts = load_tool_format(name, VOCABULARY), load_reasoning_format("think", VOCABULARY)

    def parser() -> OutputParser:
        chained = chain(thoughts.parser(is_open=False, before_tools=True) if thinks else None, tools.parser(TOOLS))
        assert chained is not None
        return chained

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(BITS[name] + COMMON), max_size=12), st.integers(0, 2**32))
    def run(pieces: list[str], seed: int) -> None:
        message = check([parser() for _ in range(3)], pieces, seed)
        assert all(call.name and call.arguments.startswith("{") for call in message.calls)
        assert STRAY not in message.content or not tools.shows_special_tokens

    run()


@pytest.mark.parametrize("name", REASONING_FORMATS)
@pytest.mark.parametrize("is_open", [False, True])
def test_reasoning_formats(name: str, is_open: bool) -> None:
    format = load_reasoning_format(name, VOCABULARY)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from(BITS[name] + COMMON), max_size=12), st.integers(0, 2**32))
    def run(pieces: list[str], seed: int) -> None:
        message = check([format.parser(is_open=is_open) for _ in range(3)], pieces, seed)
        assert not message.calls

    run()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab \n<>{}[]"), max_size=30))
def test_text_without_markers_is_content_as_it_is(text: str) -> None:
    for name in ("hermes", "deepseek_v31", "qwen3_coder", "mistral"):
        assert parse(load_tool_format(name).parser([]), [text]) == ParsedMessage(text, "", [])
