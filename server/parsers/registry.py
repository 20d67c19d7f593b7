"""Which parser formats there are, and which one a chat template stands for."""

from __future__ import annotations

import importlib
from typing import Any, cast

from engine.errors import ConfigError
from server.parsers.base import Content, OutputParser, Part, ReasoningFormat, ToolFormat, Vocabulary

TOOL_FORMATS = {
    "hermes": "server.parsers.hermes:HermesFormat",
    "llama3_json": "server.parsers.llama3_json:Llama3JsonFormat",
    "mistral": "server.parsers.mistral:MistralFormat",
    "mistral_args": "server.parsers.mistral:MistralArgsFormat",
    "deepseek_v3": "server.parsers.deepseek:DeepSeekV3Format",
    "deepseek_v31": "server.parsers.deepseek:DeepSeekV31Format",
    "qwen3_coder": "server.parsers.qwen3_coder:Qwen3CoderFormat",
    "harmony": "server.parsers.harmony:HarmonyFormat",
    "pythonic": "server.parsers.pythonic:PythonicFormat",
}
REASONING_FORMATS = {
    "think": "server.parsers.think:ThinkFormat",
    "deepseek_r1": "server.parsers.think:AlwaysThinkFormat",
    "mistral": "server.parsers.think:MistralThinkFormat",
    "harmony": "server.parsers.harmony:HarmonyReasoningFormat",
}

# The first row of which every string is in a template's source decides.
_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>",)),
    ("deepseek_v3", ("<\uff5ctool\u2581call\u2581begin\uff5c>", "```json")),
    ("deepseek_v31", ("<\uff5ctool\u2581call\u2581begin\uff5c>",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<function=",)),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"')),
    ("llama3_json", ("<|header_start|>", '"parameters"')),
)
_REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>",)),
    ("mistral", ("[THINK]",)),
    ("think", ("</think>",)),
    ("think", ("<think>",)),
)


def load_tool_format(name: str, vocabulary: Vocabulary | None = None) -> ToolFormat:
    """Raises ConfigError (param "tool_parser") for a name that is none of TOOL_FORMATS."""
    return cast(ToolFormat, _load(TOOL_FORMATS, name, "tool_parser")(vocabulary or Vocabulary()))


def load_reasoning_format(name: str, vocabulary: Vocabulary | None = None) -> ReasoningFormat:
    """Raises ConfigError (param "reasoning_parser") for a name that is none of REASONING_FORMATS."""
    return cast(ReasoningFormat, _load(REASONING_FORMATS, name, "reasoning_parser")(vocabulary or Vocabulary()))


def _load(formats: dict[str, str], name: str, param: str) -> Any:
    if name not in formats:
        raise ConfigError(f"{param} must be one of {', '.join(formats)}, got {name!r}", param=param)
    module, _, attribute = formats[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def detect_tool_format(template_source: str) -> str | None:
    """The tool format whose markers a chat template writes; None where it shows none that we know."""
    return _detect(_TOOL_SIGNS, template_source)


def detect_reasoning_format(template_source: str) -> str | None:
    return _detect(_REASONING_SIGNS, template_source)


def _detect(rows: tuple[tuple[str, tuple[str, ...]], ...], source: str) -> str | None:
    return next((name for name, signs in rows if all(sign in source for sign in signs)), None)


def chain(reasoning: OutputParser | None, tools: OutputParser | None) -> OutputParser | None:
    """The parser of an answer: thoughts first, calls in what is left. None where there is nothing to parse."""
    if reasoning is None or tools is None:
        return reasoning or tools
    return _Chain(reasoning, tools)


class _Chain:
    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Part]:
        return self._pass_on(self._first.push(text))

    def finish(self) -> list[Part]:
        return [*self._pass_on(self._first.finish()), *self._second.finish()]

    def _pass_on(self, parts: list[Part]) -> list[Part]:
        passed: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                passed += self._second.push(part.text)
            else:
                passed.append(part)
        return passed
