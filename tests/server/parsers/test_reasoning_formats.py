"""Thoughts apart from the answer, however the text is split, and with calls in the answer."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from server.parsers.base import Content, Reasoning, Vocabulary
from server.parsers.registry import chain, load_reasoning_format, load_tool_format
from tests.server.parsers.samples import TOOLS, ParsedCall, ParsedMessage, parse

STRAY = "<|stray|>"
SPECIAL = Vocabulary({}, frozenset({STRAY, "[THINK]", "[/THINK]", "[TOOL_CALLS]"}))


class Thoughts(NamedTuple):
    text: str
    content: str
    reasoning: str
    format: str = "think"
    is_open: bool = False
    vocabulary: Vocabulary = Vocabulary()


SAMPLES = {
    "both": Thoughts("<think>\nHm, 1 < 2.\n</think>\n\nYes. \n", "Yes. \n", "Hm, 1 < 2."),
    "the template opened it": Thoughts("Hm.\n</think>\n\nYes.", "Yes.", "Hm.", is_open=True),
    "opened twice": Thoughts("\n<think>\nHm.</think>Yes.", "Yes.", "Hm.", is_open=True),
    "no thoughts": Thoughts("<think>\n\n</think>\n\nYes.", "Yes.", ""),
    "none at all": Thoughts("\n Yes <thin", "\n Yes <thin", ""),
    "text before": Thoughts("So:\n<think>a</think> b", "So:\nb", "a"),
    "no opening": Thoughts("Hm.\n</think>\n\nYes.", "Hm.\n\n\nYes.", ""),
    "never closed": Thoughts("<think>Hm </thin", "", "Hm </thin"),
    "never closed, open": Thoughts(" Hm \n", "", "Hm \n", is_open=True),
    "a second time": Thoughts("<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
    "nothing": Thoughts("", "", "", is_open=True),
    "always": Thoughts("Hm.</think>Yes.", "Yes.", "Hm.", format="deepseek_r1", is_open=True),
    "mistral": Thoughts(f"[THINK]a{STRAY}b[/THINK]{STRAY}c{STRAY}", "c", "ab", format="mistral", vocabulary=SPECIAL),
    "stray tokens are text": Thoughts(f"<think>a{STRAY}</think>{STRAY}", STRAY, f"a{STRAY}"),
    "harmony": Thoughts(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "Yes.", "Hm.", "harmony"
    ),
    "harmony, open": Thoughts("Hm.<|end|><|start|>assistant<|channel|>final<|message|>Y", "Y", "Hm.", "harmony", True),
    "harmony, a call without tools": Thoughts("<|channel|>commentary to=functions.f<|message|>{}<|call|>", "{}", "", "harmony"),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_split_everywhere(sample: Thoughts) -> None:
    format = load_reasoning_format(sample.format, sample.vocabulary)
    expected = ParsedMessage(sample.content, sample.reasoning, [])
    text = sample.text
    splits = [[text[:cut], text[cut:]] for cut in range(len(text) + 1)]
    for pieces in [[text], list(text), *splits]:
        assert parse(format.parser(is_open=sample.is_open), pieces) == expected


@pytest.mark.parametrize(
    ("name", "prompt", "is_open"),
    [
        ("think", "<|assistant|><think>\n", True),
        ("think", "<|assistant|>", False),
        ("think", "<|assistant|><think>\n\n</think>\n\n", False),
        ("think", "what is <think>?<|assistant|>", False),
        ("deepseek_r1", "<|assistant|>", True),
        ("deepseek_r1", "<|assistant|><think>\n\n</think>\n\n", False),
        ("mistral", "[/INST][THINK]", True),
        ("mistral", "[/INST]", False),
        ("harmony", "<|start|>assistant", False),
        ("harmony", "<|start|>assistant<|channel|>analysis<|message|>", True),
    ],
)
def test_whether_the_prompt_opens_the_thoughts(name: str, prompt: str, is_open: bool) -> None:
    assert load_reasoning_format(name).starts_open(prompt) == is_open


def test_special_tokens_are_shown_where_the_markers_are_some() -> None:
    assert not load_reasoning_format("think").shows_special_tokens
    assert load_reasoning_format("think", Vocabulary({}, frozenset({"<think>"}))).shows_special_tokens
    assert load_reasoning_format("harmony").shows_special_tokens


def test_text_is_not_held_back() -> None:
    parser = load_reasoning_format("think").parser(is_open=True)
    for char in "Hm":
        assert parser.push(char) == [Reasoning(char)]
    assert parser.push("</think>") == []
    for char in "Yes.":
        assert parser.push(char) == [Content(char)]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_after_thoughts(size: int) -> None:
    text = '<think>I <tool_call> it.</think>\n\nSee:\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    parser = chain(load_reasoning_format("think").parser(is_open=False), load_tool_format("hermes").parser(TOOLS))
    assert parser is not None
    message = parse(parser, [text[start : start + size] for start in range(0, len(text), size)])
    assert message == ParsedMessage("See:", "I <tool_call> it.", [ParsedCall("now", "{}")])


@pytest.mark.parametrize("size", [1, 1000])
def test_the_tool_parser_sees_its_special_tokens(size: int) -> None:
    text = f'[THINK]a[/THINK][TOOL_CALLS][{{"name": "now", "arguments": {{}}}}]{STRAY}'
    reasoning = load_reasoning_format("mistral", SPECIAL).parser(is_open=False, before_tools=True)
    parser = chain(reasoning, load_tool_format("mistral", SPECIAL).parser(TOOLS))
    assert parser is not None
    message = parse(parser, [text[start : start + size] for start in range(0, len(text), size)])
    assert message == ParsedMessage("", "a", [ParsedCall("now", "{}")])


def test_one_parser_alone_is_no_chain() -> None:
    parser = load_reasoning_format("think").parser(is_open=False)
    assert chain(parser, None) is parser
    assert chain(None, parser) is parser
    assert chain(None, None) is None
