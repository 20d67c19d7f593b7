"""Qwen 3 Coder: <tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>, values as plain text.

The model's chat template shows the format; a line break after a parameter's opening tag and one before its closing tag belong
to the tags. What type a value has is in the tool's schema: text for a string (and for a parameter that the schema does not
know), else JSON, and text again where it is none. A grammar holds strings to `enum`, `const` and their lengths, not to a
pattern or format.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.markers import Markers
from server.parsers.tape import Broken, Reading, Tape, TapeParser, read_calls

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"

_VALUE_ENDS = (_PARAMETER_END, _PARAMETER, _FUNCTION_END)
_VALUE_MARKERS = Markers([f"{line_break}{end}" for end in _VALUE_ENDS for line_break in ("", "\n")])
_JSON_OF_PYTHON = {"True": "true", "False": "false", "None": "null"}
_TYPES: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


class Qwen3CoderFormat:
    name = "qwen3_coder"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.shows_special_tokens = _OPEN in vocabulary.special
        self._dropped = vocabulary.special if self.shows_special_tokens else frozenset()

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        reader = _CallReader({tool.name: _properties(tool) for tool in tools})
        openings = {_OPEN: reader.read_tagged, _FUNCTION: reader.read_function}
        return TapeParser(lambda tape: read_calls(tape, openings, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        calls = lark.several("tagged", r'"\n" tagged', parallel=parallel)
        return f"start: {calls}\ntagged: {lark.marker(self._vocabulary, _OPEN)} body\n" + self._rules(tools)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        rules = self._rules(tools).replace(lark.ANY_TEXT, "")
        return lark.free_text(self._vocabulary, _OPEN, "body", parallel=parallel, never=_FUNCTION) + rules

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _rules(self, tools: Sequence[FunctionTool]) -> str:
        calls = " | ".join(f"call_{index}" for index in range(len(tools)))
        rules = [f'body: "\\n" ({calls}) "\\n" {lark.marker(self._vocabulary, _CLOSE)}']
        ends = " | ".join(map(lark.quoted, _VALUE_ENDS))
        rules += [lark.ANY_TEXT.rstrip(), f"VALUE: ANY & ~(ANY ({ends}) ANY)"]
        for index, tool in enumerate(tools):
            rules += _call_rules(tool, f"call_{index}")
        return "\n".join(rules) + "\n"


class _CallReader:
    """Reads calls of functions with these properties by name."""

    def __init__(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self._functions = functions

    def read_tagged(self, tape: Tape) -> Reading[None]:
        yield from tape.peek()
        yield from tape.expect(_FUNCTION)
        yield from self.read_function(tape)

    def read_function(self, tape: Tape) -> Reading[None]:
        """What follows `<function=`."""
        name = yield from tape.read_name()
        yield from tape.expect(">")
        yield from tape.peek()
        is_parameter = yield from tape.take(_PARAMETER)
        if not is_parameter:
            yield from tape.expect(_FUNCTION_END)
        tape.start_call(name)
        properties = self._functions.get(name, {})
        separator = "{"
        while is_parameter:
            tape.write_arguments(separator)
            yield from _read_parameter(tape, properties)
            separator = ", "
            yield from tape.peek()
            is_parameter = yield from tape.take_or_rest(_PARAMETER)
            if not is_parameter:
                yield from tape.expect(_FUNCTION_END)
        tape.write_arguments("}" if separator == ", " else "{}")
        if (yield from tape.peek()):
            yield from tape.take_or_rest(_CLOSE)


def _read_parameter(tape: Tape, properties: Mapping[str, Any]) -> Reading[None]:
    """What follows `<parameter=`, up to where the next parameter or the end of the function begins."""
    key = yield from tape.read_name(before=">")
    yield from tape.expect(">")
    yield from tape.take("\n")
    kinds = _kinds(properties.get(key))
    tape.write_arguments(f"{json.dumps(key, ensure_ascii=False)}: ")
    if kinds == {"string"}:
        tape.write_arguments('"')
        yield from _read_value(tape, None)
        tape.write_arguments('"')
    else:
        pieces: list[str] = []
        yield from _read_value(tape, pieces)
        tape.write_arguments(_as_json("".join(pieces), kinds))


def _read_value(tape: Tape, pieces: list[str] | None) -> Reading[None]:
    """The value goes to `pieces`, or comes out as the inside of a JSON string. Raises Broken where it does not end."""
    while True:
        found = _VALUE_MARKERS.find(tape.text, tape.position, is_final=tape.is_final)
        text = tape.text[tape.position : found.start]
        tape.position = found.end
        if pieces is None:
            tape.write_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            pieces.append(text)
        if found.marker is not None:
            if not found.marker.endswith(_PARAMETER_END):
                tape.position -= len(found.marker)
            return
        if tape.is_final:
            raise Broken
        yield


def _properties(tool: FunctionTool) -> Mapping[str, Any]:
    properties = tool.schema().get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _kinds(schema: object) -> set[str]:
    """The types that a schema names, {"string"} where it names none."""
    if not isinstance(schema, Mapping):
        return {"string"}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return {_TYPES.get(type(value), "null") for value in values}
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return set(map(str, kinds))
    branches = [branch for word in ("anyOf", "oneOf") if isinstance(schema.get(word), list) for branch in schema[word]]
    if branches:
        return set().union(*map(_kinds, branches))
    return {"object"} if "$ref" in schema else {"string"}


def _as_json(text: str, kinds: set[str]) -> str:
    """A value's text as JSON: itself, if it is JSON of a type that is wanted, or if text is not wanted."""
    candidate = _JSON_OF_PYTHON.get(text.strip(), text.strip())
    try:
        kind = _TYPES.get(type(json.loads(candidate, parse_constant=_refuse_constant)), "null")
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    is_wanted = "string" not in kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    return candidate if is_wanted else json.dumps(text, ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _call_rules(tool: FunctionTool, name: str) -> list[str]:
    """A function's rule and those of its parameters, which come in the schema's order."""
    whole = tool.schema()
    required = whole.get("required")
    definitions: dict[str, Any] = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
    rules, parts = [], []
    for index, (key, schema) in enumerate(_properties(tool).items()):
        parameter = f"{name}_{index}"
        parts.append(parameter if isinstance(required, list) and key in required else f"{parameter}?")
        opening = lark.quoted(f"{_PARAMETER}{key}>\n")
        rules += _parameter_rules(parameter, opening, schema, definitions, tool.strict)
    opening = lark.quoted(f"{_FUNCTION}{tool.name}>\n")
    return [f"{name}: {opening} {' '.join(parts)} {lark.quoted(_FUNCTION_END)}", *rules]


def _parameter_rules(name: str, opening: str, schema: Any, definitions: Mapping[str, Any], is_strict: bool) -> list[str]:
    end = lark.quoted(f"\n{_PARAMETER_END}\n")
    if _kinds(schema) != {"string"}:
        document = lark.with_options({**definitions, **schema}, is_strict=is_strict)
        return [f"{name}: {opening} {name}_value {end}", f"{name}_value: %json {json.dumps(document, ensure_ascii=False)}"]
    given = schema if isinstance(schema, Mapping) else {}
    if "const" in given or "enum" in given:
        values = [given["const"]] if "const" in given else given["enum"]
        return [f"{name}: {opening} ({' | '.join(map(lark.quoted, values))}) {end}"]
    terminal = f"{name.upper()}_VALUE"
    return [f"{name}: {opening} {name}_value", f"{name}_value[lazy]: {terminal} {end}", f"{terminal}: VALUE{_lengths(given)}"]


def _lengths(schema: Mapping[str, Any]) -> str:
    least, most = (value if type(value) is int and value >= 0 else "" for value in map(schema.get, ("minLength", "maxLength")))
    return "" if least == most == "" else f" & /(?s:.{{{least or 0},{most}}})/"
