"""Formats by name, and by the signs of a chat template."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from server.parsers import registry
from server.parsers.base import FunctionTool
from server.parsers.hermes import default_tool_block
from tests.server.parsers.samples import CALL, SEP


@pytest.mark.parametrize("name", registry.TOOL_FORMATS)
def test_tool_formats_are_called_what_they_are_called(name: str) -> None:
    assert registry.load_tool_format(name).name == name


@pytest.mark.parametrize("name", registry.REASONING_FORMATS)
def test_reasoning_formats_are_called_what_they_are_called(name: str) -> None:
    assert registry.load_reasoning_format(name).name == name


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="hermes, llama3_json") as error:
        registry.load_tool_format("hermess")
    assert error.value.param == "tool_parser"
    with pytest.raises(ConfigError, match="think, deepseek_r1") as error:
        registry.load_reasoning_format("thinking")
    assert error.value.param == "reasoning_parser"


# Lines of the models' own templates.
TEMPLATES = {
    "hermes": ['{{- \'<tool_call>\\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'],
    "qwen3_coder": ["{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}"],
    "llama3_json": [
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|python_tag|>' + tool_call.name + '.call(' }}",
        "<|start_header_id|> {{- '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}",
    ],
    "pythonic": ["Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]"],
    "mistral": ["{{- '[TOOL_CALLS][' }}{{- tool_call.function|tojson }}"],
    "mistral_args": ["{{- '[TOOL_CALLS]' + tool_call.function.name + '[ARGS]' + arguments }}"],
    "deepseek_v3": [f"{{{{'{CALL}' + tool['type'] + '{SEP}' + tool.name + '\\n' + '```json' + '\\n' + tool.arguments}}}}"],
    "deepseek_v31": [f"{{{{'{CALL}' + tool.name + '{SEP}' + tool.arguments}}}}"],
    "harmony": ["{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking }}"],
}


@pytest.mark.parametrize(("name", "source"), [(name, source) for name, sources in TEMPLATES.items() for source in sources])
def test_tool_format_of_a_template(name: str, source: str) -> None:
    assert registry.detect_tool_format(source) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{%- set content = content.split('</think>')[-1] %}", "think"),
        ("{{ '<|Assistant|><think>\\n' }}", "think"),
        ("{{ '[THINK]' + block.thinking + '[/THINK]' }}", "mistral"),
        ("{{- '<|channel|>analysis<|message|>' }}", "harmony"),
        ("{{ message.content }}", None),
    ],
)
def test_reasoning_format_of_a_template(source: str, name: str | None) -> None:
    assert registry.detect_reasoning_format(source) == name


def test_a_template_without_tools_shows_no_format() -> None:
    assert registry.detect_tool_format("{{ '<|im_start|>' + message.role + '\\n' + message.content }}") is None


def test_default_tool_block() -> None:
    block = default_tool_block([FunctionTool("now", "The {time}.", {"type": "object"}), FunctionTool("then")])
    lines = block.splitlines()
    start = lines.index("<tools>")
    function = '{"name": "now", "description": "The {time}.", "parameters": {"type": "object"}}'
    assert lines[start + 1] == f'{{"type": "function", "function": {function}}}'
    assert '"then"' in lines[start + 2] and lines[start + 3] == "</tools>"
    assert block == block.strip() and "<tool_call>\n{" in block
