"""Llama 3.1 to 3.3: the answer is {"name": ..., "parameters": {...}}, or such an object after <|python_tag|>; several by ";".

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/ describes the format. An object counts as a call at the
beginning of a line, where nothing but its name, its parameters, a type and an id stand in it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from server.parsers import lark
from server.parsers.base import FunctionTool, OutputParser, Vocabulary
from server.parsers.json_call import read_json_call
from server.parsers.tape import Broken, Reading, Tape, TapeParser, read_calls

_TAG = "<|python_tag|>"
_SEPARATORS = (";", ",")

# Lines none of which begins with an object, and no tag.
_TEXT = rf"""
TEXT: LINE ("\n" LINE)* & ~(ANY "{_TAG}" ANY)
LINE: /[^\S\n]*([^\s{{][^\n]*)?/
ANY: /(?s:.*)/
"""


class Llama3JsonFormat:
    name = "llama3_json"
    splits_reasoning = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.shows_special_tokens = _TAG in vocabulary.special
        self._dropped = vocabulary.special | {_TAG}

    def parser(self, tools: Sequence[FunctionTool]) -> OutputParser:
        openings = {_TAG: _read_tagged, "{": _read_bare}
        return TapeParser(lambda tape: read_calls(tape, openings, self._dropped))

    def forced_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        return f"start: {_calls(parallel)}\n" + lark.calls(tools, _write_call)

    def lazy_grammar(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        """The answer is text or calls, as the format has it."""
        return f"start: TEXT | {_calls(parallel)}\n{_TEXT}" + lark.calls(tools, _write_call)

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def _calls(parallel: bool) -> str:
    return lark.several("call", '"; " call', parallel=parallel)


def _write_call(tool: FunctionTool, arguments: str) -> str:
    opening = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "parameters": '
    return f'{lark.quoted(opening)} {arguments} "}}"'


def _read_bare(tape: Tape) -> Reading[None]:
    if not tape.at_line_start:
        raise Broken
    yield from read_json_call(tape, is_open=True, needs_arguments=True)
    yield from _read_further(tape)


def _read_tagged(tape: Tape) -> Reading[None]:
    yield from read_json_call(tape)
    yield from _read_further(tape)


def _read_further(tape: Tape) -> Reading[None]:
    """Calls after a separator. Without one, a next line's object is found as the first one was."""
    while True:
        tape.attempt()
        if (yield from tape.peek()) not in _SEPARATORS:
            return
        tape.position += 1
        if (yield from tape.peek()) == _TAG[0]:
            yield from tape.expect(_TAG)
        yield from read_json_call(tape)
