"""Mistral: [TOOL_CALLS] and a JSON list of calls; from tokenizer version 11 on [TOOL_CALLS]name[ARGS]{...} for each call.

https://github.com/mistralai/mistral-common writes both (InstructTokenizerV3, V7 and V11). A call id between name and
arguments, [CALL_ID]..., is the model's own and is read over. One parser reads both; the two formats differ in what they force.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.hermes import write_json_call
from server.parsers.json_call import read_json_call
from server.parsers.tape import Reading, Tape, TapeParser, read_calls

_CALLS, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

# The templates accept no other form.
_ID_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 9


class MistralFormat:
    """Calls as one JSON list."""

    name = "mistral"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.shows_special_tokens = _CALLS in vocabulary.special
        self._dropped = vocabulary.special | {_CALLS}

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        return TapeParser(lambda tape: read_calls(tape, {_CALLS: _read_calls}, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return f"start: {lark.marker(self._vocabulary, _CALLS)} body\n" + self._rules(tools, parallel=parallel)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return lark.free_text(self._vocabulary, _CALLS, "body", parallel=False) + self._rules(tools, parallel=parallel)

    def new_call_id(self) -> str:
        return "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))

    def _rules(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        calls = lark.several("call", '", " call', parallel=parallel)
        return f'body: "[" {calls} "]"\n' + lark.calls(tools, write_json_call)


class MistralArgsFormat(MistralFormat):
    """Each call after a marker of its own, its name as plain text."""

    name = "mistral_args"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._args = lark.marker(vocabulary, _ARGS)

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        opening = lark.marker(self._vocabulary, _CALLS)
        calls = lark.several(f"{opening} call", f"{opening} call", parallel=parallel)
        return f"start: {calls}\n" + self._rules(tools, parallel=parallel)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return lark.free_text(self._vocabulary, _CALLS, "call", parallel=parallel) + self._rules(tools, parallel=parallel)

    def _rules(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return lark.calls(tools, lambda tool, arguments: f"{lark.quoted(tool.name)} {self._args} {arguments}")


def _read_calls(tape: Tape) -> Reading[None]:
    first = yield from tape.peek()
    if first == "[":
        yield from _read_list(tape)
    elif first == "{":
        yield from read_json_call(tape)
    else:
        yield from _read_named(tape)


def _read_list(tape: Tape) -> Reading[None]:
    separator = "["
    while separator != "]":
        tape.position += 1
        yield from read_json_call(tape)
        tape.attempt()
        separator = yield from tape.peek()
        if separator not in (",", "]"):
            return
    tape.position += 1


def _read_named(tape: Tape) -> Reading[None]:
    name = yield from tape.read_name()
    if (yield from tape.peek()) == "[" and (yield from tape.take(_CALL_ID)):
        yield from tape.read_name()
    if (yield from tape.peek()) == "[":
        yield from tape.expect(_ARGS)
    yield from tape.read_arguments(name)
