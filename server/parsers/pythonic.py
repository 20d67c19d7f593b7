"""Llama 4, and Llama 3.2 when asked to: a list of calls as Python writes them, [f(a=1, b="x"), g()].

https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/ describes the format. The list counts at the beginning of a
line. Values are Python's literals or JSON's, which mean the same here; an argument is given out as JSON when it is whole.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.json_scanner import JsonScanner
from server.parsers.tape import Broken, Reading, Tape, TapeParser, read_calls

_MARKERS = frozenset({"<|python_start|>", "<|python_end|>"})
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "/": "/"}
_CODE_LENGTHS = {"x": 2, "u": 4, "U": 8}
_MAX_DEPTH = 32
_SEPARATOR = ", "

# Lines none of which begins with a list and a function's name with its bracket.
_TEXT = r"""
TEXT: LINE ("\n" LINE)*
LINE: /[^\S\n]*([^\s\[][^\n]*)?/ | /[^\S\n]*\[[^\S\n]*/ OTHER
OTHER: /[\w\p{N}.\/:-]+([^\w\p{N}.\/:(\n-][^\n]*)?/ | /[^\s\w\p{N}.\/:-][^\n]*/
"""


class PythonicFormat:
    name = "pythonic"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.shows_special_tokens = False
        self._dropped = _MARKERS

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        return TapeParser(lambda tape: read_calls(tape, {"[": _read_list}, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return f"start: {_calls(parallel)}\n" + _rules(tools)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        """The answer is text or calls, as the format has it."""
        return f"start: TEXT | {_calls(parallel)}\n{_TEXT}" + _rules(tools)

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def _read_list(tape: Tape) -> Reading[None]:
    """What follows the opening bracket."""
    if not tape.at_line_start:
        raise Broken
    separator = ","
    while separator == ",":
        yield from _read_call(tape)
        tape.attempt()
        separator = yield from tape.peek()
        if separator in (",", "]"):
            tape.position += 1


def _read_call(tape: Tape) -> Reading[None]:
    yield from tape.peek()
    name = yield from tape.read_name()
    yield from tape.expect("(")
    if (yield from tape.peek()) == ")":
        tape.start_call(name)
        tape.write_arguments("{")
    else:
        key = yield from _read_key(tape)
        tape.start_call(name)
        tape.write_arguments("{")
        while key:
            value = yield from _read_value(tape, 0)
            tape.write_arguments(f"{json.dumps(key, ensure_ascii=False)}: {value}")
            key = yield from _read_next_key(tape)
    tape.position += 1
    tape.write_arguments("}")


def _read_key(tape: Tape) -> Reading[str]:
    yield from tape.peek()
    key = yield from tape.read_name()
    yield from tape.peek()
    yield from tape.expect("=")
    return key


def _read_next_key(tape: Tape) -> Reading[str]:
    """ "" at the closing bracket, which stays unread."""
    if (yield from tape.peek()) == ",":
        tape.position += 1
        if (yield from tape.peek()) != ")":
            key = yield from _read_key(tape)
            tape.write_arguments(_SEPARATOR)
            return key
    if (yield from tape.peek()) != ")":
        raise Broken
    return ""


def _read_value(tape: Tape, depth: int) -> Reading[str]:
    """A literal, as JSON."""
    first = yield from tape.peek()
    if depth > _MAX_DEPTH or not first:
        raise Broken
    if first in "\"'":
        return (yield from _read_string(tape))
    if first in _CLOSING:
        return (yield from _read_items(tape, depth))
    word = ""
    while (yield from tape.more()) and (tape.text[tape.position].isalnum() or tape.text[tape.position] in "+-."):
        word += tape.text[tape.position]
        tape.position += 1
    return _WORDS.get(word) or _number(word)


def _read_items(tape: Tape, depth: int) -> Reading[str]:
    opening = tape.text[tape.position]
    tape.position += 1
    items: list[str] = []
    while (yield from tape.peek()) != _CLOSING[opening]:
        item = yield from _read_value(tape, depth + 1)
        if opening == "{":
            if not item.startswith('"') or (yield from tape.peek()) != ":":
                raise Broken
            tape.position += 1
            item += ": " + (yield from _read_value(tape, depth + 1))
        items.append(item)
        if (yield from tape.peek()) == ",":
            tape.position += 1
        elif (yield from tape.peek()) != _CLOSING[opening]:
            raise Broken
    tape.position += 1
    joined = _SEPARATOR.join(items)
    return f"{{{joined}}}" if opening == "{" else f"[{joined}]"


def _read_string(tape: Tape) -> Reading[str]:
    quote = yield from _next_char(tape)
    text = ""
    while (char := (yield from _next_char(tape))) != quote:
        text += (yield from _read_escape(tape)) if char == "\\" else char
    # Halves of a surrogate pair that stand apart are no text.
    return json.dumps(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), ensure_ascii=False)


def _read_escape(tape: Tape) -> Reading[str]:
    """What follows a backslash; one that escapes nothing stands for itself, as in Python."""
    kind = yield from _next_char(tape)
    if kind not in _CODE_LENGTHS:
        return _ESCAPES.get(kind, "\\" + kind)
    digits = ""
    for _ in range(_CODE_LENGTHS[kind]):
        digits += yield from _next_char(tape)
    try:
        return chr(int(digits, 16))
    except (ValueError, OverflowError):
        raise Broken from None


def _next_char(tape: Tape) -> Reading[str]:
    if not (yield from tape.more()):
        raise Broken
    tape.position += 1
    return tape.text[tape.position - 1]


def _number(word: str) -> str:
    scanner = JsonScanner()
    _, end = scanner.feed(word, 0)
    scanner.finish()
    if not scanner.is_done or end < len(word):
        raise Broken
    return word


def _calls(parallel: bool) -> str:
    return f'{lark.several("first", lark.quoted(_SEPARATOR) + " further", parallel=parallel)} "]"'


def _rules(tools: Sequence[FunctionTool]) -> str:
    # Text may begin with the bracket as well, so that bracket and name must be one terminal.
    rules = [f"{rule}: " + " | ".join(f"{rule}_{index}" for index in range(len(tools))) for rule in ("first", "further")]
    for index, tool in enumerate(tools):
        rules.append(f"first_{index}: {lark.quoted(f'[{tool.name}(')} call_{index}")
        rules.append(f"further_{index}: {lark.quoted(f'{tool.name}(')} call_{index}")
        rules += _call_rules(tool, f"call_{index}")
    return "\n".join(rules) + "\n"


def _call_rules(tool: FunctionTool, name: str) -> list[str]:
    """The rule for what follows a function's opening bracket, and those of its arguments, which come in the schema's order.

    `name_first_i` are the arguments from the i-th on where none is given yet, `name_tail_i` where one is.
    """
    schema = lark.arguments_schema(tool)
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules = [f'{name}: {name}_first_0 ")"']
    for index, (key, value) in enumerate(properties.items()):
        argument = f"{name}_argument_{index}"
        given = f"{argument} {name}_tail_{index + 1}"
        for place, begin in (("first", ""), ("tail", lark.quoted(_SEPARATOR))):
            left_out = "" if key in required else f" | {name}_{place}_{index + 1}"
            rules.append(f"{name}_{place}_{index}: {begin} {given}{left_out}")
        document = lark.with_options({**shared, **value} if isinstance(value, Mapping) else {}, is_strict=tool.strict)
        rules.append(f"{argument}: {lark.quoted(key + '=')} {argument}_value")
        rules.append(f"{argument}_value: %json {json.dumps(document, ensure_ascii=False)}")
    return [*rules, f'{name}_first_{len(properties)}: ""', f'{name}_tail_{len(properties)}: ""']
