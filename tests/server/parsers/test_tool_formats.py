"""Every format's samples, split everywhere: by characters, and as token ids that go through the detokenizer."""

from __future__ import annotations

import pytest

from server.parsers.base import CallArguments, CallStart, Content
from server.parsers.registry import TOOL_FORMATS, load_tool_format
from tests.server.parsers.formats import byte_tokenizer, tool_format, vocabulary
from tests.server.parsers.samples import SAMPLES, SPECIAL_TOKENS, TOOLS, Sample, parse

every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


@every_sample
def test_meaning(sample: Sample) -> None:
    assert parse(tool_format(sample.format).parser(TOOLS), [sample.text]) == sample.message


@every_sample
def test_split_at_every_point(sample: Sample) -> None:
    format = tool_format(sample.format)
    for cut in range(len(sample.text) + 1):
        assert parse(format.parser(TOOLS), [sample.text[:cut], sample.text[cut:]]) == sample.message, cut


@every_sample
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_few_characters_at_a_time(sample: Sample, size: int) -> None:
    pieces = [sample.text[start : start + size] for start in range(0, len(sample.text), size)]
    assert parse(tool_format(sample.format).parser(TOOLS), pieces) == sample.message


@every_sample
def test_token_ids_through_the_detokenizer(sample: Sample) -> None:
    tokenizer = byte_tokenizer(sample.format)
    format = load_tool_format(sample.format, vocabulary(tokenizer))
    assert format.shows_special_tokens == bool(SPECIAL_TOKENS[sample.format])
    detokenizer = tokenizer.detokenizer([1, 2], skip_special_tokens=not format.shows_special_tokens)
    ids = tokenizer.encode(sample.text)
    has_marker = any(text in sample.text for text in tokenizer.added_tokens)
    assert (len(ids) < len(sample.text.encode())) == has_marker
    texts = [detokenizer.append([token_id]).text for token_id in ids]
    assert parse(format.parser(TOOLS), [*texts, detokenizer.finish()]) == sample.message


@every_sample
def test_parts_are_in_order(sample: Sample) -> None:
    """Each call starts once, its arguments follow it, and no part is empty."""
    parser = tool_format(sample.format).parser(TOOLS)
    num_calls = 0
    for part in [part for char in sample.text for part in parser.push(char)] + parser.finish():
        match part:
            case CallStart(index, name):
                assert index == num_calls and name
                num_calls += 1
            case CallArguments(index, text):
                assert index == num_calls - 1 and text
            case _:
                assert part.text
    assert num_calls == len(sample.calls)


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "deepseek_v31", "qwen3_coder", "pythonic"])
def test_text_is_not_held_back(name: str) -> None:
    parser = tool_format(name).parser(TOOLS)
    for char in "An answer, with <b>tags</b> and [brackets](x).":
        parts = parser.push(char)
        if char not in " <[":
            assert parts and isinstance(parts[-1], Content) and parts[-1].text.endswith(char)


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": '),
        ("llama3_json", '{"name": "weather", "parameters": '),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": '),
        ("mistral_args", "[TOOL_CALLS]weather[ARGS]"),
        ("harmony", "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"),
    ],
)
def test_arguments_come_as_the_model_says_them(name: str, opening: str) -> None:
    parser = tool_format(name).parser(TOOLS)
    assert parser.push(opening) == []
    assert parser.push("{") == [CallStart(0, "weather"), CallArguments(0, "{")]
    for char in '"city": "Par\\u00e9 ]}", "x": [1, 2]':
        assert parser.push(char) == [CallArguments(0, char)]
    assert parser.push("}") == [CallArguments(0, "}")]


def test_strings_of_tagged_parameters_come_as_the_model_says_them() -> None:
    parser = tool_format("qwen3_coder").parser(TOOLS)
    assert parser.push("<tool_call>\n<function=weather>\n<parameter=city>\n")[0] == CallStart(0, "weather")
    for char, written in {"P": "P", '"': '\\"', "é": "é"}.items():
        assert parser.push(char) == [CallArguments(0, written)]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_call_ids(name: str) -> None:
    ids = {tool_format(name).new_call_id() for _ in range(100)}
    assert len(ids) == 100
    if name.startswith("mistral"):
        assert all(len(call_id) == 9 and call_id.isascii() and call_id.isalnum() for call_id in ids)
    else:
        assert all(call_id.startswith("call_") for call_id in ids)


def test_without_special_tokens_in_the_vocabulary_text_that_looks_like_one_stays() -> None:
    format = load_tool_format("hermes")
    assert not format.shows_special_tokens
    assert parse(format.parser(TOOLS), ["What is <|im_end|>?"]).content == "What is <|im_end|>?"
